"""Entry point of ``python -m hybridnas``, the same as the console script ``hybridnas``."""

from hybridnas.cli import main

if __name__ == "__main__":
    main()
