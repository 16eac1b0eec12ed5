"""Losses of rows of logits through loss.c, with the signature of ``eager.losses``.

Shapes: T rows, V vocabulary. float32; other dtypes are widened.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hybridnas.kernels._build import Library, library, threads
from hybridnas.kernels._build.arguments import call, pointer, rows, struct

SOURCE = Path(__file__).resolve().with_name("loss.c")
_Args = struct("_Args", "T vocab logits_row out_row gradient threads", "logits targets scale z_loss out loss logsumexp")


def compiled() -> Library:
    """Return the library of loss.c, or why there is none."""
    return library(SOURCE)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether the C path runs here; compiles it the first time."""
    return compiled().handle is not None


def losses(
    logits_TV: Tensor,
    targets_T: Tensor,
    scale_T: Tensor | None,
    out_TV: Tensor,
    *,
    gradient: bool,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return losses and normalisers (T,); with ``gradient``, fill ``out`` with that of sum(scale * loss).

    ``out`` may be the logits themselves.
    """
    given_TV, targets_T = rows(logits_TV.float()), targets_T.contiguous()
    found_TV = out_TV if out_TV.dtype == torch.float32 and out_TV.stride(1) == 1 else torch.empty_like(given_TV)
    loss_T = given_TV.new_empty(given_TV.shape[0])
    logsumexp_T = torch.empty_like(loss_T)
    scale_T = None if scale_T is None else scale_T.float().contiguous()
    z_loss_1 = loss_T.new_tensor([z_loss])
    arguments = _Args(
        T=given_TV.shape[0], vocab=given_TV.shape[1], logits_row=given_TV.stride(0), out_row=found_TV.stride(0),
        gradient=gradient, threads=threads(), logits=pointer(given_TV), targets=pointer(targets_T),
        scale=pointer(scale_T), z_loss=pointer(z_loss_1), out=pointer(found_TV), loss=pointer(loss_T),
        logsumexp=pointer(logsumexp_T),
    )  # fmt: skip
    call(SOURCE, "hybridnas_loss_rows", arguments)
    if gradient and found_TV is not out_TV:
        out_TV.copy_(found_TV)
    return loss_T, logsumexp_T
