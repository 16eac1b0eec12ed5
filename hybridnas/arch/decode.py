"""Token after token through a model, over a state that the decoder owns and overwrites.

Shapes: B batch, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, cast

from torch import Tensor

from hybridnas.layers.block import State
from hybridnas.layers.mode import has_hooks
from hybridnas.layers.norms import one_row

if TYPE_CHECKING:
    from hybridnas.arch.model import HybridLM, LMState, ResidualLayer

_Step = Callable[[Tensor], Tensor]


class Decoder:
    """Logits of one token after another; each layer by its block's ``one_token`` where it has one, else by forward.

    Weights, hooks and classes are read once, here: make a new decoder after a change of the model. For use without
    gradients, model in evaluation.
    """

    def __init__(self, model: HybridLM, state: LMState) -> None:
        given = iter(state)
        self._embedding, self._head = model.embedding, model.head
        self._steps = [_step_of(layer, given) for layer in cast("Iterable[ResidualLayer]", model.layers)]
        if model.final_norm is not None:
            self._steps.append(one_row(model.final_norm))

    def __call__(self, ids_B: Tensor) -> Tensor:
        """Return the logits (B, V) after one more token (B,) of each sequence."""
        x_BD: Tensor = self._embedding(ids_B)
        for step in self._steps:
            x_BD = step(x_BD)
        logits_BV: Tensor = self._head(x_BD)
        return logits_BV


def _step_of(layer: ResidualLayer, given: Iterator[State]) -> _Step:
    blocks = list(layer.blocks())
    states = [next(given) for _ in blocks]
    if len(blocks) == 1 and not has_hooks(layer, blocks[0]):
        step = blocks[0].one_token(layer.norm, states[0])
        if step is not None:
            return step
    return _Forward(layer, states)


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
