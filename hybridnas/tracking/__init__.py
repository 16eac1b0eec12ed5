"""Experiment tracking: studies, trials and trainings are recorded in MLflow, or in any other :class:`Tracker`."""
