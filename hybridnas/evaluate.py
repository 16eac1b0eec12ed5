"""``python -m hybridnas.evaluate``: a model's loss, its accuracy by length, or architectures on a suite of tasks."""

from hybridnas.cli import door

if __name__ == "__main__":
    door("evaluate")
