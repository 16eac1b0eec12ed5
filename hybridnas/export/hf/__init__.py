"""Models of transformers' classes: their configs as architectures, their weights as ours.

One file here is one family of classes and is found by itself. It says how a config of the family is an
:class:`~hybridnas.arch.arch.Arch`, and which tensor of the class holds which rows of ours. transformers itself is
neither imported nor needed: a config is a mapping, weights are safetensors.
"""

from hybridnas.export.hf.reading import read, read_arch

__all__ = ["read", "read_arch"]
