"""Entry point of ``python -m hybridnas.compare``."""

import sys

from hybridnas.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
