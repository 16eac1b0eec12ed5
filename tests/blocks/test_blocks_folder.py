"""The folder that the registry discovers holds blocks alone: one file, one block, one letter."""

import importlib
import pkgutil

import hybridnas.blocks
from hybridnas.layers import Block
from hybridnas.registry import BLOCKS


def test_every_file_registers_one_block_under_one_letter():
    registered = {BLOCKS.get(letter): letter for letter in BLOCKS}
    found = []
    for module in pkgutil.iter_modules(hybridnas.blocks.__path__):
        file = importlib.import_module(f"hybridnas.blocks.{module.name}")
        own = [v for v in vars(file).values() if isinstance(v, type) and v.__module__ == file.__name__]
        blocks = [kind for kind in own if issubclass(kind, Block)]
        assert len(blocks) == 1, module.name
        assert blocks[0].name == module.name
        found.append(registered[blocks[0]])
    assert len(found) == len(set(found)) > 0
