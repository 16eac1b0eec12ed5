"""``python -m hybridnas COMMAND`` is the console script ``hybridnas``."""

from hybridnas.cli import main

if __name__ == "__main__":
    main()
