"""HybridLM: the language model that an architecture describes. ``x + block(norm(x))`` per layer, embedding and head.

Shapes: B batch, L length, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridnas.arch.arch import Arch, ModelConfig, Node
from hybridnas.arch.decode import Decoder
from hybridnas.blocks.base import Aux, Block, BlockOutput, State, truncated_normal_
from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.kernels.rmsnorm import rms_norm
from hybridnas.registry import BLOCKS

LMState = tuple[State, ...]  # one block state per node, in the order of execution


class LMOutput(NamedTuple):
    """Logits, the next state (None when none was given), auxiliary losses and statistics of all layers."""

    logits_BLV: Tensor
    state: LMState | None
    aux: Aux


class LMHidden(NamedTuple):
    """What the head reads, the next state (None when none was given), auxiliary losses and statistics."""

    x_BLD: Tensor
    state: LMState | None
    aux: Aux


class HybridLM(nn.Module):
    """A causal language model built from an architecture's layers; ``device='meta'`` builds it without memory.

    Weights are drawn from ``seed`` alone. ``impl`` is handed to every block: ``auto`` decides by device.
    """

    def __init__(
        self,
        arch: Arch,
        *,
        impl: str | Impl = Impl.AUTO,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.arch = arch
        config = arch.model
        with torch.random.fork_rng(devices=[]), torch.device(device or "cpu"):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(config.vocab_size, config.d_model)
            modules: dict[str, Block] = {}
            for node in arch.nodes:
                if node.module not in modules:
                    modules[node.module] = BLOCKS.get(node.slot.letter)(node.config, impl=Impl.of(impl))
                    modules[node.module].reset_parameters(config.init_scale)
            self.layers = nn.ModuleList(ResidualLayer(layer, modules, config) for layer in arch.layers)
            self.final_norm: nn.Module | None = make_norm(config) if config.final_norm else None
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
            # The MoE-Mamba code draws the embedding with fan_in = 1 and cuts it at 2 * scale.
            truncated_normal_(self.embedding.weight, 1, config.init_scale)
            truncated_normal_(self.head.weight, config.d_model, config.init_scale)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, ids_BL: Tensor, state: LMState | None = None) -> LMOutput:
        """Return logits for every position; with a state, continue from it and return the next one.

        Raises ConfigError for a state when a block is not causal.
        """
        x_BLD, following, aux = self.hidden(ids_BL, state)
        return LMOutput(self.head(x_BLD), following, aux)

    def hidden(self, ids_BL: Tensor, state: LMState | None = None) -> LMHidden:
        """Return what the head reads, for a loss that computes logits chunk by chunk; otherwise as ``forward``."""
        if state is not None:
            self._need_causal()
        x_BLD = self.embedding(ids_BL)
        given = iter(state) if state is not None else None
        following: list[State] = []
        losses: dict[str, list[Tensor]] = defaultdict(list)
        stats: dict[str, Tensor] = {}
        for layer in self.layers:
            x_BLD, auxes = layer(x_BLD, given, following)
            for where, aux in auxes:
                for name, loss in aux.losses.items():
                    losses[name].append(loss)
                stats.update({f"{where}.{name}": value for name, value in aux.stats.items()})
        if self.final_norm is not None:
            x_BLD = self.final_norm(x_BLD)
        # The mean over the layers that report a loss, as in the MoE-Mamba code: its weight is one per model.
        mean = {name: torch.stack(values).mean() for name, values in losses.items()}
        return LMHidden(x_BLD, tuple(following) if state is not None else None, Aux(mean, stats))

    def init_state(self, batch_size: int = 1) -> LMState:
        """Return the state of ``batch_size`` sequences of which nothing has been read yet."""
        self._need_causal()
        weight = self.embedding.weight
        return tuple(block.init_state(batch_size, device=weight.device, dtype=weight.dtype) for block in self.blocks())

    @torch.no_grad()
    def generate(
        self,
        ids_BL: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        on_token: Callable[[Tensor], bool | None] | None = None,
        prefill_chunk: int = 1024,
    ) -> Tensor:
        """Sample ``max_new_tokens`` after a prompt of any length, token by token from the explicit state.

        Returns ids (B, L + max_new_tokens), fewer when ``on_token(ids_B)`` returns True. Temperature 0 is greedy.
        Memory is constant in the length for recurrent blocks. Raises ConfigError for an empty prompt or bad settings.
        """
        if ids_BL.ndim != 2 or ids_BL.shape[1] == 0:
            raise ConfigError(f"prompt ids must be (batch, at least one token), got shape {tuple(ids_BL.shape)}")
        if max_new_tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1):
            raise ConfigError(f"generate needs {max_new_tokens=} >= 0, {temperature=} >= 0 and {top_k=} >= 1 or None")
        was_training = self.training
        self.eval()
        try:
            return self._generate(
                ids_BL, max_new_tokens, temperature, top_k, seed, on_token or (lambda _: None), prefill_chunk
            )
        finally:
            self.train(was_training)

    def _generate(
        self,
        ids_BL: Tensor,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        seed: int,
        on_token: Callable[[Tensor], bool | None],
        prefill_chunk: int,
    ) -> Tensor:
        generator = torch.Generator(device=ids_BL.device).manual_seed(seed)
        state: LMState | None = self.init_state(ids_BL.shape[0])
        x_BLD = self.embedding(ids_BL[:, :0])
        for chunk_BL in torch.split(ids_BL, prefill_chunk, dim=1):
            x_BLD, state, _ = self.hidden(chunk_BL, state)
        assert state is not None
        logits_BV, decode = self.head(x_BLD[:, -1]), Decoder(self, state)
        pieces = [ids_BL]
        for step in range(max_new_tokens):
            next_B = sample(logits_BV, temperature, top_k, generator)
            pieces.append(next_B[:, None])
            if on_token(next_B) or step == max_new_tokens - 1:
                break
            logits_BV = decode(next_B)
        return torch.cat(pieces, dim=1)

    def blocks(self) -> Iterator[Block]:
        """Every block in the order of execution; a shared one comes once per use."""
        return (block for layer in cast("Iterable[ResidualLayer]", self.layers) for block in layer.blocks())

    def _need_causal(self) -> None:
        for node in self.arch.nodes:
            if not node.config.causal:
                raise ConfigError(
                    f"{node.where} is not causal, so this model has no state to continue from and cannot generate; "
                    f"use a causal setting (for moe: router='switch')"
                )


class ResidualLayer(nn.Module):
    """``x + sum of branches of norm(x)``; the blocks of a branch are applied one after another."""

    def __init__(self, branches: tuple[tuple[Node, ...], ...], modules: dict[str, Block], config: ModelConfig) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.branches = nn.ModuleList(nn.ModuleList(modules[node.module] for node in branch) for branch in branches)
        letters = [node.slot.letter for branch in branches for node in branch]
        self.names = [
            f"layer{branches[0][0].layer:02d}.{letter}{'' if letters.count(letter) == 1 else place}"
            for place, letter in enumerate(letters)
        ]

    def forward(
        self, x_BLD: Tensor, given: Iterator[State] | None, following: list[State]
    ) -> tuple[Tensor, list[tuple[str, Aux]]]:
        normed_BLD = self.norm(x_BLD)
        auxes: list[tuple[str, Aux]] = []
        names = iter(self.names)
        for branch in self.branches:
            y_BLD = normed_BLD
            assert isinstance(branch, nn.ModuleList)
            for block in branch:
                output: BlockOutput = block(y_BLD, next(given) if given is not None else None)
                y_BLD = output.y_BLD
                if output.state is not None:
                    following.append(output.state)
                auxes.append((next(names), output.aux))
            x_BLD = x_BLD + y_BLD
        return x_BLD, auxes

    def blocks(self) -> Iterator[Block]:
        for branch in self.branches:
            assert isinstance(branch, nn.ModuleList)
            for block in branch:
                assert isinstance(block, Block)
                yield block


class _RMSNorm(nn.RMSNorm):
    """RMSNorm by our kernel room: torch's own is several unfused steps on a processor."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps or 0.0)


def make_norm(config: ModelConfig) -> nn.Module:
    """Return the norm that the architecture asks for."""
    if config.norm == "rmsnorm":
        return _RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps)


def sample(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Draw one token id per row: greedy at temperature 0, else from the softmax, cut to the ``top_k`` likeliest."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        threshold_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < threshold_B1, float("-inf"))
    return torch.multinomial(F.softmax(logits_BV, dim=-1), 1, generator=generator)[:, 0]
