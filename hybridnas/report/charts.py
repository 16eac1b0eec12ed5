"""The report's further plots: effects with intervals, shares as bars, the best so far over trained tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridnas.analysis.effects import Effect
from hybridnas.report.plots import COLORS, Series, drawing, svg_text, token_ticks

_WHEEL = [name for name in COLORS if name[0] == "c" and name[1:].isdigit()]


def effects_svg(positions: Sequence[Effect], letters: Sequence[Effect], unit: str, name: str = "effects") -> str:
    """Draw effects as dots with intervals: by position to the left, of one more sub-layer to the right."""
    if not positions and not letters:
        return ""
    known = sorted({effect.letter for effect in (*positions, *letters)})
    colors = {letter: COLORS[_WHEEL[index % len(_WHEEL)]] for index, letter in enumerate(known)}
    with drawing() as (figure, axes):
        figure.set_size_inches(10, 3.8)
        panels = axes(2 if positions and letters else 1, share=False)
        if len(panels) == 2:
            panels[0].set_position((0.085, 0.15, 0.58, 0.78))
            panels[1].set_position((0.76, 0.15, 0.23, 0.78))
        else:
            panels[0].set_position((0.085, 0.15, 0.9, 0.78))
        if positions:
            ax = panels[0]
            step = 0.7 / max(len(known), 1)
            for effect in positions:
                at = (effect.position or 0) + step * (known.index(effect.letter) - (len(known) - 1) / 2)
                _interval(ax, at, effect, colors[effect.letter])
            _frame_effects(ax, positions)
            last = max(effect.position or 0 for effect in positions)
            ax.set_xlim(0.5, last + 0.5)
            ax.set_xticks(range(1, last + 1))
            for edge in range(1, last):
                ax.axvline(edge + 0.5, color=COLORS["grid"], lw=0.7, zorder=0)
            ax.set_xlabel("position of the sub-layer, from the input")
            ax.set_ylabel(f"effect [{unit}], less is better")
            for index, letter in enumerate(known):
                at = 0.005 + 0.03 * index + 0.017 * sum(len(other) for other in known[:index])
                ax.text(at, 1.03, letter, color=colors[letter], transform=ax.transAxes, weight="bold")
        if letters:
            ax = panels[-1]
            for index, effect in enumerate(letters):
                _interval(ax, index, effect, colors[effect.letter])
            _frame_effects(ax, letters)
            ax.set_xticks(range(len(letters)), [effect.letter for effect in letters])
            ax.set_xlim(-0.6, len(letters) - 0.4)
            ax.set_xlabel("one sub-layer more")
        for ax in panels:
            ax.axhline(0, color=COLORS["muted"], lw=0.8, ls=(0, (3, 3)), zorder=0)
            ax.grid(visible=True, axis="y")
            ax.set_axisbelow(True)
            ax.tick_params(which="both", length=0)
        return svg_text(figure, name, ())


def _frame_effects(ax: Any, effects: Sequence[Effect]) -> None:
    """Frame the effects, and of intervals what is near: that of two architectures may be a hundred times as wide."""
    largest = max(abs(effect.mean) for effect in effects)
    ends = [effect.mean + sign * min(effect.half, 2 * largest) for effect in effects for sign in (-1, 1)]
    margin = 0.06 * (max(ends) - min(ends)) or 1.0
    ax.set_ylim(min(ends) - margin, max(ends) + margin)


def bars_svg(shares: Mapping[str, float], name: str = "importance") -> str:
    """Draw shares, which sum to 1, as horizontal bars with their figures, the largest on top; empty without any."""
    if not shares:
        return ""
    shown = sorted(shares.items(), key=lambda item: item[1])[-14:]
    with drawing() as (figure, axes):
        figure.set_size_inches(10, 0.5 + 0.3 * len(shown))
        (ax,) = axes(1)
        ax.set_position((0.2, 0.3 / (0.5 + 0.3 * len(shown)), 0.7, 1 - 0.4 / (0.5 + 0.3 * len(shown))))
        ax.barh([key for key, _ in shown], [share for _, share in shown], color=COLORS["c1"], height=0.6)
        for index, (_, share) in enumerate(shown):
            ax.text(share + 0.006, index, f"{share:.0%}", va="center", color=COLORS["ink"], fontsize=9.5)
        ax.set_xlim(0, max(share for _, share in shown) * 1.12)
        ax.tick_params(which="both", length=0)
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
        return svg_text(figure, name, ())


def steps_svg(series: Sequence[Series], unit: str, name: str = "progress") -> str:
    """Draw the best score so far of each search over the tokens that it trained, as steps; empty without points."""
    drawn = [line for line in series if line.points]
    if not drawn:
        return ""
    end = max(line.points[-1][0] for line in drawn)
    with drawing() as (figure, axes):
        figure.set_size_inches(10, 3.6)
        figure.subplots_adjust(left=0.085, right=0.8, top=0.96, bottom=0.15)
        (ax,) = axes(1)
        for line in drawn:
            xs, ys = zip(*line.points, (end, line.points[-1][1]), strict=True)
            ax.step(xs, ys, where="post", color=COLORS[line.color], lw=2)
            ax.plot(xs[:-1], ys[:-1], ls="", marker="o", ms=3.5, color=COLORS[line.color])
        low, high = ax.get_ylim()
        above = float("-inf")
        for line in sorted(drawn, key=lambda line: line.points[-1][1]):
            place = max((line.points[-1][1] - low) / (high - low), above + 0.07)
            above = place
            color = COLORS[line.color]
            ax.text(1.015, place, line.label, transform=ax.transAxes, va="center", color=color, fontsize=9.5)
        ax.grid(visible=True)
        ax.set_axisbelow(True)
        ax.tick_params(which="both", length=0)
        ax.set_xlabel("tokens trained by the whole search")
        ax.set_ylabel(unit)
        ax.set_xlim(left=0)
        token_ticks(ax)
        return svg_text(figure, name, drawn)


def _interval(ax: object, at: float, effect: Effect, color: str) -> None:
    clear = abs(effect.mean) > effect.half
    ax.errorbar(  # type: ignore[attr-defined]
        [at], [effect.mean], yerr=[effect.half], fmt="o", ms=5, lw=1.3, color=color, capsize=0,
        mfc=color if clear else "none", mec=color,
    )  # fmt: skip
