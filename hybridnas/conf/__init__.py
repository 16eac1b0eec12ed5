"""The package's budgets as YAML files, one for each choice of ``budget=NAME``."""
