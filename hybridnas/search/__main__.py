"""Entry point of ``python -m hybridnas.search``."""

import sys

from hybridnas.cli import main

if __name__ == "__main__":
    main(["search", *sys.argv[1:]])
