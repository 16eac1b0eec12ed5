"""Entry point of ``python -m hybridnas.new``."""

import sys

from hybridnas.cli import main

if __name__ == "__main__":
    main(["new", *sys.argv[1:]])
