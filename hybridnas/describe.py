"""Entry point of ``python -m hybridnas.describe``."""

import sys

from hybridnas.cli import main

if __name__ == "__main__":
    main(["describe", *sys.argv[1:]])
