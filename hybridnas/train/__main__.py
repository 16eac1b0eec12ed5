"""python -m hybridnas.train preset=moe_mamba preset.d_model=128"""

from hybridnas.cli import door

if __name__ == "__main__":
    door("train")
