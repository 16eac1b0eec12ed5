"""HybridLM: the language model that an architecture describes: embedding, residual layers, head.

Shapes: B batch, L length, D d_model, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridnas.arch.arch import Arch
from hybridnas.arch.decode import RowDecoder
from hybridnas.arch.layer import EMBEDDING, ResidualLayer, make_norm, scaled
from hybridnas.arch.padding import RowStates, hidden_of_rows
from hybridnas.errors import ConfigError, TrainingError
from hybridnas.hardware import Impl
from hybridnas.kernels import cross_entropy as loss_kernel
from hybridnas.kernels import rmsnorm as norm_kernel
from hybridnas.kernels._build.waits import shorten_waits
from hybridnas.layers.block import Aux, Block, State, exportable, truncated_normal_
from hybridnas.layers.canon import Canon
from hybridnas.layers.mode import evaluating
from hybridnas.layers.width import WidthRule
from hybridnas.registry import BLOCKS

# One state per block in the order of execution; where a block has a Canon layer, that one's state before the block's.
LMState = tuple[State, ...]
# The package that reads and writes folders of models. It builds models, so it lies above this one: looked up when it
# is needed, as the registry looks up blocks.
_FOLDERS = "hybridnas.export"
_LARGEST_SEED = 2**63 - 1


@exportable
class LMOutput(NamedTuple):
    """What a model returns.

    ``logits`` (B, L, V); ``loss`` [nats per token] where labels were given, without the auxiliary losses, which stay
    in ``aux.losses``; the next ``state`` where one was given; ``aux``: losses and statistics of all layers.
    """

    logits: Tensor
    loss: Tensor | None
    state: LMState | None
    aux: Aux


@exportable
class LMHidden(NamedTuple):
    """What the head reads, the next state (None when none was given), auxiliary losses and statistics."""

    x_BLD: Tensor
    state: LMState | None
    aux: Aux


class HybridLM(nn.Module):
    """A causal language model built from an architecture's layers; ``device='meta'`` builds it without memory.

    Weights are drawn from ``seed`` alone, on ``device``: None leaves that to torch (its default device, or an
    enclosing ``with torch.device(...)``). ``impl`` is handed to every operation that has such a form; the others, and
    all under ``auto``, choose at every call.

    The embedding is drawn with std ``sqrt(init_scale)``, as in the MoE-Mamba code, and the head with
    ``sqrt(init_scale / d_model)``. A tied matrix is drawn as a head is, so that the first logits are small at every
    width; the first layer's norm scales what it reads. (Where the blocks add next to nothing to the residual, as
    routed experts alone do at first, a tied model with a final norm predicts the token that it has just read.)

    Meta tokens (``n_meta_tokens``) are learned vectors that every sequence starts with. An empty state has read them
    already, so that states of all kinds go on from there; there are no logits for them.
    """

    no_decay = ("meta_tokens",)  # read as embeddings are

    def __init__(
        self,
        arch: Arch,
        *,
        impl: str | Impl = Impl.AUTO,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        shorten_waits()
        self.arch = arch
        self.lineage: tuple[Mapping[str, Any], ...] = ()  # one record a graft, the oldest first; exported and read back
        self.impl = Impl.of(impl)
        config = arch.model
        check_seed("model", seed)
        with _drawing_on(device):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(config.vocab_size, config.d_model)
            modules: dict[str, Block] = {}
            for node in arch.nodes:
                if node.module not in modules:
                    block = BLOCKS.get(node.slot.letter)(node.config, impl=self.impl)
                    block.widen()
                    block.reset_parameters(config.init_scale)
                    modules[node.module] = block
            seen: set[str] = set()
            self.layers = nn.ModuleList(ResidualLayer(layer, modules, config, self.impl, seen) for layer in arch.layers)
            self.embedding_norm: nn.Module | None = make_norm(config, self.impl) if config.embedding_norm else None
            self.final_norm: nn.Module | None = make_norm(config, self.impl) if config.final_norm else None
            sizes = config.d_model, config.vocab_size
            cap = config.final_softcap
            self.head = nn.Linear(*sizes, bias=False) if cap is None else SoftcappedHead(*sizes, cap)
            # The MoE-Mamba code draws the embedding with fan_in = 1 and cuts it at 2 * scale.
            embedding_fan_in = config.d_model if config.tie_embeddings else 1
            truncated_normal_(self.embedding.weight, embedding_fan_in, config.init_scale)
            truncated_normal_(self.head.weight, config.d_model, config.init_scale)
            # Drawn last: with and without these, all other weights are those of the seed.
            self.meta_tokens: nn.Parameter | None = None
            if config.n_meta_tokens:
                self.meta_tokens = nn.Parameter(torch.empty(config.n_meta_tokens, config.d_model))
                truncated_normal_(self.meta_tokens, embedding_fan_in, config.init_scale)
            for module in self.modules():
                if isinstance(module, Canon):
                    module.reset_parameters()
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
            self.register_load_state_dict_pre_hook(_refuse_untied)  # type: ignore[no-untyped-call]

    def forward(
        self,
        ids: Tensor,
        labels: Tensor | None = None,
        state: LMState | None = None,
        segments: Tensor | None = None,
    ) -> LMOutput:
        """Return logits for every position of ids (B, L); with a state, continue from it and return the next one.

        ``segments`` (B, L) integers that do not fall along a row: the number of each token's document. Documents that
        are packed into one row give what each gives as a row of its own: no token attends across, no state goes on,
        positions start again from 0, and no label across a document's end counts. Where experts are limited by a
        capacity or choose their tokens, what they do depends on the whole batch, with documents as without.

        ``labels`` (B, L), as in transformers: aligned with ids and shifted here, so that the logits at position t are
        measured against ``labels[:, t + 1]``; -100 counts for nothing. The loss is the mean cross-entropy over what
        counts (0 where nothing does) and nothing else: auxiliary losses stay in ``aux.losses``.

        Raises ConfigError for ids that are not (B, L) integers below the vocabulary's size, for a state when a block
        is not causal, and for segments that fall, have another shape than ids, or come with a state.
        """
        if segments is not None:
            check_segments(ids, segments)
        x_BLD, following, aux = self.hidden(ids, state, segments)
        logits_BLV: Tensor = self.head(x_BLD)
        loss = None if labels is None else self._loss(logits_BLV, labels, segments)
        return LMOutput(logits_BLV, loss, following, aux)

    def hidden(self, ids_BL: Tensor, state: LMState | None = None, segments_BL: Tensor | None = None) -> LMHidden:
        """Return what the head reads, for a loss that computes logits chunk by chunk; otherwise as ``forward``.

        Whether segments fall is looked at on a processor alone: on a GPU it would have to be waited for.
        """
        config = self.arch.model
        if state is not None:
            self._need_causal()
        if segments_BL is not None:
            if state is not None:
                raise ConfigError(
                    "model takes segments or a state, not both: a state is that of one document; read packed "
                    "documents without a state, and a document in pieces without segments",
                    field="segments",
                    got="segments and a state",
                    allowed="one of them",
                )
            check_segments(ids_BL, segments_BL, on_gpu=False)
            self._check_ids(ids_BL)
            if ids_BL.numel() and (self.meta_tokens is not None or not self._keeps_documents_apart):
                x_BLD, aux = hidden_of_rows(self, ids_BL, _numbered(segments_BL))
                return LMHidden(x_BLD, None, aux)
            segments_BL = segments_BL.long() if ids_BL.numel() else None
        x_BLD = scaled(self._embedded(ids_BL), config.embedding_multiplier)
        if self.embedding_norm is not None:
            x_BLD = self.embedding_norm(x_BLD)
        if self.meta_tokens is None or state is not None:
            x_BLD, following, aux = self._through_layers(x_BLD, state, segments_BL)
        else:
            meta_BMD = self.meta_tokens.to(x_BLD.dtype).expand(x_BLD.shape[0], -1, -1)
            x_BLD, following, aux = self._through_layers(torch.cat([meta_BMD, x_BLD], dim=1), state)
            x_BLD = x_BLD[:, config.n_meta_tokens :]
        if self.final_norm is not None:
            x_BLD = self.final_norm(x_BLD)
        # The head is linear: scaling what it reads scales the logits, also where a loss computes them in chunks.
        return LMHidden(scaled(x_BLD, config.logits_multiplier), following, aux)

    def _through_layers(self, x_BLD: Tensor, state: LMState | None, segments_BL: Tensor | None = None) -> LMHidden:
        given = iter(state) if state is not None else None
        following: list[State] = []
        losses: dict[str, list[Tensor]] = defaultdict(list)
        stats: dict[str, Tensor] = {}
        firsts: dict[str, Tensor] = {EMBEDDING: x_BLD}
        for layer in self.layers:
            x_BLD, auxes = layer(x_BLD, given, following, segments_BL, firsts)
            for where, aux in auxes:
                for name, loss in aux.losses.items():
                    losses[name].append(loss)
                stats.update({f"{where}.{name}": value for name, value in aux.stats.items()})
        # The mean over the layers that report a loss, as in the MoE-Mamba code: its weight is one per model.
        mean = {name: torch.stack(values).mean() for name, values in losses.items()}
        return LMHidden(x_BLD, tuple(following) if state is not None else None, Aux(mean, stats))

    def init_state(self, batch_size: int = 1) -> LMState:
        """Return the state of ``batch_size`` sequences of which nothing but the meta tokens has been read yet."""
        self._need_causal()
        weight = self.embedding.weight
        empty = tuple(
            state
            for layer in cast("Iterable[ResidualLayer]", self.layers)
            for state in layer.init_states(batch_size, device=weight.device, dtype=weight.dtype)
        )
        if self.meta_tokens is None:
            return empty
        following = self._through_layers(self.meta_tokens.expand(batch_size, -1, -1), empty).state
        assert following is not None
        return following

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        on_token: Callable[[Tensor], bool | None] | None = None,
        prefill_chunk: int = 1024,
    ) -> Tensor:
        """Sample up to ``max_new_tokens`` after prompts (B, L), token by token from the explicit state.

        ``lengths`` (B,): the prompt of a row is its first so many tokens, at least one; None: all of them. What a row
        draws stands right after its prompt, and the rest of its ids moves behind that.
        ``temperature`` 0 is greedy; ``top_k`` draws among that many likeliest tokens, ``top_p`` among the fewest
        likeliest whose probabilities sum to at least that much (after temperature and ``top_k``). A row that drew one
        of ``eos_token_id`` is finished: ``pad_token_id`` (by default the first of ``eos_token_id``) fills it up.

        Returns ids (B, L + n): n is ``max_new_tokens``, or less when all rows are finished or ``on_token(ids_B)``
        returns True. Memory is constant in the length for recurrent blocks. Weights are read once, at the start.
        Raises ConfigError for an empty prompt or bad settings, TrainingError for logits that are not finite.
        """
        self._check_ids(ids)
        if ids.shape[1] == 0:
            raise ConfigError(
                f"generate ids must be (batch, at least one token), got shape {tuple(ids.shape)}",
                field="ids",
                got=tuple(ids.shape),
                allowed="(B, L) with L >= 1",
            )
        length_B = None if lengths is None else _prompt_lengths(lengths, ids)
        ends = _token_ids(eos_token_id, "eos_token_id", self.arch.vocab_size)
        pad = next(iter(_token_ids(pad_token_id, "pad_token_id", self.arch.vocab_size) or ends), None)
        _check_sampling(max_new_tokens, temperature, top_k, top_p)
        check_seed("generate", seed)
        with evaluating(self):
            generator = torch.Generator(device=ids.device).manual_seed(seed)
            logits_BV, decode = _after_prompts(self, ids, length_B, prefill_chunk)
            _check_finite(logits_BV, "after the prompt")
            finished_B = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
            ends_E = torch.tensor(ends, dtype=ids.dtype, device=ids.device)
            pieces = [ids]
            for step in range(max_new_tokens):
                next_B = _drawn(logits_BV, temperature, top_k, top_p, generator, step).to(ids.dtype)
                if ends:
                    next_B = next_B.masked_fill(finished_B, cast(int, pad))
                    finished_B = finished_B | torch.isin(next_B, ends_E)
                pieces.append(next_B[:, None])
                stop = on_token(next_B) if on_token is not None else False
                if stop or step == max_new_tokens - 1 or (ends and bool(finished_B.all())):
                    break
                logits_BV = decode(next_B)
            drawn_BL = torch.cat(pieces, dim=1)
            return drawn_BL if length_B is None else _closed_up(drawn_BL, length_B, ids.shape[1])

    @torch.no_grad()
    def after_step(self, counts: Mapping[str, Tensor]) -> None:
        """Let every block update what it learns without gradients, such as the balance of routed experts.

        A training loop calls it once after each optimizer step. ``counts``: the statistics of integers in
        ``aux.stats``, under their full names, summed over the forward passes (and ranks) of the step.
        """
        own: dict[Block, dict[str, Tensor]] = defaultdict(dict)
        for layer in cast("Iterable[ResidualLayer]", self.layers):
            for where, block in zip(layer.names, layer.blocks(), strict=True):
                for name in [name for name in counts if name.startswith(f"{where}.")]:
                    key = name.removeprefix(f"{where}.")
                    own[block][key] = own[block].get(key, 0) + counts[name]
        for block, found in own.items():
            block.after_step(found)

    def width_rules(self, base_width: int) -> dict[str, WidthRule]:
        """Return how the head is drawn and trained: its logits keep their size at every width."""
        growth = self.arch.d_model / base_width
        # A tied matrix is read as an embedding, too, whose size must not fall below the norms' epsilon.
        return {"head.weight": WidthRule(rate=1 / growth, init=1.0 if self.arch.model.tie_embeddings else growth**-0.5)}

    def blocks(self) -> Iterator[Block]:
        """Every block in the order of execution; a shared one comes once per use."""
        return (block for layer in cast("Iterable[ResidualLayer]", self.layers) for block in layer.blocks())

    def implementations(self, device: torch.device | str | None = None) -> dict[str, dict[str, str]]:
        """Return what computes the model on a device (by default its own): block name -> operation -> words.

        Beside the blocks there are ``norm``, ``loss``, and ``canon`` where the model has Canon layers.
        """
        where = torch.device(device) if device is not None else self.embedding.weight.device
        found = {block.name: block.implementations(where) for block in self.blocks()}
        for canon in (module for module in self.modules() if isinstance(module, Canon)):
            found["canon"] = canon.implementations(where)
        norm, loss = (
            kernel.OPERATION.describe(where, impl=kernel.OPERATION.nearest(self.impl))
            for kernel in (norm_kernel, loss_kernel)
        )
        return {**found, "norm": {self.arch.model.norm: norm}, "loss": {"cross_entropy": loss}}

    @property
    def loss_impl(self) -> Impl:
        """The implementation that computes this model's loss: ``impl``, or auto where a loss has no such form."""
        return loss_kernel.OPERATION.nearest(self.impl)

    def save_pretrained(
        self, folder: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **settings: Any
    ) -> Path:
        """Write the model as a folder that ``from_pretrained`` reads, and return its absolute path.

        ``settings`` are those of :func:`hybridnas.export.folder.export`: ``tokenizer``, ``card`` and others. With
        ``push_to_hub`` it is uploaded too, to ``repo_id`` or a repository of the folder's name.
        """
        found: Path = _folders("folder").export(self, folder, **settings)
        if push_to_hub:
            self.push_to_hub(repo_id or found.name, **settings)
        return found

    @classmethod
    def from_pretrained(cls, folder_or_repo: str | Path, **settings: Any) -> HybridLM:
        """Return the model of an exported folder, or of a repository on the Hugging Face Hub, in evaluation mode.

        ``settings`` are those of :func:`hybridnas.export.load.load`: ``device``, ``impl``, ``revision`` and others.
        """
        found: HybridLM = _folders("load").load(folder_or_repo, **settings)
        return found

    def push_to_hub(self, repo_id: str, **settings: Any) -> str:
        """Upload what ``save_pretrained`` writes to a repository on the Hugging Face Hub; returns the commit's URL.

        ``settings`` are those of :func:`hybridnas.export.hub.push_to_hub`: ``private``, ``token`` and others.
        """
        found: str = _folders("hub").push_to_hub(self, repo_id, **settings)
        return found

    @property
    def _keeps_documents_apart(self) -> bool:
        """Whether every block takes segments, or treats each token by itself."""
        return all(block.takes_segments or block.role == "feed_forward" for block in self.blocks())

    def _loss(self, logits_BLV: Tensor, labels: Tensor, segments: Tensor | None) -> Tensor:
        if labels.shape != logits_BLV.shape[:2]:
            raise ConfigError(
                f"model labels must have the shape of ids {tuple(logits_BLV.shape[:2])}, got {tuple(labels.shape)}; "
                f"give labels=ids, they are shifted inside",
                field="labels",
                got=tuple(labels.shape),
                allowed=tuple(logits_BLV.shape[:2]),
            )
        mask_BL = None if segments is None else segments[:, 1:] == segments[:, :-1]
        return loss_kernel.cross_entropy(logits_BLV[:, :-1], labels[:, 1:], mask=mask_BL, impl=self.loss_impl)

    def _embedded(self, ids_BL: Tensor) -> Tensor:
        self._check_ids(ids_BL)
        if torch.compiler.is_compiling():
            x_BLD: Tensor = self.embedding(ids_BL)
            return x_BLD
        try:
            x_BLD = self.embedding(ids_BL)
        except IndexError:  # torch looks at every id anyway on a processor, so asking first would be double work
            low, high = int(ids_BL.min()), int(ids_BL.max())
            raise ConfigError(
                f"model ids must be 0 to {self.arch.vocab_size - 1}, got ids from {low} to {high}; "
                f"use the tokenizer that the model was trained with",
                field="ids",
                got=(low, high),
                allowed=f"0 to {self.arch.vocab_size - 1}",
            ) from None
        return x_BLD

    def _check_ids(self, ids_BL: Tensor) -> None:
        if not isinstance(ids_BL, Tensor) or ids_BL.ndim != 2 or ids_BL.dtype not in (torch.int64, torch.int32):
            is_tensor = isinstance(ids_BL, Tensor)
            got = f"{tuple(ids_BL.shape)} {ids_BL.dtype}" if is_tensor else type(ids_BL).__name__
            raise ConfigError(
                f"model ids must be a tensor (B, L) of integers 0 to {self.arch.vocab_size - 1}, got {got}; "
                f"for one sequence give ids[None], and cast by .long()",
                field="ids",
                got=got,
                allowed="(B, L) int64 or int32",
            )

    def _need_causal(self) -> None:
        for node in self.arch.nodes:
            if not node.config.causal:
                raise ConfigError(
                    f"{node.where} is not causal, so this model has no state to continue from and cannot generate; "
                    f"use a causal setting (for moe: router='switch')",
                    field=f"layer {node.layer}",
                    got=f"{node.slot.letter} {BLOCKS.get(node.slot.letter).name}",
                    allowed="causal blocks",
                )


