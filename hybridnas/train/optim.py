"""AdamW, its parameter groups, and the learning rate as a pure function of the token count."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hybridnas.errors import ConfigError
from hybridnas.train.config import Decay, TrainConfig


def learning_rate(config: TrainConfig, tokens: int, decay: Decay | None = None) -> float:
    """Return the rate of the step that brings the run to ``tokens``: linear warm-up, then what the schedule says.

    The rate reaches ``lr`` where warm-up ends. With a cosine it is ``lr * final_lr_fraction`` at ``config.tokens``, and
    stays there. With ``wsd`` it stays at ``lr`` and falls linearly to that value within ``decay``, the one under way.
    """
    warmup = config.warmup_tokens
    if tokens < warmup:
        return config.lr * tokens / warmup
    if warmup >= config.tokens:  # the last step may pass ``tokens``: it has no cosine to fall along
        return config.lr
    low = config.final_lr_fraction
    if config.schedule == "wsd" and decay is not None:
        start, end = (step * config.step_tokens for step in decay)
        return config.lr * (low + (1 - low) * min(1.0, max(0.0, (end - tokens) / (end - start))))
    if config.schedule != "cosine":
        return config.lr
    part = min(1.0, (tokens - warmup) / (config.tokens - warmup))
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * part)))


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> trainable parameter, each shared one once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def no_decay_names(model: nn.Module) -> set[str]:
    """Return the parameters that weight decay leaves alone.

    What a module declares itself: any module may have ``no_decay``, names of its own parameters (with dots for those of
    its parts), such as biases of experts that are stacked into a matrix. Besides, all vectors and scalars (biases,
    norms), and embeddings: rows of rare tokens see few gradients, and decay would only shrink them.
    """
    spared = {id(p) for p in model.parameters() if p.ndim < 2}
    for module in model.modules():
        declared = getattr(module, "no_decay", ())
        if declared:
            own = dict(module.named_parameters())
            spared |= {id(own[name]) for name in declared if name in own}
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            spared.add(id(module.weight))
    return {name for name, p in named_parameters(model).items() if id(p) in spared}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the decayed and the spared group, or over one group with ``decay_all``; fused kernels."""
    parameters = named_parameters(model)
    if not parameters:
        raise ConfigError(
            "the model has no trainable parameters; give it some, or unfreeze them by requires_grad_(True)",
            field="model",
            got=0,
            allowed="at least one parameter that requires a gradient",
        )
    spared = set() if config.decay_all else no_decay_names(model)
    groups = [
        {"params": [p for name, p in parameters.items() if name not in spared], "weight_decay": config.weight_decay},
        {"params": [p for name, p in parameters.items() if name in spared], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=(config.beta1, config.beta2), fused=True
    )


def optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return ``name.moment`` -> tensor for every parameter that has taken a step."""
    return {
        f"{name}.{key}": value for name, p in parameters.items() for key, value in optimizer.state.get(p, {}).items()
    }


def restore_optimizer(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`optimizer_tensors` gave, on each parameter's device; nothing else stays."""
    for name, p in parameters.items():
        optimizer.state.pop(p, None)
        own = {key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in tensors}
        if own:
            optimizer.state[p] = {key: value.clone().to(p.device) for key, value in own.items()}


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
