"""One file a suite, each with ``run(config) -> Result``; the table of them is in ``hybridnas.bench``."""