class SoftcappedHead(nn.Linear):
    """A linear head whose logits are ``cap * tanh(logits / cap)`` (Gemma 2, RecurrentGemma)."""

    def __init__(self, d_model: int, vocab_size: int, cap: float) -> None:
        super().__init__(d_model, vocab_size, bias=False)
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        return self.cap * torch.tanh(super().forward(x) / self.cap)


def sample(
    logits_BV: Tensor,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
    *,
    top_p: float | None = None,
) -> Tensor:
    """Draw one token id per row: greedy at temperature 0, else from the softmax of what ``top_k`` and ``top_p`` leave.

    ``top_p`` leaves the fewest likeliest tokens whose probabilities, after temperature and ``top_k``, sum to at least
    ``top_p``; the likeliest always stays.
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        threshold_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < threshold_B1, float("-inf"))
    probs_BV = F.softmax(logits_BV, dim=-1)
    if top_p is not None and top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV  # probability of all likelier tokens
        keep_BV = (before_BV < top_p).index_fill(-1, torch.zeros(1, dtype=torch.long, device=probs_BV.device), True)
        probs_BV = probs_BV.masked_fill(~torch.zeros_like(keep_BV).scatter(-1, order_BV, keep_BV), 0.0)
    return torch.multinomial(probs_BV, 1, generator=generator)[:, 0]


def _drawn(
    logits_BV: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
    step: int,
) -> Tensor:
    try:
        return sample(logits_BV, temperature, top_k, generator, top_p=top_p)
    except RuntimeError:  # torch.multinomial refuses probabilities that are not numbers
        _check_finite(logits_BV, f"after {step} new tokens")
        raise


def _after_prompts(
    model: HybridLM, ids_BL: Tensor, length_B: Tensor | None, prefill_chunk: int
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the logits (B, V) after each row's prompt, and what gives those after one more token (B,)."""
    states = RowStates(model, ids_BL.shape[0])
    if length_B is None:
        x_BLD = model.embedding(ids_BL[:, :0])
        for chunk_BL in torch.split(ids_BL, prefill_chunk, dim=1):
            x_BLD = states.read(model, chunk_BL)
        return model.head(x_BLD[:, -1]), RowDecoder(model, states)
    last_BD = model.embedding.weight.new_zeros(ids_BL.shape[0], model.arch.d_model)
    for start in range(0, int(length_B.max()), prefill_chunk):
        chunk_BL = ids_BL[:, start : start + prefill_chunk]
        left_B = length_B - start
        x_BLD = states.read(model, chunk_BL, torch.arange(chunk_BL.shape[1], device=ids_BL.device) < left_B[:, None])
        ending_R = ((left_B > 0) & (left_B <= chunk_BL.shape[1])).nonzero()[:, 0]
        last_BD = last_BD.to(x_BLD.dtype).index_copy(0, ending_R, x_BLD[ending_R, left_B[ending_R] - 1])
    return model.head(last_BD), RowDecoder(model, states)


