"""One residual layer: norms, multipliers and convolutions around its blocks, and the sum of its branches.

A layer without options is ``x + sum of branches of norm(x)``. The options are fields of every block's config
(``hybridnas.layers.block.AROUND``), so that a model, a letter or a slot of the pattern sets them.

Shapes: B batch, L length, D d_model, K taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from hybridnas.arch.arch import ModelConfig, Node
from hybridnas.hardware import Impl
from hybridnas.layers.block import Aux, Block, BlockOutput, State
from hybridnas.layers.canon import Canon
from hybridnas.layers.norms import NORMS

EMBEDDING = "embedding"  # beside the letters, which have one character


def make_norm(config: ModelConfig, impl: Impl = Impl.AUTO) -> nn.Module:
    """Return the norm that the architecture asks for."""
    return NORMS[config.norm](config.d_model, eps=config.norm_eps, impl=impl)


class Around(nn.Module):
    """What stands around one block at its place: ``x -> out * norm(block(canon(in * x)))``, each part where asked for.

    It belongs to the layer and not to the block: a block that several layers share has one in each.
    """

    def __init__(self, node: Node, config: ModelConfig, impl: Impl) -> None:
        super().__init__()
        own = node.config
        self.in_multiplier, self.out_multiplier = own.in_multiplier, own.out_multiplier
        self.canon = Canon(own.d_model, own.canon, impl=impl) if own.canon else None
        self.norm = make_norm(config, impl) if node.norm_after else None

    @property
    def idle(self) -> bool:
        """Whether the block stands alone, all options at their defaults."""
        return self.canon is None and self.norm is None and self.in_multiplier == self.out_multiplier == 1.0

    def before(
        self, x_BLD: Tensor, state_BKD: Tensor | None, segments_BL: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the block reads, and the next state of the convolution, where there is one."""
        x_BLD = scaled(x_BLD, self.in_multiplier)
        return (x_BLD, None) if self.canon is None else self.canon(x_BLD, state_BKD, segments_BL)

    def after(self, y_BLD: Tensor) -> Tensor:
        """Return what the block adds to the residual stream, or what the next block of its branch reads."""
        return scaled(y_BLD if self.norm is None else self.norm(y_BLD), self.out_multiplier)


class ResidualLayer(nn.Module):
    """The residual stream plus the sum of branches; the blocks of a branch are applied one after another."""

    def __init__(
        self,
        branches: tuple[tuple[Node, ...], ...],
        modules: dict[str, Block],
        config: ModelConfig,
        impl: Impl = Impl.AUTO,
        seen: set[str] | None = None,
    ) -> None:
        """Build the layer of these nodes; ``seen``: modules of earlier layers, to which its own are added."""
        super().__init__()
        seen = set() if seen is None else seen
        nodes = [node for branch in branches for node in branch]
        self.norm = make_norm(config, impl) if any(node.norm_before for node in nodes) else None
        self.branches = nn.ModuleList(nn.ModuleList(modules[node.module] for node in branch) for branch in branches)
        around = {f"{node.branch}_{node.position}": Around(node, config, impl) for node in nodes}
        self.around = nn.ModuleDict({place: own for place, own in around.items() if not own.idle})
        self.own = nn.ModuleDict()  # place -> weights beside those that it shares with an earlier layer
        for node in nodes:
            own = modules[node.module].own_weights(config.init_scale) if node.module in seen else None
            if own is not None:
                self.own[f"{node.branch}_{node.position}"] = own
            seen.add(node.module)
        self.reads_norm = [branch[0].norm_before for branch in branches]
        self.adds_to_normed = nodes[0].config.norm_position == "stream"
        self.stream_multiplier = nodes[0].config.stream_multiplier
        letters = [node.slot.letter for node in nodes]
        self.names = [
            f"layer{branches[0][0].layer:02d}.{letter}{'' if letters.count(letter) == 1 else place}"
            for place, letter in enumerate(letters)
        ]

    @property
    def plain(self) -> bool:
        """Whether the layer is ``x + sum of branches of norm(x)``, without options."""
        stream = self.adds_to_normed or self.stream_multiplier != 1.0
        return all(self.reads_norm) and not stream and not self.around

    def forward(
        self,
        x_BLD: Tensor,
        given: Iterator[State] | None,
        following: list[State],
        segments_BL: Tensor | None = None,
        firsts: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, list[tuple[str, Aux]]]:
        """Return the stream after the layer, and each block's extras by its name.

        ``given`` yields the states in the order of ``init_states`` and the next ones are appended to ``following``.
        ``segments_BL``: the number of each token's document; blocks that take it get it.
        ``firsts``: letter -> what its first block hands to the later ones, for these tokens, to which the layer adds;
        and ``EMBEDDING`` -> what the first layer reads.
        """
        normed_BLD = x_BLD if self.norm is None else self.norm(x_BLD)
        total_BLD = scaled(normed_BLD if self.adds_to_normed else x_BLD, self.stream_multiplier)
        auxes: list[tuple[str, Aux]] = []
        names = iter(self.names)
        for number, branch in enumerate(self.branches):
            y_BLD = normed_BLD if self.reads_norm[number] else x_BLD
            for position, block in enumerate(cast(nn.ModuleList, branch)):
                around = self.around_of(number, position)
                if around is not None:
                    before = None if given is None or around.canon is None else next(given)[0]
                    y_BLD, after = around.before(y_BLD, before, segments_BL)
                    if after is not None:
                        following.append((after,))
                beside: dict[str, Tensor | nn.Module | None] = {}
                if segments_BL is not None and block.takes_segments:
                    beside["segments_BL"] = segments_BL
                if firsts is not None and block.takes_first:
                    beside["first_BLX"] = firsts.get(cast(Block, block).letter)
                if firsts is not None and block.takes_embedding:
                    beside["embedding_BLD"] = firsts[EMBEDDING]
                if (place := f"{number}_{position}") in self.own:
                    beside["own"] = self.own[place]
                output: BlockOutput = block(y_BLD, next(given) if given is not None else None, **beside)
                if firsts is not None and output.aux.first is not None:
                    firsts.setdefault(cast(Block, block).letter, output.aux.first)
                y_BLD = output.y_BLD if around is None else around.after(output.y_BLD)
                if output.state is not None:
                    following.append(output.state)
                auxes.append((next(names), output.aux))
            total_BLD = total_BLD + y_BLD
        return total_BLD, auxes

    def init_states(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Iterator[State]:
        """Yield the empty state of each block, in the order of execution, after that of its convolution."""
        for number, branch in enumerate(self.branches):
            for position, block in enumerate(cast(nn.ModuleList, branch)):
                around = self.around_of(number, position)
                if around is not None and around.canon is not None:
                    yield (around.canon.init_state(batch_size, device=device, dtype=dtype),)
                yield cast(Block, block).init_state(batch_size, device=device, dtype=dtype)

    def around_of(self, branch: int, position: int) -> Around | None:
        """Return what stands around a block, None where nothing does."""
        place = f"{branch}_{position}"
        return cast(Around, self.around[place]) if place in self.around else None

    def blocks(self) -> Iterator[Block]:
        """Every block of the layer in the order of execution."""
        for branch in self.branches:
            for block in cast(nn.ModuleList, branch):
                yield cast(Block, block)


def scaled(x: Tensor, factor: float) -> Tensor:
    """Return ``factor * x``; x itself where the factor is 1."""
    return x if factor == 1.0 else x * factor
