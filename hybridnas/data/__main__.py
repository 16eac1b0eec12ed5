"""Entry point of ``python -m hybridnas.data``."""

import sys

from hybridnas.cli import main

if __name__ == "__main__":
    main(["data", *sys.argv[1:]])
