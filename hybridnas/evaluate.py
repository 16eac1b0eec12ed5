"""Entry point of ``python -m hybridnas.evaluate``."""

import sys

from hybridnas.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
