"""Where a running study lives and which process works on which trial."""
