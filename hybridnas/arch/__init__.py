"""Architectures: pattern string, resolved layers, graph, model, presets, matching."""
