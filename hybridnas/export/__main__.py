"""Entry point of ``python -m hybridnas.export``."""

import sys

from hybridnas.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
