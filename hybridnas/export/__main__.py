"""``python -m hybridnas.export study=NAME out=DIR`` writes a trial of a study as a folder."""

from hybridnas.cli import door

if __name__ == "__main__":
    door("export")
