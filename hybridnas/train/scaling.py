"""Maximal update parametrization (muP): factors of learning rates and initial weights, by width, for AdamW.

Without it the best learning rate falls as a model grows wider, and it falls by another law for each kind of layer. With
it, what a step changes in the activations is the same at all widths, so that a rate found at the base width serves all
(Yang et al. 2022, 2203.03466). Nothing but rates, weight decay and drawn weights is touched: a model so trained is the
same architecture, with the same fingerprint and the same export.

Let m be d_model over the base width. With AdamW:

==================================  ============  ===========  ==================================================
parameter                           rate          init         why
==================================  ============  ===========  ==================================================
matrices                            1 / m         1            drawn at 1 / sqrt(fan-in) by every block
vectors, embeddings, convolutions   1             1            their fan-in does not grow
head                                1 / m         1 / sqrt(m)  its logits are then of one size after any step
queries of a head m times as wide   1 / m^(3/2)   1 / sqrt(m)  q k grows with the head's width, its scale as the root
==================================  ============  ===========  ==================================================

A step's decay of a weight is its rate times ``weight_decay``; the latter is divided by the factor of the rate, so that
it is the same at all widths (2405.13698). Blocks declare what deviates, by ``width_rules``:

- Mamba: B, C and dt come from matrices with few outputs, which plain muP would draw at 1 / fan-in as it does a head.
  The state would then vanish beside the skip as the model grows (Vankadara et al. 2024); they are drawn as all
  matrices are. The fan-in of ``dt_proj`` is the rank.
- Low ranks that do not grow, as of gated linear attention's decay: rate 1.
- Experts: each is a matrix of its own; the router is a matrix, drawn at 1 / sqrt(fan-in), so that it decides as
  firmly at every width.

A tied matrix is embedding and head: it has the head's rate and is drawn as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from hybridnas.arch.model import HybridLM
from hybridnas.errors import ConfigError
from hybridnas.layers.width import WidthRule, matrix
from hybridnas.train.config import TrainConfig


def width_rules(model: nn.Module, config: TrainConfig) -> dict[str, WidthRule]:
    """Return name -> rule for all trainable parameters of a model, or of what contains one; empty without scaling.

    What modules declare comes first, that of an outer module before that of its parts. Of the others, vectors, weights
    of embeddings and convolutions and what ``no_decay`` names keep rate 1, since their fan-in does not grow; matrices
    and stacks of them have the rate of their growing fan-in.

    Raises ConfigError where there is no HybridLM, whose width is not known.
    """
    if config.rate_scaling == "none":
        return {}
    found = next((module for module in model.modules() if isinstance(module, HybridLM)), None)
    if found is None:
        raise ConfigError(
            f"train rate_scaling={config.rate_scaling!r} needs a HybridLM, whose width is known, got "
            f"{type(model).__name__}; use rate_scaling='none'",
            field="train.rate_scaling",
            got=config.rate_scaling,
            allowed=("none",),
        )
    growth = found.arch.d_model / config.base_width
    declared: dict[int, WidthRule] = {}
    constant: set[int] = set()
    for module in model.modules():  # outer ones first
        own = dict(module.named_parameters(remove_duplicate=False))
        rules_of: Callable[[int], Mapping[str, WidthRule]] | None = getattr(module, "width_rules", None)
        for name, rule in rules_of(config.base_width).items() if rules_of is not None else ():
            declared.setdefault(id(own[name]), rule)
        constant |= {id(own[name]) for name in getattr(module, "no_decay", ()) if name in own}
        if isinstance(module, (nn.Embedding, nn.Conv1d)):
            constant |= {id(p) for p in module.parameters(recurse=False)}

    def rule_of(p: nn.Parameter) -> WidthRule:
        default = WidthRule() if p.ndim < 2 or id(p) in constant else matrix(growth)
        return declared.get(id(p), default)

    return {name: rule_of(p) for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def scale_weights(model: HybridLM, config: TrainConfig) -> None:
    """Multiply freshly drawn weights by their factors, in place."""
    parameters = dict(model.named_parameters())
    for name, rule in width_rules(model, config).items():
        if rule.init != 1:
            parameters[name].mul_(rule.init)
        if rule.row_factor != 1:
            parameters[name][: rule.rows].mul_(rule.row_factor)
