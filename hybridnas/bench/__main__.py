"""python -m hybridnas.bench scan"""

from hybridnas.cli import door

if __name__ == "__main__":
    door("bench")
