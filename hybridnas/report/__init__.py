"""What people read of a study: leaderboard, HTML report, plots, status, comparison of studies."""