def _closed_up(ids_BL: Tensor, length_B: Tensor, columns: int) -> Tensor:
    """Return the rows with what stands between a prompt and column ``columns`` moved to the end."""
    place_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)
    padding_BL = (place_BL >= length_B[:, None]) & (place_BL < columns)
    return ids_BL.gather(1, padding_BL.to(torch.int8).argsort(dim=1, stable=True))


def _prompt_lengths(lengths: Tensor | Sequence[int], ids_BL: Tensor) -> Tensor:
    length_B = torch.as_tensor(lengths, device=ids_BL.device)
    whole = length_B.dtype in (torch.int64, torch.int32) and length_B.shape == ids_BL.shape[:1]
    if not whole or bool(((length_B < 1) | (length_B > ids_BL.shape[1])).any()):
        allowed = f"{ids_BL.shape[0]} integers from 1 to {ids_BL.shape[1]}"
        got = length_B.tolist()
        raise ConfigError(
            f"generate lengths={got} must be {allowed}, one for each row of ids",
            field="lengths",
            got=got,
            allowed=allowed,
        )
    return length_B


def _check_finite(logits_BV: Tensor, where: str) -> None:
    if not bool(torch.isfinite(logits_BV).all()):
        raise TrainingError(
            f"generate cannot draw a token: the logits {where} are not finite, since weights hold NaN or infinity or "
            f"grew too large; load weights from before the training diverged",
            field="logits",
            got="NaN or infinity",
            allowed="finite numbers",
        )


