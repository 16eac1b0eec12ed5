"""``python -m hybridnas.evaluate model=DIR data=stdlib`` measures the loss of a model."""

from hybridnas.cli import door

if __name__ == "__main__":
    door("evaluate")
