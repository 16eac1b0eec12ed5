"""What draws the next candidate: Optuna samplers, regularized evolution, draws without duplicates."""
