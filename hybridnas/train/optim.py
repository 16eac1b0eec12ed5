"""AdamW and Muon, their parameter groups, and the learning rate as a pure function of the token count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hybridnas.errors import ConfigError
from hybridnas.layers.block import Block
from hybridnas.layers.width import WidthRule
from hybridnas.train.config import Decay, TrainConfig
from hybridnas.train.scaling import width_rules

_STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # of AdamW, the last of Muon


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


class Optimizers:
    """Optimizers over disjoint parameters, which take their steps together."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        self._of = {id(p): part for part in parts for group in part.param_groups for p in group["params"]}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Take one step."""
        for part in self.parts:
            part.step()

    def of(self, p: nn.Parameter) -> torch.optim.Optimizer:
        """Return the part that a parameter belongs to."""
        return self._of[id(p)]


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizers:
    """Return AdamW over the decayed and the spared group, or over one group with ``decay_all``; fused kernels.

    Weights whose learning rate has a factor of its own (``rate_scaling``, ``embedding_lr``) are groups of their own.
    With ``optimizer='muon'`` the matrices of blocks are Muon's, whose update has the size of AdamW's (2502.16982):
    those of two dimensions, not experts, which are stacked. Projections that are one matrix are updated as one.
    """
    parameters = named_parameters(model)
    if not parameters:
        raise ConfigError(
            "the model has no trainable parameters; give it some, or unfreeze them by requires_grad_(True)",
            field="model",
            got=0,
            allowed="at least one parameter that requires a gradient",
        )
    spared = set() if config.decay_all else no_decay_names(model)
    rules = width_rules(model, config)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = _block_matrices(model) if config.optimizer == "muon" else set()
    groups: dict[bool, dict[tuple[bool, float], list[nn.Parameter]]] = {False: {}, True: {}}
    for decays in (True, False):
        for name, p in parameters.items():
            if (name not in spared) == decays:
                factor = rules[name].rate if rules else 1.0
                # The moves of a row add up over the fan-in in Adam's update, over its root in an orthogonal one.
                factor = math.sqrt(factor) if name in matrices else factor
                factor *= config.embedding_lr if id(p) in embeddings else 1.0
                groups[name in matrices].setdefault((decays, factor), []).append(p)
    given = {
        muon: [
            # A step's decay is rate times weight_decay: the same for all weights (2405.13698).
            {"params": own, "weight_decay": config.weight_decay / factor if decays else 0.0, "factor": factor}
            for (decays, factor), own in found.items()
        ]
        for muon, found in groups.items()
    }
    parts: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(given[False], lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
    ]
    if matrices:
        parts.append(torch.optim.Muon(given[True], lr=config.lr, adjust_lr_fn="match_rms_adamw"))
    together = Optimizers(parts)
    set_learning_rate(together, config.lr)
    for name, rule in rules.items():
        if rule.row_factor != 1:
            _slow_rows(together.of(parameters[name]), parameters[name], rule)
    return together


def _block_matrices(model: nn.Module) -> set[str]:
    """Return the names of what Muon is for; raises ConfigError where there is none."""
    inside = {id(p) for module in model.modules() if isinstance(module, Block) for p in module.parameters()}
    spared = no_decay_names(model)
    found = {n for n, p in named_parameters(model).items() if p.ndim == 2 and id(p) in inside and n not in spared}
    if not found:
        raise ConfigError(
            f"train optimizer='muon' is for matrices of blocks, of which {type(model).__name__} has none; "
            f"use optimizer='adamw'",
            field="train.optimizer",
            got="muon",
            allowed=("adamw",),
        )
    return found


def _slow_rows(optimizer: torch.optim.Optimizer, p: nn.Parameter, rule: WidthRule) -> None:
    """Let the first rows of a matrix go ``row_factor`` of the way of every step."""
    before: list[Tensor] = []

    def keep(*_: Any) -> None:
        before.append(p.detach()[: rule.rows].clone())

    def slow(*_: Any) -> None:
        rows = p.detach()[: rule.rows]
        rows.copy_(before.pop().lerp(rows, rule.row_factor))

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(slow)


def optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: Optimizers) -> dict[str, Tensor]:
    """Return ``name.moment`` -> tensor for every parameter that has taken a step."""
    states = {name: optimizer.of(p).state.get(p, {}) for name, p in parameters.items()}
    return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}


def restore_optimizer(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizers, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`optimizer_tensors` gave, on each parameter's device; nothing else stays."""
    for name, p in parameters.items():
        optimizer.of(p).state.pop(p, None)
        own = {key: tensors[f"{name}.{key}"] for key in _STATE if f"{name}.{key}" in tensors}
        if own:
            optimizer.of(p).state[p] = {key: value.clone().to(p.device) for key, value in own.items()}


def set_learning_rate(optimizer: Optimizers, rate: float) -> None:
    """Give every group the rate, times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
