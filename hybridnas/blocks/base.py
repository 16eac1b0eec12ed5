"""The contract of a block: a config that declares its cost, and a module whose state is explicit.

Shapes: B batch, L length (any, one included), D d_model.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hybridnas.config import FrozenConfig, option
from hybridnas.cost import Cost
from hybridnas.hardware import Impl

State = tuple[Tensor, ...]  # what a block carries from token to token; a NamedTuple of tensors, batch first


@dataclass(frozen=True)
class Aux:
    """Named extras of a forward pass: losses to add (already weighted), statistics to log (detached)."""

    losses: Mapping[str, Tensor] = field(default_factory=dict)
    stats: Mapping[str, Tensor] = field(default_factory=dict)


NO_AUX = Aux()


class BlockOutput(NamedTuple):
    """What a block returns: output, next state (None when none was given), extras."""

    y_BLD: Tensor
    state: State | None
    aux: Aux = NO_AUX


@dataclass(frozen=True, kw_only=True)
class BlockConfig(FrozenConfig):
    """Fields of a block; subclasses add theirs and declare their cost."""

    block_name: ClassVar[str] = "block"  # set by register_block, for messages

    d_model: int = option(doc="width of the residual stream [channels]", ge=1)

    @classmethod
    def label(cls) -> str:
        return cls.block_name

    @property
    def causal(self) -> bool:
        """Whether output t depends on inputs up to t alone, so that the block can generate."""
        return True

    def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
        """Return the block's cost at a sequence length, states that may be reduced in precision at ``dtype_bytes``."""
        raise NotImplementedError

    def canonical(self) -> dict[str, Any]:
        """Return the fields that define the function computed, defaults resolved: the block's part of a fingerprint."""
        return self.to_dict()


class Block(nn.Module, ABC):
    """One residual sub-layer's inside: ``y = block(x)``, without the norm and the residual around it."""

    Config: ClassVar[type[BlockConfig]]
    letter: ClassVar[str]  # set by register_block
    name: ClassVar[str]  # set by register_block
    float32: ClassVar[tuple[str, ...]] = ()  # parameters kept in float32 whatever the model's dtype
    no_decay: ClassVar[tuple[str, ...]] = ()  # matrices that weight decay leaves alone

    def __init__(self, config: Any, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__()
        self.config = config
        self.impl = impl

    @abstractmethod
    def forward(self, x_BLD: Tensor, state: State | None = None) -> BlockOutput:
        """Map (B, L, D) to (B, L, D). With a state, continue from it and return the next one; without, start fresh."""

    @abstractmethod
    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Return the state of a sequence of which nothing has been read yet."""

    def one_token(self, norm: nn.Module, state: State) -> Callable[[Tensor], Tensor] | None:
        """Return a fast x (B, D) -> x + block(norm(x)) for decoding, or None where there is none but ``forward``.

        It owns the state from now on and overwrites it, and may overwrite x. Called without gradients, in evaluation.
        """
        return None

    @abstractmethod
    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw fresh weights; ``init_scale`` is the s of truncated normal std sqrt(s / fan_in)."""

    def implementations(self, device: torch.device) -> dict[str, str]:
        """Return operation -> words on what computes it on a device, for ``describe``."""
        return {}


def truncated_normal_(weight: Tensor, fan_in: int, scale: float) -> None:
    """Fill with N(0, scale / fan_in) cut at +-2 * scale, as the MoE-Mamba code does (not at 2 std)."""
    with torch.no_grad():
        nn.init.trunc_normal_(weight, mean=0.0, std=math.sqrt(scale / fan_in), a=-2 * scale, b=2 * scale)


def options_of(config: type[FrozenConfig]) -> dict[str, str]:
    """Return field -> one-line meaning, for help texts and tests."""
    return {f.name: f.metadata.get("doc", "") for f in dataclasses.fields(config)}
