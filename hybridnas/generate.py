"""Entry point of ``python -m hybridnas.generate``."""

import sys

from hybridnas.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
