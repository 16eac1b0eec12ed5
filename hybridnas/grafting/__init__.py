"""Grafting: the architecture of a trained model is changed, and what is not touched keeps its weights.

:mod:`edits` reads what is to change and says where each block of the result comes from, :mod:`initial` starts a new
block from the old one in its place, :mod:`operation` puts both together, fits new blocks to the outputs of the old ones
and trains the result.
"""
