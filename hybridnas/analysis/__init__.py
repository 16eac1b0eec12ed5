"""Statistics over records, without training: non-dominated ranks, rung correlations, effects of choices."""
