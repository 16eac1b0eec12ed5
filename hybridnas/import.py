"""Entry point of ``python -m hybridnas.import``."""

import sys

from hybridnas.cli import main

if __name__ == "__main__":
    main(["import", *sys.argv[1:]])
