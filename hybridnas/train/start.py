"""Where a training starts from: weights that exist, parts of them frozen, adapters around them, another tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hybridnas.arch.model import HybridLM
from hybridnas.config import FrozenConfig, option
from hybridnas.errors import ConfigError
from hybridnas.train.checkpoint import model_tensors

if TYPE_CHECKING:
    from hybridnas.data.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Lora(FrozenConfig):
    """Low-rank adapters (Hu 2021, 2106.09685): each linear layer W gets (alpha / rank) B A, and A and B are trained."""

    rank: int = option(8, "inner width of an adapter [channels]", ge=1)
    alpha: float = option(16.0, "factor of an adapter, times its rank [1]", gt=0)
    layers: tuple[str, ...] = option(
        ("layers.*",), "patterns of names of the linear layers that get one, e.g. [*.in_proj,*.out_proj]"
    )

    @classmethod
    def label(cls) -> str:
        return "lora"

    @classmethod
    def of(cls, given: Lora | Mapping[str, Any] | int) -> Lora:
        """Return the settings as they are, from their fields, or those of a rank."""
        if isinstance(given, Lora):
            return given
        return cls.from_dict({"rank": given} if isinstance(given, int) else given)


def freeze(model: nn.Module, patterns: Sequence[str], *, some_left: bool = True) -> list[str]:
    """Let the parameters whose names match any pattern (``*`` and ``?``) have no gradient; returns their names.

    Raises ConfigError for a pattern that matches nothing, and, with ``some_left``, where nothing is left to train.
    """
    named = dict(model.named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ConfigError(
                f"freeze={pattern!r} is the name of no parameter; use names and * as in 'layers.0.*'",
                field="freeze",
                got=pattern,
                allowed=list(named),
            )
    frozen = [name for name in named if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if some_left and frozen and len(frozen) == len(named):
        raise ConfigError(
            f"freeze={list(patterns)} leaves no parameter to train; freeze fewer of {', '.join(named)[:200]}",
            field="freeze",
            got=list(patterns),
            allowed=list(named),
        )
    for name in frozen:
        named[name].requires_grad_(False)
    return frozen


@contextmanager
def adapted(model: nn.Module, lora: Lora, *, seed: int = 0) -> Iterator[None]:
    """Put adapters around a model's linear layers inside, and take them off again at the end.

    They are drawn from ``seed`` and are nothing at first. Call :func:`fold` inside to keep in the weights what they
    have learnt. All other parameters have no gradient inside. Raises ConfigError without PEFT, and where no linear
    layer has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            f"lora needs the package peft ({error}); run pip install 'hybridnas[peft]'", field="lora", got=lora.rank
        ) from None
    linears = [name for name, part in model.named_modules() if type(part) is nn.Linear]
    chosen = [name for name in linears if any(fnmatchcase(name, pattern) for pattern in lora.layers)]
    if not chosen:
        raise ConfigError(
            f"lora layers={list(lora.layers)} are names of no linear layer; use names and * as in '*.in_proj'",
            field="lora.layers",
            got=list(lora.layers),
            allowed=linears,
        )
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    try:
        yield
    finally:
        for name, part in list(model.named_modules()):
            if hasattr(part, "get_base_layer"):
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, part.get_base_layer())
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
        if hasattr(model, "peft_config"):
            del model.peft_config


def fold(model: nn.Module) -> None:
    """Add to each adapted layer's weight what its adapter adds to its function."""
    for part in model.modules():
        if hasattr(part, "get_base_layer"):
            cast(Any, part).merge()


def with_tokens(
    model: HybridLM, old: Tokenizer | None, new: Tokenizer | None, vocab_size: int, *, seed: int = 0
) -> tuple[HybridLM, int]:
    """Return the model for another vocabulary, and how many of its tokens kept their rows.

    Embedding and head are drawn anew from ``seed``, but for tokens that stand for the same bytes in both tokenizers
    and the token between documents. All other weights are copied.
    """
    found = HybridLM(model.arch.replace(vocab_size=vocab_size), impl=model.impl, seed=seed)
    pairs: list[tuple[int, int]] = []
    if old is not None and new is not None:
        known = {old.token_bytes(token): token for token in range(old.vocab_size) if token != old.separator}
        known.pop(None, None)
        pairs = [
            (known[text], token)
            for token in range(new.vocab_size)
            if token != new.separator and (text := new.token_bytes(token)) in known
        ]
        pairs.append((old.separator, new.separator))
    theirs, ours = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in found.state_dict().items():
            if name in ("embedding.weight", "head.weight"):
                tensor[ours] = own[name][theirs].to(tensor)
            else:
                tensor.copy_(own[name])
    found.lineage = model.lineage
    return found.to(model.embedding.weight.device).train(model.training), len(pairs)


def start_of(model: nn.Module, source: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what identifies the start of a run from given weights: ``source`` (where they are from), what is trained.

    What is frozen or adapted is in it where anything is.
    """
    start: dict[str, Any] = dict(source) if source is not None else {"weights": "given"}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if len(trained) < len(list(model.parameters())):
        start["trained"] = _digest(trained)
    return start


def weights_digest(model: nn.Module) -> str:
    """Return a name of a model's weights: equal for equal weights alone."""
    return tensors_digest(model_tensors(model))


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a name of tensors by name: equal for equal ones alone."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(names).encode()).hexdigest()[:16]
