"""Search spaces: a YAML names the choices, this file turns a drawn set of choices into a matched architecture.

A space is structural: anything with ``suggest_categorical`` and ``suggest_float`` (an ``optuna.Trial`` fits) can draw
from it. Three shapes, told apart by their keys::

    letters + motif_length     a motif of letters (or '[M,E]', 'M{d_state=32}'), cycled to the depth
    base + insert + replace    a motif in which some slots of one letter become another: how many, and where
    candidates                 a plain list, for ablations

Every other key is a choice for a block's field: ``n_experts: [1, 8, 32]`` or ``E.top_k: {low: 1, high: 2, step: 1}``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hybridnas.arch.arch import Arch
from hybridnas.arch.pattern import Pattern, parse
from hybridnas.arch.presets import list_presets, preset, preset_arguments
from hybridnas.config import FrozenConfig, option, read_yaml
from hybridnas.errors import ConfigError, MatchError, suggest
from hybridnas.registry import BLOCKS
from hybridnas.search_spaces.fit import fit, share_free
from hybridnas.search_spaces.placement import PLACEMENTS, place

BASELINES = ("moe_mamba", "mamba", "mamba_mlp", "transformer", "transformer_moe")


class Chooser(Protocol):
    """What a space needs of a sampler's trial."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Scale(FrozenConfig):
    """At which size a space is searched; the budget says."""

    d_model: int = option(doc="width of the residual stream [channels]", ge=8)
    depth: int = option(doc="residual sub-layers [count]", ge=1)
    vocab_size: int = option(256, "tokens of the data's tokenizer [count]", ge=2)
    n_experts: int = option(8, "experts of the baselines that have some [count]", ge=1)
    active_params: int | None = option(None, "target; none: those of moe_mamba at this scale [count per token]", ge=1)
    multiple: int = option(8, "sizes are multiples of this [channels]", ge=1)
    seq_len: int = option(256, "length at which state and FLOPs are stated [tokens]", ge=1)


