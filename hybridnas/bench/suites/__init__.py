"""One file a suite, each with ``run(config) -> Result``."""
