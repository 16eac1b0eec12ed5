"""What keeping packed documents apart costs: a training step with segments and without, side by side, by mixer."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.bench import models
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Form, measure
from hybridnas.bench.result import Result
from hybridnas.kernels.cross_entropy import linear_cross_entropy

STREAM, PACKED = "one stream", "documents apart"
_PATTERNS = ("MEME", "MFMF", "AFAF", "SFSF", "NFNF", "GFGF", "KFKF", "LFLF", "CFCF")  # the first is moe_mamba's
_DOCUMENT = 100  # mean length of a document [tokens]: two or three ends in a window


def run(config: BenchConfig) -> Result:
    """Measure at the laptop's size: d_model 48, 4 layers, L 256, batch 16, V 256."""
    result = Result("packed")
    width, batch, length = (16, 2, 32) if config.tiny else (48, 16, 256)
    ends_BL = torch.rand(batch, length, generator=torch.Generator().manual_seed(0)) < 1 / _DOCUMENT
    segments_BL = ends_BL.cumsum(dim=1) - ends_BL.long()
    result.notes.append(f"{int(ends_BL.sum())} ends of documents in {batch} windows of {length} tokens")
    for pattern in _PATTERNS:
        case = f"{pattern}, d {width}, L {length}, batch {batch}"
        extra = {"n_experts": 8} if "E" in pattern else {}
        arch = Arch.from_pattern(pattern, d_model=width, vocab_size=256, **extra)
        forms = [
            Form(name, models.step_of(model, loss, batch, length, 256))
            for name, model, loss in (_stream(arch), _packed(arch, segments_BL, ~ends_BL))
        ]
        result.add(case, measure(forms, config.pick(15, 5, 1)))
        what = f"training step, documents apart, {case}"
        result.goal("at most", 1.03, case=case, of=PACKED, over=STREAM, what=what, against="the same as one stream")
    return result


def _stream(arch: Arch) -> tuple[str, HybridLM, models.Loss]:
    model = HybridLM(arch)
    return STREAM, model, models.loss_of(model)


def _packed(arch: Arch, segments_BL: Tensor, mask_BL: Tensor) -> tuple[str, HybridLM, models.Loss]:
    model = HybridLM(arch)

    def loss(ids_BL: Tensor, targets_BL: Tensor) -> Tensor:
        x_BLD = model.hidden(ids_BL, segments_BL=segments_BL).x_BLD
        return linear_cross_entropy(x_BLD, model.head.weight, targets_BL, mask=mask_BL)

    return PACKED, model, loss