@dataclass(frozen=True)
class Proposal:
    """A drawn candidate: the choices made, and the architecture matched to the target."""

    arch: Arch
    choices: Mapping[str, Any]
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Space(FrozenConfig):
    """A space of architectures; see the file's head for its three shapes."""

    name: str = option(doc="name of the space [text]")
    description: str = option("", "what the space asks [text]")
    letters: tuple[str, ...] = option((), "what a slot of the motif may hold [pattern pieces]")
    motif_length: tuple[int, ...] = option((), "lengths of the motif that is cycled to the depth [slots]")
    requires: tuple[str, ...] = option((), "letters of which a pattern needs at least one [letters]")
    base: str | None = option(None, "motif that is cycled to the depth before slots are replaced [pattern]")
    replace_letter: str | None = option(None, "letter of the base whose slots may be replaced [letter]")
    insert: str | None = option(None, "what replaces it [pattern piece]")
    n_inserted: tuple[int, ...] = option((), "how many slots are replaced [count]")
    placement: tuple[str, ...] = option(("spread",), "where the replaced slots lie [names]")
    candidates: tuple[Any, ...] = option((), "a plain list of named architectures [mappings]")
    split: Any = option(None, "share of active parameters in mixers beside experts or MLPs [fractions]")
    baselines: tuple[str, ...] = option(BASELINES, "presets trained first, at the same active parameters [names]")
    match: bool = option(True, "whether candidates are matched to the target's active parameters [yes/no]")
    table: Mapping[str, Any] = field(default_factory=dict, metadata={"doc": "scores of all candidates, if known"})
    fields: Mapping[str, Any] = field(default_factory=dict, metadata={"doc": "choices of block fields [mapping]"})

    @classmethod
    def label(cls) -> str:
        return "space"

    def __post_init__(self) -> None:
        super().__post_init__()
        shapes = [bool(self.letters), self.base is not None, bool(self.candidates)]
        if sum(shapes) != 1:
            raise ConfigError(
                f"space {self.name!r} needs exactly one of letters (with motif_length), base (with insert) "
                f"and candidates, got {sum(shapes)}"
            )
        if self.letters and not self.motif_length:
            raise ConfigError(f"space {self.name!r} has letters, so it needs motif_length, e.g. motif_length: [2, 4]")
        if self.base is not None and not (self.insert and self.replace_letter and self.n_inserted):
            raise ConfigError(f"space {self.name!r} has a base, so it needs insert, replace and n_inserted")
        self._check_numbers("motif_length", self.motif_length, 1)
        self._check_numbers("n_inserted", self.n_inserted, 0)
        self._check_names("placement", self.placement, PLACEMENTS)
        self._check_names("requires", self.requires, BLOCKS)
        self._check_names("baselines", self.baselines, list_presets())
        for piece in (*self.letters, *([self.insert] if self.insert else [])):
            if len(parse(str(piece)).layers) != 1:
                raise ConfigError(f"space {self.name!r} {piece!r} must be one layer, e.g. M or '[M,E]'")
        if self.base is not None and not any(str(x)[0] == self.replace_letter for x in parse(self.base).layers):
            raise ConfigError(f"space {self.name!r} base={self.base!r} has no {self.replace_letter!r} to replace")
        self._check_candidates()
        self._check_fields()

    def _check_numbers(self, key: str, values: tuple[Any, ...], least: int) -> None:
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"space {self.name!r} {key}={value!r} must be a whole number of {least} or more")

    def _check_names(self, key: str, values: tuple[Any, ...], allowed: Iterable[str]) -> None:
        names = list(allowed)
        for value in values:
            if value not in names:
                raise ConfigError(f"space {self.name!r} {key}={value!r} is unknown{suggest(str(value), names)}")

    def _check_candidates(self) -> None:
        names: set[str] = set()
        for index, entry in enumerate(self.candidates):
            given = [key for key in ("pattern", "motif", "preset") if isinstance(entry, Mapping) and key in entry]
            if len(given) != 1:
                raise ConfigError(
                    f"space {self.name!r} candidate {index} must be a mapping with one of pattern, motif and preset, "
                    f"got {entry!r}"
                )
            if given != ["preset"]:
                parse(str(entry[given[0]]))
            name = str(entry.get("name", index))
            if name in names:
                raise ConfigError(f"space {self.name!r} has two candidates called {name!r}; give each its own name")
            names.add(name)

    def _check_fields(self) -> None:
        known = {name for letter in BLOCKS for name in BLOCKS.get(letter).Config.field_names()} - {"d_model"}
        for key, choice in self.fields.items():
            letter, dot, name = key.rpartition(".")
            owners = BLOCKS.get(letter).Config.field_names() if dot and letter in BLOCKS else known
            if (dot and letter not in BLOCKS) or name not in owners:
                allowed = {*owners, *_KEYS}
                raise ConfigError(f"space {self.name!r} has no choice {key!r}{suggest(name if dot else key, allowed)}")
            _check_choice(f"space {self.name!r} {key}", choice)
            for block in {letter} if dot else {x for x in BLOCKS if name in BLOCKS.get(x).Config.field_names()}:
                for value in _ends(choice):
                    try:
                        BLOCKS.get(block).Config.check_value(name, value)
                    except ConfigError as error:
                        raise ConfigError(f"space {self.name!r} {key}: {error}") from None
        if self.split is not None:
            _check_choice(f"space {self.name!r} split", self.split)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Space:
        """Read a space's YAML; raises ConfigError naming the key, what was got and what is allowed."""
        given = {str(key): value for key, value in values.items()}
        if "replace" in given:
            given["replace_letter"] = given.pop("replace")
        own = {key: value for key, value in given.items() if key in cls.field_names() and key != "fields"}
        for key in ("letters", "motif_length", "requires", "n_inserted", "placement", "candidates", "baselines"):
            if key in own:
                own[key] = tuple(own[key]) if isinstance(own[key], (list, tuple)) else (own[key],)
        rest = {key: value for key, value in given.items() if key not in own}
        return cls.from_dict({**own, "fields": rest})

    def target(self, scale: Scale) -> int:
        """Return the active parameters that every candidate is matched to."""
        if scale.active_params is not None:
            return scale.active_params
        return _scaled_preset("moe_mamba", scale).cost().active_params

    def baseline(self, name: str, scale: Scale) -> Arch:
        """Return a preset scaled to width and depth and matched to the target, as trials 0 to k train it."""
        arch = _scaled_preset(name, scale)
        return fit(arch, self.target(scale), scale.multiple) if self.match else arch

    def propose(self, chooser: Chooser, scale: Scale) -> Proposal:
        """Draw one candidate. Raises MatchError when the drawn combination cannot meet the target or a rule."""
        if self.candidates:
            return self._listed(chooser, scale)
        choices: dict[str, Any] = {}
        pattern, fields, share = self._choices(chooser, scale, choices)
        arch = Arch.from_pattern(pattern, d_model=scale.d_model, vocab_size=scale.vocab_size, **fields)
        return Proposal(fit(arch, self.target(scale), scale.multiple, share) if self.match else arch, choices)

    def choose(self, chooser: Chooser, scale: Scale) -> None:
        """Draw one candidate's choices and build nothing: for those who want to know them first."""
        if self.candidates:
            self._candidate(chooser)
            return
        with contextlib.suppress(MatchError):  # of a rule; propose says it
            self._choices(chooser, scale, {})

    def _choices(
        self, chooser: Chooser, scale: Scale, choices: dict[str, Any]
    ) -> tuple[Pattern, dict[str, dict[str, Any]], float | None]:
        """Return pattern, block fields by letter, and the mixers' share; every choice is put into ``choices``."""
        pattern = self._pattern(chooser, scale, choices)
        letters = {slot.letter for slot in pattern.slots}
        missing = [letter for letter in self.requires if letter not in letters]
        if missing:
            raise MatchError(
                f"pattern '{pattern}' has no {' and no '.join(missing)}, which space {self.name!r} requires"
            )
        fields: dict[str, dict[str, Any]] = {}
        for key, choice in self.fields.items():
            letter, dot, name = key.rpartition(".")
            owners = [x for x in letters if name in BLOCKS.get(x).Config.field_names() and (not dot or x == letter)]
            if owners:
                choices[key] = _draw(chooser, key, choice)
                for owner in owners:
                    fields.setdefault(owner, {})[name] = choices[key]
        share = None
        if self.split is not None and share_free(pattern):
            choices["split"] = share = _draw(chooser, "split", self.split)
        return pattern, fields, share

    def _pattern(self, chooser: Chooser, scale: Scale, choices: dict[str, Any]) -> Pattern:
        def draw(name: str, options: Sequence[Any]) -> Any:
            choices[name] = options[0] if len(options) == 1 else chooser.suggest_categorical(name, options)
            return choices[name]

        if self.letters:
            # Longer than the depth would be cut: those lengths are the same space as the depth itself.
            lengths = sorted({min(length, scale.depth) for length in self.motif_length})
            length = draw("motif_length", lengths)
            pieces = [draw(f"slot{i}", self.letters) for i in range(length)]
            return _cycle(pieces, scale.depth)
        assert self.base is not None and self.insert is not None and self.replace_letter is not None
        base = _cycle([str(layer) for layer in parse(self.base).layers], scale.depth)
        slots = [i for i, layer in enumerate(base.layers) if str(layer)[0] == self.replace_letter]
        count = draw("n_inserted", [n for n in self.n_inserted if n <= len(slots)] or [0])
        where = draw("placement", self.placement) if 0 < count < len(slots) else self.placement[0]
        chosen = {slots[i] for i in place(where, count, len(slots))}
        pieces = [self.insert if i in chosen else str(layer) for i, layer in enumerate(base.layers)]
        return parse("".join(pieces))

    def _candidate(self, chooser: Chooser) -> tuple[str, list[str]]:
        names = [str(entry.get("name", index)) for index, entry in enumerate(self.candidates)]
        return chooser.suggest_categorical("candidate", names) if len(names) > 1 else names[0], names

    def _listed(self, chooser: Chooser, scale: Scale) -> Proposal:
        name, names = self._candidate(chooser)
        entry = dict(self.candidates[names.index(name)])
        entry.pop("name", None)
        share, motif = entry.pop("split", None), entry.pop("motif", None)
        if "preset" in entry:
            arch = _scaled_preset(entry.pop("preset"), scale, **entry)
        else:
            pieces = [str(layer) for layer in parse(motif or entry.pop("pattern")).layers]
            pattern = _cycle(pieces, scale.depth if motif else len(pieces))
            arch = Arch.from_pattern(pattern, d_model=scale.d_model, vocab_size=scale.vocab_size, **entry)
        arch = fit(arch, self.target(scale), scale.multiple, share) if self.match else arch
        return Proposal(arch, {"candidate": name}, name)

    def size(self, scale: Scale) -> int:
        """Return how many combinations can be drawn at most, equal architectures as often as they are spelled."""
        if self.candidates:
            return len(self.candidates)
        if self.letters:
            patterns: int = sum(len(self.letters) ** n for n in {min(x, scale.depth) for x in self.motif_length})
        else:
            assert self.base is not None
            layers = parse(self.base).layers
            slots = sum(str(layers[i % len(layers)])[0] == self.replace_letter for i in range(scale.depth))
            counts = [n for n in self.n_inserted if n <= slots] or [0]
            patterns = sum(len(self.placement) if 0 < n < slots else 1 for n in counts)
        for choice in (*self.fields.values(), *([self.split] if self.split is not None else [])):
            patterns *= len(_values(choice))
        return patterns


