"""Entry point of ``python -m hybridnas.replay``."""

import sys

from hybridnas.cli import main

if __name__ == "__main__":
    main(["replay", *sys.argv[1:]])
