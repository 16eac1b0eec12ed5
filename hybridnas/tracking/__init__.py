"""Mirrors of a study in experiment trackers (MLflow), and masking of secrets in what they are given."""
