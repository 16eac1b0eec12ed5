"""``python -m hybridnas.replay``."""

from hybridnas.cli import door

if __name__ == "__main__":
    door("replay")
