"""``python -m hybridnas.describe``."""

from hybridnas.cli import door

if __name__ == "__main__":
    door("describe")
