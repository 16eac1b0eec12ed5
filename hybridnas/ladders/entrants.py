"""The architectures of a ladder: from a study, patterns or presets, each grown to any size at equal active parameters.

Width grows with the square root of the size (or depth beside it, by ``depth_power``); what a block's sizes derive from
d_model follows, widths that are given follow in proportion, and expert, MLP and mixer widths are then matched to the
target as in a search space.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybridnas.analysis.ranking import rows
from hybridnas.arch.arch import Arch
from hybridnas.arch.match import widths_of
from hybridnas.arch.pattern import Layer, Parallel, Pattern, Slot, parse
from hybridnas.errors import ConfigError, MatchError, StudyError
from hybridnas.ladders.config import LadderConfig
from hybridnas.search.config import Budget
from hybridnas.search.named import named_budget, named_data
from hybridnas.search_spaces.fit import TOLERANCE, fit, spread
from hybridnas.search_spaces.space import Scale, scaled_preset
from hybridnas.study.folder import completed, read_study
from hybridnas.study.objectives import eligible
from hybridnas.study.records import ARCH, COMPLETE, load_records, reference_of, trial_folder

_AROUND = (0, 1, -1, 2, -2, 3, -3)  # steps of d_model that are tried around the wanted width
SPREAD = ("d_expert", "d_ff")  # widths that a space gives to single slots
_FINEST = 1  # steps of widths in which a match is tried at last [channels]


@dataclass(frozen=True)
class Entrant:
    """One architecture of a ladder, at size 1."""

    name: str
    arch: Arch
    preset: str | None = None  # scaled by its family's rules; None: by the general ones
    lr: float | None = None  # learning rate at size 1 that its study found for it; None: the budget's [1]

    @property
    def active_params(self) -> int:
        """Active parameters at size 1 [count]."""
        return self.arch.cost().active_params


@dataclass(frozen=True)
class Base:
    """Budget and data of size 1, and the architectures of the study where there is one."""

    budget: Budget
    data: Mapping[str, Any]
    found: tuple[Entrant, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        found = [{**vars(one), "arch": one.arch.to_dict()} for one in self.found]
        return {"budget": self.budget.to_dict(), "data": dict(self.data), "found": found}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Base:
        """Rebuild from :meth:`to_dict`."""
        found = (Entrant(**{**one, "arch": Arch.from_dict(one["arch"])}) for one in values["found"])
        return cls(Budget.from_dict(values["budget"]), values["data"], tuple(found))

    def changed(self, config: LadderConfig) -> Base:
        """Return it with the rate and the batch that the ladder asks for."""
        changes = {key: value for key in ("lr", "batch_size") if (value := getattr(config, key)) is not None}
        return replace(self, budget=self.budget.replace(**changes))


def study_folder(config: LadderConfig) -> Path:
    """Return the folder of the ladder's study, which may lie elsewhere than other studies."""
    given = Path(str(config.study)).expanduser()
    if (given / "study.json").is_file():
        return given
    return completed(Path(config.runs).expanduser() / str(config.study))


def base_of(config: LadderConfig) -> Base:
    """Return budget and data of size 1, and the study's architectures, its best first, then its baselines.

    Raises StudyError for a study without trials trained to the end, or a simulated one, and ConfigError.
    """
    if not (config.study or config.patterns or config.presets):
        raise ConfigError(
            "ladder needs architectures: study=NAME, patterns=[...] or presets=[...]",
            field="ladder.study",
            allowed="a study, patterns or presets",
        )
    if config.study is None:
        budget = Budget.from_dict(named_budget(config.budget or "laptop"))
        return Base(budget, named_data(config.data or "stdlib")).changed(config)
    folder = study_folder(config)
    identity = read_study(folder)["identity"]
    if identity["space"].get("table"):
        raise StudyError(
            f"study {folder.name!r} looked its scores up in a table and trained nothing; give patterns=[...]",
            field="ladder.study",
            got=config.study,
        )
    data = identity["data"] if config.data is None else named_data(config.data)
    return Base(Budget.from_dict(identity["budget"]), data, tuple(_of_study(config, folder))).changed(config)


def entrants(config: LadderConfig, base: Base, vocab_size: int) -> list[Entrant]:
    """Return the architectures at size 1, each once, the study's best first, then baselines, presets and patterns.

    Raises ConfigError and MatchError for a name, a pattern, or sizes that cannot be matched.
    """
    found = list(base.found)
    target = config.active_params or (found[0].active_params if found else None)
    for name in config.presets:
        arch = scaled_preset(name, _scale(base.budget, vocab_size, base.budget.d_model, base.budget.depth))
        found.append(Entrant(name, arch, name))
    for text in config.patterns:
        arch = Arch.from_pattern(parse(text), d_model=base.budget.d_model, vocab_size=vocab_size, **_common(text, base))
        found.append(Entrant(text, arch))
    target = target or found[0].active_params
    sized = [replace(one, arch=grown(one, 1.0, config, base.budget, target)) for one in found]
    unique = {one.arch.fingerprint(): one for one in reversed(sized)}
    kept = [one for one in sized if unique[one.arch.fingerprint()] is one]
    names = [one.name for one in kept]
    return [one if names.count(one.name) == 1 else replace(one, name=f"{one.name} {one.arch.short}") for one in kept]


