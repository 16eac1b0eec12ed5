"""Distillation: a model learns from another one's logits and hidden states beside the data's tokens.

Shapes: B batch, L length, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridnas.arch.model import HybridLM
from hybridnas.data.source import Batch
from hybridnas.errors import ConfigError
from hybridnas.train.start import weights_digest


class Teacher:
    """A frozen model, and how much of the loss agreement with it is.

    ``logits``: weight of KL(teacher || student) of the next-token distributions at ``temperature``, times its square
    (Hinton 2015, 1503.02531) [nats per token]. ``hidden``: weight of the squared difference of the residual streams
    over the teacher's square, the mean over ``layers`` (a layer of the student -> the teacher's that it stands for).
    All logits of both models exist at once. Raises ConfigError for weights that are both 0 or negative.
    """

    def __init__(
        self,
        model: HybridLM,
        *,
        logits: float = 1.0,
        hidden: float = 0.0,
        temperature: float = 1.0,
        layers: Mapping[int, int] | None = None,
    ) -> None:
        for name, value in (("logits", logits), ("hidden", hidden)):
            if value < 0:
                raise ConfigError(f"distill {name}={value} must be >= 0", field=name, got=value, allowed=">= 0")
        if logits == hidden == 0:
            raise ConfigError(
                "distill logits=0 and hidden=0 leave nothing to learn from the teacher; give one of them a weight",
                field="logits",
                got=0,
                allowed="> 0",
            )
        if temperature <= 0:
            raise ConfigError(
                f"distill temperature={temperature} must be > 0", field="temperature", got=temperature, allowed="> 0"
            )
        self.model = model
        self.logits, self.hidden, self.temperature = logits, hidden, temperature
        self.layers = dict(layers or {}) if hidden else {}
        model.eval().requires_grad_(False)

    def identity(self) -> dict[str, Any]:
        """Return what makes two trainings with a teacher the same."""
        layers = [[ours, theirs] for ours, theirs in sorted(self.layers.items())]
        weights = {"logits": self.logits, "hidden": self.hidden, "temperature": self.temperature}
        return {"weights": weights_digest(self.model), **weights, "layers": layers}

    @contextmanager
    def watching(self, student: HybridLM) -> Iterator[dict[int, Tensor]]:
        """Yield a mapping that the student's pass inside fills: layer -> residual stream after it (B, L, D)."""
        with _streams(student, self.layers) as streams:
            yield streams

    def losses(
        self, batch: Batch, student: HybridLM, x_BLD: Tensor, streams: Mapping[int, Tensor]
    ) -> dict[str, Tensor]:
        """Return the weighted losses of a batch; x (B, L, D) is what the student's head reads."""
        with torch.no_grad(), _streams(self.model, self.layers.values()) as theirs:
            hidden = self.model.hidden(batch.inputs_BL, segments_BL=batch.segments_BL)
            teacher_BLV = self.model.head(hidden.x_BLD) if self.logits else None
        mask_BL = torch.ones_like(batch.targets_BL, dtype=torch.bool) if batch.mask_BL is None else batch.mask_BL
        found = {}
        if teacher_BLV is not None:
            ours = F.log_softmax(student.head(x_BLD)[mask_BL].float() / self.temperature, dim=-1)
            wanted = F.log_softmax(teacher_BLV[mask_BL].float() / self.temperature, dim=-1)
            divergence = F.kl_div(ours, wanted, log_target=True, reduction="sum") / mask_BL.sum().clamp(min=1)
            found["distill_logits"] = self.logits * self.temperature**2 * divergence
        if self.layers:
            parts = [
                (streams[own] - theirs[other]).float().square().sum() / theirs[other].float().square().sum()
                for own, other in self.layers.items()
            ]
            found["distill_hidden"] = self.hidden * torch.stack(parts).mean()
        return found


@contextmanager
def _streams(model: HybridLM, layers: Any) -> Iterator[dict[int, Tensor]]:
    """Yield a mapping that a pass of the model inside fills with the residual streams after some layers."""
    found: dict[int, Tensor] = {}

    def keeper(index: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found[index] = output[0]

        return keep

    wanted = sorted(set(layers))
    hooks = [cast(nn.Module, model.layers[index]).register_forward_hook(keeper(index)) for index in wanted]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
