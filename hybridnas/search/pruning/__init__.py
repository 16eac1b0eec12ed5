"""Pruners: asynchronous successive halving with pause and resume, and Hyperband."""
