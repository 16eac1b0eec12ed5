"""The door of ``python -m hybridnas.compare``."""

from hybridnas.cli import door

if __name__ == "__main__":
    door("compare")
