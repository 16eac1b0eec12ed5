"""``python -m hybridnas.generate model=DIR prompt="def "`` streams text from an exported model."""

from hybridnas.cli import door

if __name__ == "__main__":
    door("generate")
