"""Coordinate checks: how the size of activations, and of what a few steps change in them, grows with width.

Under a parametrization that lets one learning rate serve all widths both stay of one size (Yang et al. 2022,
2203.03466, appendix D.1): the slope of their logarithm over that of the width is near 0. Each letter is measured
alone, two layers of it, with one rate for all weights (``none``) and with ``rate_scaling=mup``.

Shapes: B batch, L length, D d_model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.result import Result, Table
from hybridnas.data.source import Batch
from hybridnas.layers.block import Block
from hybridnas.registry import BLOCKS
from hybridnas.train.config import TrainConfig
from hybridnas.train.objective import Objective
from hybridnas.train.optim import make_optimizer
from hybridnas.train.scaling import scale_weights

SCALINGS = ("none", "mup")
WIDTHS = (32, 64, 128, 256)
_VOCAB, _BATCH, _LENGTH = 64, 8, 32
_STEPS = 4  # enough for every weight to have moved and been moved upon
_LR = 0.01


class Sizes(NamedTuple):
    """Root mean squares over all entries, of the blocks' outputs (their mean) and of the logits."""

    blocks_before: float
    blocks_change: float
    logits_before: float
    logits_change: float


def measured(letter: str, width: int, scaling: str, *, seeds: Sequence[int] = (0,), base_width: int = 32) -> Sizes:
    """Return the sizes before training, and of what a few steps change, as means over seeds."""
    found = [_one(letter, width, scaling, seed, base_width) for seed in seeds]
    return Sizes(*(sum(values) / len(found) for values in zip(*found, strict=True)))


def slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """Return the power of the width that the sizes follow: the slope of a least-squares line, both logarithmic."""
    x = [math.log(width) for width in widths]
    y = [math.log(size) for size in sizes]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def _one(letter: str, width: int, scaling: str, seed: int, base_width: int) -> Sizes:
    config = TrainConfig(lr=_LR, weight_decay=0.0, rate_scaling=scaling, base_width=base_width, seed=seed)
    fields = {"n_experts": 4} if "n_experts" in BLOCKS.get(letter).Config.field_names() else {}
    arch = Arch.from_pattern(letter * 2, d_model=width, vocab_size=_VOCAB, final_norm=True, **fields)
    with torch.random.fork_rng(devices=[]):
        model = HybridLM(arch, seed=seed)
        scale_weights(model, config)
        objective = Objective(model)
        optimizer = make_optimizer(objective, config)
        probe = _batch(seed, 0)
        before = _activations(model, probe.inputs_BL)
        for step in range(1, _STEPS + 1):
            batch = _batch(seed, step)
            loss = objective(batch)
            optimizer.zero_grad()
            (loss.total / batch.targets_BL.numel() + sum(loss.losses.values(), start=torch.zeros(()))).backward()
            optimizer.step()
        after = _activations(model, probe.inputs_BL)
    sizes = [(_rms(old), _rms(new - old)) for old, new in zip(before, after, strict=True)]
    before_blocks, change_blocks = (sum(values) / (len(sizes) - 1) for values in zip(*sizes[:-1], strict=True))
    return Sizes(before_blocks, change_blocks, *sizes[-1])


@torch.no_grad()
def _activations(model: HybridLM, ids_BL: Tensor) -> list[Tensor]:
    """Return what each block adds to the residual stream, then the logits."""
    kept: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: kept.append(output.y_BLD))
        for module in model.modules()
        if isinstance(module, Block)
    ]
    kept.append(model(ids_BL).logits)
    for hook in hooks:
        hook.remove()
    return kept


def _batch(seed: int, step: int) -> Batch:
    """Return sequences that count by 1 or 3, modulo the vocabulary."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    start_B1 = torch.randint(_VOCAB, (_BATCH, 1), generator=generator)
    stride_B1 = 1 + 2 * torch.randint(2, (_BATCH, 1), generator=generator)
    ids_BL = (start_B1 + stride_B1 * torch.arange(_LENGTH + 1)) % _VOCAB
    return Batch(ids_BL[:, :-1], ids_BL[:, 1:])


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def run(config: BenchConfig) -> Result:
    """Measure every letter at widths 32 to 256 with both parametrizations; draws what the steps changed."""
    result = Result("coordinates")
    widths = config.pick(WIDTHS, WIDTHS, WIDTHS[:2])
    seeds = range(config.pick(3, 1, 1))
    found = {
        (letter, scaling): [measured(letter, width, scaling, seeds=seeds) for width in widths]
        for letter in BLOCKS
        for scaling in SCALINGS
    }
    title = (
        f"coordinates: powers of the width after {_STEPS} steps at rate {_LR} (base width 32); 0 is one size for all"
    )
    columns = ("letter", "block", "rate_scaling", *Sizes._fields)
    rows = [
        [letter, BLOCKS.get(letter).name, scaling, *(round(slope(widths, one), 3) for one in zip(*sizes, strict=True))]
        for (letter, scaling), sizes in found.items()
    ]
    result.tables.append(Table(title, columns, rows))
    sizes = [
        [letter, scaling, width, *one]
        for (letter, scaling), own in found.items()
        for width, one in zip(widths, own, strict=True)
    ]
    result.tables.append(Table("coordinates: sizes", ("letter", "rate_scaling", "width", *Sizes._fields), sizes))
    target = config.beside(".png")
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        draw(widths, found, str(target))
        result.files.append(str(target))
    return result


def draw(widths: Sequence[int], found: dict[tuple[str, str], list[Sizes]], target: str) -> None:
    """Draw what the steps changed in blocks and logits against width, logarithmic both ways, a line a letter."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for row, (name, words) in enumerate((("blocks_change", "blocks' outputs"), ("logits_change", "logits"))):
        for column, scaling in enumerate(SCALINGS):
            one = axes[row][column]
            for number, letter in enumerate(BLOCKS):
                values = [getattr(sizes, name) for sizes in found[letter, scaling]]
                one.plot(widths, values, marker="o", markersize=3, color=f"C{number}", label=letter)
            one.set_xscale("log", base=2)
            one.set_yscale("log")
            one.set_xticks(widths, [str(width) for width in widths])
            one.set_title(f"rate_scaling={scaling}")
            one.set_xlabel("d_model")
            one.set_ylabel(f"change of {words} (RMS)")
            one.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), title="letter", loc="outside right upper")
    figure.savefig(target, dpi=120)