_KEYS = (*(name for name in Space.field_names() if name not in ("fields", "replace_letter")), "replace")


def load_space(name: str) -> Space:
    """Return the space of that name: a YAML of the package or of ./search_spaces; raises ConfigError with the list."""
    paths = dict(_space_files())
    if name not in paths:
        raise ConfigError(f"unknown search space {name!r}{suggest(name, paths)}")
    return Space.from_mapping({"name": name, **read_yaml(paths[name])})


def list_spaces() -> list[str]:
    """Return the names of all spaces: the package's own and those in ./search_spaces."""
    return sorted(dict(_space_files()))


def _space_files() -> Iterator[tuple[str, Path]]:
    for room in (Path(__file__).resolve().parent, Path("search_spaces")):
        yield from ((path.stem, path) for path in sorted(room.glob("*.yaml")))


def _scaled_preset(name: str, scale: Scale, **overrides: Any) -> Arch:
    arguments = preset_arguments(name)
    depth_of_block = len(preset(name).pattern) / int(arguments["n_blocks"] or 1)
    given: dict[str, Any] = {
        "d_model": scale.d_model,
        "n_blocks": max(1, round(scale.depth / depth_of_block)),
        "vocab_size": scale.vocab_size,
    }
    if "n_experts" in arguments:
        given["n_experts"] = scale.n_experts
    return preset(name, **{**given, **overrides})


