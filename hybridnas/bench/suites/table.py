"""Build the table of a space whose every architecture is trained."""

from hybridnas.tabular.build import run as run
