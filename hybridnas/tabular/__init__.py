"""Tables of trained architectures, how they are built, and searches simulated on them."""