def _check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    checks: tuple[tuple[str, Any, bool, str], ...] = (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, ">= 0"),
        ("temperature", temperature, temperature >= 0, ">= 0"),
        ("top_k", top_k, top_k is None or top_k >= 1, ">= 1 or None"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1, or None"),
    )
    for name, got, fine, allowed in checks:
        if not fine:
            raise ConfigError(f"generate {name}={got!r} must be {allowed}", field=name, got=got, allowed=allowed)


def _token_ids(given: int | Sequence[int] | None, name: str, vocab_size: int) -> list[int]:
    ids = [] if given is None else [given] if isinstance(given, int) else [int(one) for one in given]
    for one in ids:
        if not 0 <= one < vocab_size:
            allowed = f"0 to {vocab_size - 1}"
            raise ConfigError(f"generate {name}={one} must be {allowed}", field=name, got=one, allowed=allowed)
    return ids


def check_segments(ids_BL: Tensor, segments: Tensor, *, on_gpu: bool = True) -> None:
    """Raise ConfigError for segments that are not integers of the shape of ids, or that fall.

    ``on_gpu``: look at the numbers on a GPU, too, which waits for it.
    """
    is_tensor = isinstance(segments, Tensor)
    whole = is_tensor and not segments.is_floating_point() and segments.dtype != torch.bool
    if not whole or segments.shape != ids_BL.shape:
        got = f"{tuple(segments.shape)} {segments.dtype}" if is_tensor else type(segments).__name__
        allowed = f"{tuple(ids_BL.shape)} integers"
        raise ConfigError(
            f"model segments must be the number of each id's document, a tensor of {allowed}, got {got}; number the "
            f"documents of each row from 0 up",
            field="segments",
            got=got,
            allowed=allowed,
        )
    if torch.compiler.is_compiling() or not (on_gpu or segments.device.type == "cpu"):
        return
    falls_BL = segments[:, 1:] < segments[:, :-1]
    if bool(falls_BL.any()):
        row, place = falls_BL.nonzero()[0].tolist()
        where = f"row {row}, position {place + 1}"
        before, after = segments[row, place : place + 2].tolist()
        raise ConfigError(
            f"model segments must not fall along a row, got {after} after {before} at {where}; "
            f"number the documents of each row from 0 up",
            field="segments",
            got=(before, after),
            allowed="numbers that do not fall",
        )


