"""Several processes on one study: local workers and Slurm jobs."""