def grown(one: Entrant, factor: float, config: LadderConfig, budget: Budget, target: int) -> Arch:
    """Return an architecture at ``factor`` times the size, matched to ``target`` active parameters.

    Raises MatchError where no width near the wanted one can be matched.
    """
    if factor == 1 and abs(one.active_params - target) <= TOLERANCE * target:
        return one.arch
    layers = [str(layer) for layer in one.arch.pattern.layers]
    lengths = (p for p in range(1, len(layers) + 1) if not len(layers) % p)
    period = next(p for p in lengths if layers == layers[:p] * (len(layers) // p))  # depth grows by whole motifs
    depth = period * max(1, round(len(layers) * factor**config.depth_power / period))
    wanted = one.arch.d_model * (factor * len(layers) / depth) ** 0.5
    for step in _AROUND:
        d_model = budget.multiple * max(1, round(wanted / budget.multiple) + step)
        for multiple in (budget.multiple, _FINEST):
            with contextlib.suppress(ConfigError, MatchError):
                return _matched(_widened(one, d_model, layers, depth, budget), target, multiple)
    try:
        return _matched(_widened(one, round(wanted), layers, depth, budget), target, _FINEST)
    except (ConfigError, MatchError) as error:
        raise MatchError(
            f"ladder sizes: {one.name} cannot be grown to {factor:g} times size 1, {target:,} active parameters: "
            f"{error}; leave this size or this architecture out, or give another active_params",
            field="ladder.sizes",
            got=factor,
            allowed=target,
        ) from None


def _widened(one: Entrant, d_model: int, layers: list[str], depth: int, budget: Budget) -> Arch:
    """Return the architecture at another width and depth, its given widths in proportion, not matched yet."""
    if one.preset is not None:
        return scaled_preset(one.preset, _scale(budget, one.arch.vocab_size, d_model, depth))
    ratio = d_model / one.arch.d_model
    pattern = parse("".join(layers[i % len(layers)] for i in range(depth)))
    blocks: dict[str, dict[str, Any]] = {letter: dict(own) for letter, own in one.arch.blocks}
    for letter, own in blocks.items():
        for name in widths_of(letter):
            if own.get(name):
                own[name] = budget.multiple * max(1, round(own[name] * ratio / budget.multiple))
    return Arch.from_pattern(pattern, **{**one.arch.model.to_dict(), "d_model": d_model}, **blocks)


def _matched(arch: Arch, target: int, multiple: int) -> Arch:
    """Match widths to the target; those that slots give of experts and MLPs move together, as a space draws them."""
    if abs(arch.cost().active_params - target) <= TOLERANCE * target:
        return arch
    ratios: list[float] = []

    def freed(slot: Slot) -> Slot:
        given = [float(value) for name, value in slot.args if name in SPREAD]
        ratios[-1] = given[0] if given else ratios[-1]
        return replace(slot, args=tuple((name, value) for name, value in slot.args if name not in SPREAD))

    layers: list[Layer] = []
    for layer in arch.pattern.layers:
        ratios.append(0.0)
        if isinstance(layer, Parallel):
            layers.append(Parallel(tuple(tuple(freed(slot) for slot in branch) for branch in layer.branches)))
        else:
            layers.append(freed(layer))
    if not any(ratios):
        return fit(arch, target, multiple)
    free = arch.replace(pattern=Pattern(tuple(layers)))
    return spread(free, target, [ratio or max(ratios) for ratio in ratios], multiple)


def _scale(budget: Budget, vocab_size: int, d_model: int, depth: int) -> Scale:
    return Scale(
        d_model=d_model,
        depth=depth,
        vocab_size=vocab_size,
        n_experts=budget.n_experts,
        multiple=budget.multiple,
        seq_len=budget.seq_len,
    )


def _common(text: str, base: Base) -> dict[str, Any]:
    """Return the fields that a pattern's blocks take from the budget."""
    letters = {slot.letter for slot in parse(text).slots}
    return {"n_experts": base.budget.n_experts} if "E" in letters else {}


def _of_study(config: LadderConfig, folder: Path) -> list[Entrant]:
    """Return the study's best architectures and every baseline that was trained to the end, with their own rates.

    A rate that is asked for is that of all.
    """
    records, _ = load_records(folder)
    reference = reference_of(read_study(folder))
    ranked = [row.record for row in rows(records, reference) if eligible(row.record)]
    chosen = [record for record in ranked if record.preset is None][: config.top]
    chosen += [record for record in records if record.preset is not None and record.state == COMPLETE]
    if not chosen:
        raise StudyError(
            f"study {folder.name!r} has no trial that was trained to the end; run it further, or give presets=[...]",
            field="ladder.study",
            got=config.study,
        )
    found = []
    for record in chosen:
        path = trial_folder(folder, record.number) / ARCH
        arch = Arch.from_dict(json.loads(path.read_text(encoding="utf-8")))
        lr = None if config.lr is not None else record.own_lr or record.lr
        found.append(Entrant(record.preset or record.pattern, arch, record.preset, lr))
    return found