def _numbered(segments_BL: Tensor) -> Tensor:
    """Return the number of each token's document in its row, from 1."""
    starts_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    starts_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    return starts_BL.long().cumsum(dim=1)


def check_seed(where: str, seed: int) -> None:
    """Raise ConfigError for a seed that torch's generators do not take."""
    if not 0 <= seed <= _LARGEST_SEED:
        allowed = "0 to 2**63 - 1"
        raise ConfigError(f"{where} seed={seed} must be {allowed}", field="seed", got=seed, allowed=allowed)


def _refuse_untied(
    model: HybridLM,
    state_dict: Mapping[str, Any],
    prefix: str,
    metadata: object,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Report a state dict whose embedding and head differ, of which a tied model would silently keep the head."""
    embedding, head = (state_dict.get(f"{prefix}{name}.weight") for name in ("embedding", "head"))
    if embedding is not None and head is not None and not torch.equal(embedding, head):
        errors.append(
            f"{prefix}embedding.weight and {prefix}head.weight differ, but this model ties them; "
            f"load weights of a tied model, or build the model with tie_embeddings=False"
        )


@contextlib.contextmanager
def _drawing_on(device: torch.device | str | None) -> Iterator[None]:
    """Draw inside from a generator that can be seeded, on a device or where torch's own context says."""
    around = contextlib.nullcontext() if device is None else torch.device(device)
    with around:
        target = torch.get_default_device()
        with torch.random.fork_rng(devices=[target] if target.type == "cuda" else []):
            yield


def _folders(module: str) -> Any:
    return importlib.import_module(f"{_FOLDERS}.{module}")
