"""Entry point of ``python -m hybridnas.train``."""

import sys

from hybridnas.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
