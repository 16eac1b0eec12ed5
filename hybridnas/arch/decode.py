"""Token after token through a model, over a state that the decoder owns and overwrites.

Shapes: B batch, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from hybridnas.blocks.base import State
from hybridnas.blocks.stepping import one_row

if TYPE_CHECKING:
    from hybridnas.arch.model import HybridLM, LMState, ResidualLayer

_Step = Callable[[Tensor], Tensor]


class Decoder:
    """Logits of one token after another; each layer by its block's ``one_token`` where it has one, else by forward.

    Weights that change between two tokens are seen by the next one. For use without gradients, model in evaluation.
    """

    def __init__(self, model: HybridLM, state: LMState) -> None:
        given = iter(state)
        self._model = model
        self._final_norm = None if model.final_norm is None else one_row(model.final_norm)
        self._steps = [_step_of(layer, given) for layer in cast("Iterable[ResidualLayer]", model.layers)]

    def __call__(self, ids_B: Tensor) -> Tensor:
        """Return the logits (B, V) after one more token (B,) of each sequence."""
        model = self._model
        x_BD: Tensor = model.embedding(ids_B)
        for step in self._steps:
            x_BD = step(x_BD)
        if self._final_norm is not None:
            x_BD = self._final_norm(x_BD)
        logits_BV: Tensor = model.head(x_BD)
        return logits_BV


def _step_of(layer: ResidualLayer, given: Iterator[State]) -> _Step:
    blocks = list(layer.blocks())
    states = [next(given) for _ in blocks]
    if len(blocks) == 1 and not any(_hooked(module) for module in (layer, blocks[0])):
        step = blocks[0].one_token(layer.norm, states[0])
        if step is not None:
            return step
    return _Forward(layer, states)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _Forward:
    """A layer's own forward, for one token."""

    def __init__(self, layer: ResidualLayer, states: list[State]) -> None:
        self._layer, self._states = layer, states

    def __call__(self, x_BD: Tensor) -> Tensor:
        following: list[State] = []
        x_BLD, _ = self._layer(x_BD[:, None], iter(self._states), following)
        self._states = following
        first: Tensor = x_BLD[:, 0]
        return first
