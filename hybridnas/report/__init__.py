"""Reports of a study: leaderboard, HTML page, plots, status, comparison of studies."""
