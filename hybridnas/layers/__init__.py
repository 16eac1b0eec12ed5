"""What blocks are made of, and the contract of a block: the names that a block of one's own imports."""

from hybridnas.layers.block import (
    NO_AUX,
    Aux,
    Block,
    BlockConfig,
    BlockOutput,
    State,
    Variant,
    exportable,
    map_state,
    truncated_normal_,
)

__all__ = [
    "NO_AUX",
    "Aux",
    "Block",
    "BlockConfig",
    "BlockOutput",
    "State",
    "Variant",
    "exportable",
    "map_state",
    "truncated_normal_",
]
