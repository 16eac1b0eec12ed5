"""In which mode a module runs: evaluation for a while, and whether operations run eagerly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode inside, and each of its submodules back into the mode it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def is_plain_eager(device: torch.device) -> bool:
    """Whether operations run eagerly as they are written: no autograd, autocast or compiler."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type))


def has_hooks(*modules: nn.Module) -> bool:
    """Whether any of the modules has a forward or backward hook."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for module in modules for kind in kinds)
