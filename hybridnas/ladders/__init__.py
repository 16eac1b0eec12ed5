"""Ladders: architectures trained at growing size, scaling laws fitted to them, and what these say of larger sizes."""
