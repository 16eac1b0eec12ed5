"""Hydra's configuration: one primary YAML per command, and the groups budget and data."""