def _cycle(pieces: Sequence[str], depth: int) -> Pattern:
    return parse("".join(pieces[i % len(pieces)] for i in range(depth)))


def _check_choice(where: str, choice: Any) -> None:
    if isinstance(choice, Mapping):
        unknown = set(choice) - {"low", "high", "step"}
        if unknown or not {"low", "high", "step"} <= set(choice):
            raise ConfigError(f"{where} as a range needs low, high and step, got {dict(choice)}")
        if not all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in choice.values()):
            raise ConfigError(f"{where} as a range needs numbers, got {dict(choice)}")
        if not choice["low"] <= choice["high"] or choice["step"] <= 0:
            raise ConfigError(f"{where} needs low <= high and step > 0, got {dict(choice)}")
        return
    if isinstance(choice, (list, tuple)) and not choice:
        raise ConfigError(f"{where} has an empty list of choices; give at least one value")
    for value in _values(choice):
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise ConfigError(f"{where} has the choice {value!r}; each must be a number, text, true, false or null")


def _ends(choice: Any) -> Sequence[Any]:
    """The values that must be allowed: all of a list, both ends of a range."""
    return [choice["low"], choice["high"]] if isinstance(choice, Mapping) else _values(choice)


def _values(choice: Any) -> Sequence[Any]:
    if isinstance(choice, Mapping):
        return range(int((choice["high"] - choice["low"]) / choice["step"] + 1e-9) + 1)
    return choice if isinstance(choice, (list, tuple)) else [choice]


def _draw(chooser: Chooser, name: str, choice: Any) -> Any:
    if isinstance(choice, Mapping):
        value = chooser.suggest_float(name, choice["low"], choice["high"], step=choice["step"])
        whole = all(isinstance(end, int) for end in choice.values())
        return round(value) if whole else round(value, 6)
    options = list(_values(choice))
    return options[0] if len(options) == 1 else chooser.suggest_categorical(name, options)


def reason_of(error: Exception) -> str:
    """Return an error's first line: the reason that a rejected candidate is recorded with."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
