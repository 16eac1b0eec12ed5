"""Entry point of ``python -m hybridnas.bench``."""

import sys

from hybridnas.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
