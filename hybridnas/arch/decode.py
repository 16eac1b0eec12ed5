"""Token after token through a model, over a state that the decoder owns and overwrites.

Shapes: B batch, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from hybridnas.arch.layer import EMBEDDING, Around, ResidualLayer, scaled
from hybridnas.layers.block import State
from hybridnas.layers.mode import has_hooks
from hybridnas.layers.norms import one_row

if TYPE_CHECKING:
    from hybridnas.arch.model import HybridLM, LMState
    from hybridnas.arch.padding import RowStates

_Step = Callable[[Tensor], Tensor]


class Decoder:
    """Logits of one token after another; each layer by its block's ``one_token`` where it has one, else by forward.

    Weights, hooks and classes are read once, here: make a new decoder after a change of the model. For use without
    gradients, model in evaluation.
    """

    def __init__(self, model: HybridLM, state: LMState) -> None:
        given = iter(state)
        config = model.arch.model
        self._embedding, self._head = model.embedding, model.head
        self._factors = config.embedding_multiplier, config.logits_multiplier
        self._firsts: dict[str, Tensor] = {}  # of the present token
        layers = cast("Iterable[ResidualLayer]", model.layers)
        self._steps = [_step_of(layer, given, self._firsts) for layer in layers]
        self._reads_embedding = any(block.takes_embedding for layer in layers for block in layer.blocks())
        self._embedding_norm = None if model.embedding_norm is None else one_row(model.embedding_norm)
        if model.final_norm is not None:
            self._steps.append(one_row(model.final_norm))

    def __call__(self, ids_B: Tensor) -> Tensor:
        """Return the logits (B, V) after one more token (B,) of each sequence."""
        x_BD: Tensor = scaled(self._embedding(ids_B), self._factors[0])
        if self._embedding_norm is not None:
            x_BD = self._embedding_norm(x_BD)
        self._firsts.clear()
        if self._reads_embedding:  # a step may overwrite what it is given
            self._firsts[EMBEDDING] = x_BD[:, None].clone()
        for step in self._steps:
            x_BD = step(x_BD)
        logits_BV: Tensor = self._head(scaled(x_BD, self._factors[1]))
        return logits_BV


class RowDecoder:
    """A decoder for each group of rows of a batch that go together: logits of one more token of every row."""

    def __init__(self, model: HybridLM, states: RowStates) -> None:
        self._groups = [(rows_R, Decoder(model, state)) for rows_R, state in states.groups]

    def __call__(self, ids_B: Tensor) -> Tensor:
        """Return the logits (B, V) after one more token (B,) of each row."""
        if len(self._groups) == 1:
            return self._groups[0][1](ids_B)
        found = [decode(ids_B[rows_R]) for rows_R, decode in self._groups]
        rows_B = torch.cat([rows_R for rows_R, _ in self._groups])
        return torch.cat(found)[rows_B.argsort()]


def _step_of(layer: ResidualLayer, given: Iterator[State], firsts: dict[str, Tensor]) -> _Step:
    blocks, around = list(layer.blocks()), layer.around_of(0, 0)
    count = len(blocks) + sum(cast(Around, own).canon is not None for own in layer.around.values())
    states = [next(given) for _ in range(count)]
    if len(blocks) > 1 or has_hooks(layer, blocks[0]):
        return _Forward(layer, states, firsts)
    if layer.plain:
        assert layer.norm is not None
        step = blocks[0].one_token(layer.norm, states[0])
    elif around is not None and has_hooks(*around.modules()):
        step = None
    else:
        handed = _Handed()
        inner = blocks[0].one_token(handed, states[-1])
        step = None if inner is None else _Surrounded(layer, handed, inner, states)
    return _Forward(layer, states, firsts) if step is None else step


class _Forward:
    """A layer's own forward, for one token."""

    def __init__(self, layer: ResidualLayer, states: list[State], firsts: dict[str, Tensor]) -> None:
        self._layer, self._states, self._firsts = layer, states, firsts

    def __call__(self, x_BD: Tensor) -> Tensor:
        following: list[State] = []
        x_BLD, _ = self._layer(x_BD[:, None], iter(self._states), following, None, self._firsts)
        self._states = following
        first: Tensor = x_BLD[:, 0]
        return first


class _Handed(nn.Module):
    """Stands for the norm of a block's ``one_token``: gives the block what it is to read, whatever the stream is."""

    read_BD: Tensor

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.read_BD


class _Surrounded:
    """A layer of one block with options around it, the block by its own ``one_token``.

    A block's step gives x + block(norm(x)). Over x = 0, with the block's input handed in for norm(x), that is the
    block alone, exactly.
    """

    def __init__(self, layer: ResidualLayer, handed: _Handed, step: _Step, states: list[State]) -> None:
        self._layer, self._handed, self._step = layer, handed, step
        around = layer.around_of(0, 0)
        self._factors = (1.0, 1.0) if around is None else (around.in_multiplier, around.out_multiplier)
        self._norm = None if layer.norm is None else one_row(layer.norm)
        self._canon = self._norm_after = None
        if around is not None and around.canon is not None:
            self._canon = around.canon.one_row(states[0][0])
        if around is not None and around.norm is not None:
            self._norm_after = one_row(around.norm)

    def __call__(self, x_BD: Tensor) -> Tensor:
        layer = self._layer
        normed_BD = x_BD if self._norm is None else self._norm(x_BD)
        stream_BD = scaled(normed_BD if layer.adds_to_normed else x_BD, layer.stream_multiplier)
        read_BD = scaled(normed_BD if layer.reads_norm[0] else x_BD, self._factors[0])
        self._handed.read_BD = read_BD if self._canon is None else self._canon(read_BD)
        y_BD = self._step(torch.zeros_like(x_BD))
        if self._norm_after is not None:
            y_BD = self._norm_after(y_BD)
        return stream_BD + scaled(y_BD, self._factors[1])
