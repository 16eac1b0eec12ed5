"""Growth: a larger model that computes what a smaller one does, to begin a large training where a small one ended.

Width: every channel of the residual stream is repeated r times, so that norms see the same mean and variance; what
reads the stream has its weights shared out over the copies, unevenly, so that these learn apart (Net2Net, 1511.05641).
Depth, and the blocks' own widths: as in a graft, layers that add nothing and channels that nothing reads yet.

Whether the function is preserved is measured on random ids in float64. Shapes: D d_model, r factor.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from hybridnas.arch.arch import Arch
from hybridnas.arch.layer import ResidualLayer
from hybridnas.arch.model import HybridLM
from hybridnas.arch.pattern import Pattern, Slot
from hybridnas.errors import ConfigError
from hybridnas.grafting.config import GraftConfig
from hybridnas.grafting.operation import transplant
from hybridnas.layers.block import Block

_UNEVEN = 0.25  # shares of a channel's copies lie this far around even ones, in units of them


@dataclass(frozen=True)
class Grown:
    """A grown model, the largest difference of its logits from the smaller one's over the largest logit, and notes."""

    model: HybridLM
    difference: float
    notes: list[str] = field(default_factory=list)


def grow(model: HybridLM, arch: Arch, *, seed: int = 0) -> Grown:
    """Return a model of ``arch`` that begins as ``model``, and how far its function is from that one's.

    ``arch`` may be wider by a whole factor, deeper, and have wider blocks. Raises ConfigError for a width that is no
    multiple, and for what around the blocks differs.
    """
    small, large = model.arch.d_model, arch.d_model
    if large % small:
        raise ConfigError(
            f"train grow: d_model={large} is no multiple of the smaller model's {small}, so that no norm would see the "
            f"same numbers; use {small * max(1, large // small)} or {small * (large // small + 1)}",
            field="d_model",
            got=large,
            allowed=f"a multiple of {small}",
        )
    for name, value in model.arch.model.to_dict().items():
        if name != "d_model" and getattr(arch.model, name) != value:
            got = getattr(arch.model, name)
            raise ConfigError(
                f"train grow: {name}={got} is not the smaller model's {value}, which growth does not change",
                field=name,
                got=got,
                allowed=value,
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wide = model if large == small else _widened(model, large // small)
    found = transplant(wide, arch, None, GraftConfig(init="copy", seed=seed, noise=0.0))
    record = {**found.record, "grown": True, "parent": {**found.record["parent"], "pattern": str(model.arch.pattern)}}
    found.model.lineage = (*model.lineage, record)
    return Grown(found.model, difference(model, found.model), found.notes)


@torch.no_grad()
def difference(small: HybridLM, large: HybridLM) -> float:
    """Return the largest difference of two models' logits on random ids over the largest logit, in float64."""
    ids_BL = torch.randint(small.arch.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    ours, theirs = (copy.deepcopy(model).to("cpu", torch.float64).eval()(ids_BL).logits for model in (small, large))
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-30))


@torch.no_grad()
def _widened(model: HybridLM, factor: int) -> HybridLM:
    """Return the model with every channel of the stream ``factor`` times; its blocks keep their inner widths."""
    pattern = Pattern(tuple(_pinned(model, at) for at in range(len(model.arch.pattern))))
    fields = {**model.arch.model.to_dict(), "d_model": factor * model.arch.d_model}
    wide = HybridLM(Arch.from_pattern(str(pattern), **fields), impl=model.impl)
    wide = wide.to(model.embedding.weight.device, model.embedding.weight.dtype)
    wide.embedding.weight.copy_(model.embedding.weight.repeat(1, factor))
    if not model.arch.model.tie_embeddings:
        wide.head.weight.copy_(_shared_out(model.head.weight, wide.head.weight))
    for small_norm, wide_norm in ((model.final_norm, wide.final_norm), (model.meta_tokens, wide.meta_tokens)):
        _repeat(small_norm, wide_norm)
    for one, other in zip(model.layers, wide.layers, strict=True):
        ours, theirs = cast(ResidualLayer, one), cast(ResidualLayer, other)
        _repeat(ours.norm, theirs.norm)
        _repeat(ours.around, theirs.around)
        for block, wider in zip(ours.blocks(), theirs.blocks(), strict=True):
            _widen_block(block, wider)
    return wide.eval()


def _pinned(model: HybridLM, at: int) -> Any:
    """Return a layer of the pattern with the sizes that its blocks have now written out."""
    nodes = {(node.branch, node.position): node for branch in model.arch.layers[at] for node in branch}

    def slot(branch: int, position: int) -> Slot:
        node = nodes[branch, position]
        own = node.config.to_dict()
        resolved = {name: value for name, value in node.config.canonical().items() if name in own}
        fresh = type(node.config)(d_model=node.config.d_model).to_dict()
        sizes = {name: value for name, value in {**own, **resolved}.items() if name != "d_model"}
        args = {name: value for name, value in sizes.items() if value != fresh[name]}
        return Slot(node.slot.letter, tuple(sorted((k, _text(v)) for k, v in args.items())), node.slot.share)

    layer = model.arch.pattern.layers[at]
    if isinstance(layer, Slot):
        return slot(0, 0)
    branches = [tuple(slot(b, p) for p, _ in enumerate(branch)) for b, branch in enumerate(layer.branches)]
    return type(layer)(tuple(branches))


def _text(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _repeat(small: nn.Module | Tensor | None, wide: nn.Module | Tensor | None) -> None:
    """Fill what has a number for each channel of the stream: norms, convolutions of channels, meta tokens."""
    if small is None or wide is None:
        return
    if isinstance(small, Tensor) or isinstance(wide, Tensor):
        pairs = [(cast(Tensor, small), cast(Tensor, wide))]
    else:
        pairs = list(zip(small.state_dict().values(), wide.state_dict().values(), strict=True))
    for ours, theirs in pairs:
        theirs.copy_(ours.repeat(*(b // a for a, b in zip(ours.shape, theirs.shape, strict=True))))


def _widen_block(block: Block, wide: Block) -> None:
    ours, theirs = block.state_dict(), wide.state_dict()
    shapes = [{name: tensor.ndim for name, tensor in found.items()} for found in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"train grow: {block.name} has other weights at another width of the stream, so that its widths cannot be "
            f"mapped; give it an inner width, or keep d_model={block.config.d_model}",
            field="d_model",
            got=wide.config.d_model,
            allowed=block.config.d_model,
        )
    for name, tensor in ours.items():
        writes = any(name == output or name.startswith((f"{output}.", f"{output}_")) for output in block.outputs)
        target = theirs[name]
        times = [b // a for a, b in zip(tensor.shape, target.shape, strict=True)]
        repeated = writes or tensor.ndim == 1 or max(times) == 1  # vectors hold a number for each channel
        target.copy_(tensor.repeat(*times) if repeated else _shared_out(tensor, target))


def _shared_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Return weights that read a repeated stream: the copies of a channel add up to what it was read with."""
    times = [b // a for a, b in zip(tensor.shape, like.shape, strict=True)]
    dim = max(range(tensor.ndim), key=lambda d: times[d])
    factor = times[dim]
    uneven = 1 + _UNEVEN * (2 * torch.rand(factor, *tensor.shape, dtype=tensor.dtype, device=tensor.device) - 1)
    return torch.cat(list(uneven / uneven.sum(0) * tensor), dim=dim)
