"""How weights are drawn and trained as a model grows wider: what a layer declares for ``train.rate_scaling``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WidthRule:
    """Factors of one parameter at a width, beside the same parameter at the base width.

    Any module may have ``width_rules(base_width)``, which returns name -> rule for parameters of its own (with dots for
    those of its parts). What no module declares follows :func:`hybridnas.train.scaling.width_rules`.
    """

    rate: float = 1.0  # on the learning rate of AdamW
    init: float = 1.0  # on the weights as they are drawn
    rows: int = 0  # the first rows of a matrix, to which ``row_factor`` applies besides; 0: none
    row_factor: float = 1.0  # on both rate and init of these rows


def matrix(growth: float) -> WidthRule:
    """Return the rule of a matrix whose fan-in is ``growth`` times that of the base: drawn at 1 / sqrt(fan-in) anyway.

    Adam moves every weight by about its rate, and the moves of a row add up over the fan-in (2203.03466, table 8).
    """
    return WidthRule(rate=1 / growth)
