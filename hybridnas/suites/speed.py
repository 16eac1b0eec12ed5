"""Speed of learning: the share of a baseline's training that another model needs to reach the baseline's final loss."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from hybridnas.analysis.curves import tokens_to_reach
from hybridnas.suites.results import CurveRow, Row, choose, grouped
from hybridnas.suites.suite import Suite


def shares(rows: Sequence[Row], curves: Sequence[CurveRow], suite: Suite) -> dict[str, list[float | None]]:
    """Return model -> per seed, tokens to the baseline's final loss over the baseline's tokens; None: not reached.

    A seed is set against the baseline of the same seed, or, where that was not run, against the first seed's. Losses
    lie on straight lines between measurements.
    """
    chosen = [row for row in choose(rows, suite) if row.chosen and row.valid_loss is not None]
    bases = {row.seed: row for row in chosen if row.model == suite.baseline}
    if not bases:
        return {}
    found: dict[str, list[float | None]] = {}
    for row in chosen:
        base = bases.get(row.seed, next(iter(bases.values())))
        assert base.valid_loss is not None
        reached = tokens_to_reach(points(curves, row), base.valid_loss)
        found.setdefault(row.model, []).append(None if reached is None else reached / base.tokens)
    return found


def points(curves: Sequence[CurveRow], row: Row) -> list[tuple[float, float]]:
    """Return a run's (training tokens, validation loss)."""
    return [(point.tokens, point.valid_loss) for point in curves if point.folder == row.folder]


def table(rows: Sequence[Row], curves: Sequence[CurveRow], suite: Suite) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of text: final losses and the share of the baseline's steps, one entry for each seed."""
    found = shares(rows, curves, suite)
    chosen = [row for row in choose(rows, suite) if row.chosen and row.valid_loss is not None]
    lines = []
    for model, own in grouped(chosen, lambda row: row.model).items():
        losses = [row.valid_loss for row in own if row.valid_loss is not None]
        parts = found.get(model, [])
        reached = [part for part in parts if part is not None]
        words = ", ".join("not reached" if part is None else f"{100 * part:.0f} %" for part in parts)
        speed = f"{1 / fmean(reached):.2f}x" if reached and len(reached) == len(parts) else "-"
        seeds = ", ".join(f"{loss:.4f}" for loss in losses)
        lines.append(
            [model, f"{fmean(losses):.4f}", seeds, f"{own[0].lr:g}", f"{own[0].active_params:,}", words, speed]
        )
    lines.sort(key=lambda line: float(line[1]))
    return ["model", "loss", "by seed", "lr", "active", f"share of {suite.baseline}'s steps", "speed-up"], lines
