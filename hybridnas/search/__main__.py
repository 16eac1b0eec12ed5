"""``python -m hybridnas.search space=mamba_moe``."""

from hybridnas.cli import door

if __name__ == "__main__":
    door("search")
