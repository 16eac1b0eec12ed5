"""Search spaces: settings name the choices, this file turns drawn choices into an architecture of matched size.

Any sampler whose trial has ``suggest_categorical`` and ``suggest_float`` (an ``optuna.Trial`` fits) can draw from a
space. There are three shapes, distinguished by their keys::

    letters + motif_length     LetterSpace: a motif of letters (or '[M,E]', 'M{d_state=32}'), cycled to the depth
    base + replace + insert    PlacementSpace: a motif in which some slots of one letter become another: how many, where
    candidates                 CandidateSpace: a plain list of architectures, for ablations

In the first two, every other key is a choice for a block's field: ``n_experts: [1, 8, 32]`` or
``E.top_k: {low: 1, high: 2, step: 1}``.
"""

from __future__ import annotations

import contextlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NoReturn

from hybridnas.arch.arch import Arch, block_field
from hybridnas.arch.pattern import Pattern, parse
from hybridnas.arch.presets import DEFAULT_BASELINES, DEFAULT_REFERENCE, PRESETS, list_presets, preset, preset_arguments
from hybridnas.config import FrozenConfig, option
from hybridnas.errors import ConfigError, MatchError, PatternError, suggest
from hybridnas.registry import BLOCKS
from hybridnas.search_spaces.choice import Choice, Chooser, read_choice
from hybridnas.search_spaces.fit import STATE_TOLERANCE, fit, share_free, spread, with_state
from hybridnas.search_spaces.listing import space_file, space_settings
from hybridnas.search_spaces.placement import PLACEMENTS, place

# What decides which format holds an architecture. It reads and writes models, so it lies above this package: looked up
# where a space asks for it.
_FORMATS = "hybridnas.export.hf.fitting"


@dataclass(frozen=True, kw_only=True)
class Scale(FrozenConfig):
    """At which size a space is searched; the budget gives it."""

    d_model: int = option(doc="width of the residual stream [channels]", ge=8)
    depth: int = option(doc="residual sub-layers [count]", ge=1)
    vocab_size: int = option(256, "tokens of the data's tokenizer [count]", ge=2)
    n_experts: int = option(8, "experts of the presets that have some [count]", ge=1)
    active_params: int | None = option(
        None, "target; none: those of the space's reference at this scale [count per token]", ge=1
    )
    multiple: int = option(8, "sizes are multiples of this [channels]", ge=1)
    seq_len: int = option(256, "length at which state and FLOPs are stated [tokens]", ge=1)


@dataclass(frozen=True)
class Proposal:
    """A drawn candidate: the choices made, and the architecture matched to the target."""

    arch: Arch
    choices: Mapping[str, Any]
    name: str | None = None


@dataclass(frozen=True)
class Candidate:
    """One entry of a list: a preset, a motif that is cycled to the depth, or a whole pattern, with fields."""

    name: str
    kind: str  # preset | motif | pattern
    text: str  # the preset's name, or the motif or pattern
    split: float | None
    fields: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Space(FrozenConfig, ABC):
    """What all spaces have, and the protocol that a search uses; :meth:`from_mapping` reads one of the three shapes."""

    prefix: ClassVar[str] = "space"

    name: str = option(doc="name of the space [text]")
    description: str = option("", "question that the space asks [text]")
    reference: str | None = option(
        DEFAULT_REFERENCE, "preset that candidates are sized like and compared with; none: budget.active_params [name]"
    )
    baselines: tuple[str, ...] = option(
        DEFAULT_BASELINES, "presets trained first, at the same active parameters [names]"
    )
    equal: tuple[str, ...] = option(
        (), "what else is made equal to the reference's: the state of a sequence [names]", choices=("state_bytes",)
    )
    state_bytes: int | None = option(
        None, "state for equal: [state_bytes], at the budget's seq_len; none: the reference's [bytes]", ge=1
    )
    exportable: str | None = option(
        None, "format of python -m hybridnas.export that must hold a candidate, such as nemotron_h [name]"
    )
    match: bool = option(True, "whether widths are sized to the target of active parameters [yes/no]")
    table: Mapping[str, Any] = option(
        {}, "results of all candidates, if known; read by the package tabular, opaque here [mapping]"
    )

    @classmethod
    def label(cls) -> str:
        return "space"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Space:
        """Read a space as its YAML gives it; raises ConfigError naming the key, what was got and what is allowed.

        Keys of another shape that are empty (``letters: []``) and choices that are null are left out.
        """
        return _from_mapping(values)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_names("reference", () if self.reference is None else (self.reference,), list_presets())
        self._check_names("baselines", self.baselines, list_presets())
        if self.exportable is not None:
            self._check_names("exportable", (self.exportable,), importlib.import_module(_FORMATS).formats())

    def target(self, scale: Scale) -> int:
        """Return the active parameters that every candidate is matched to [count per token].

        Those that the budget gives, else those of the reference at this scale; raises ConfigError without either.
        """
        if scale.active_params is not None:
            return scale.active_params
        if self.reference is None:
            raise ConfigError(
                f"space {self.name!r} has no reference to take the size from, so budget.active_params must give it, "
                f"e.g. budget.active_params=100000",
                field="budget.active_params",
                got=None,
                allowed=">= 1",
            )
        return _reference(PRESETS.get(self.reference).build, self.reference, scale).cost().active_params

    def baseline(self, name: str, scale: Scale) -> Arch:
        """Return a preset scaled to width and depth and matched to the target, as the first trials train it.

        A candidate that cannot meet the target is drawn anew; a preset is sized in finer steps than ``scale.multiple``.
        """
        arch, multiple = scaled_preset(name, scale), scale.multiple
        try:
            return self._matched(arch, scale)
        except MatchError:
            while multiple > 1:
                multiple //= 2
                with contextlib.suppress(MatchError):
                    return self._matched(arch, scale.replace(multiple=multiple))
            raise

    @abstractmethod
    def propose(self, chooser: Chooser, scale: Scale) -> Proposal:
        """Draw one candidate. Raises MatchError when the drawn combination cannot meet the target or a rule."""

    @abstractmethod
    def choose(self, chooser: Chooser, scale: Scale) -> None:
        """Draw one candidate's choices and build nothing, to know them before an architecture is made."""

    def _held(self, arch: Arch) -> Arch:
        """Return the architecture with what the class of ``exportable`` has beside the sizes and options given.

        Raises MatchError where the class has not the pattern, or another value of an option that was drawn or given.
        """
        if self.exportable is None:
            return arch
        try:
            found: Arch = importlib.import_module(_FORMATS).completed(arch, self.exportable)
        except ConfigError as error:
            raise self._unfit(error) from None
        return found

    def _checked(self, arch: Arch) -> Arch:
        """Return the architecture if the class of ``exportable`` holds it; raises MatchError."""
        if self.exportable is not None:
            try:
                importlib.import_module(_FORMATS).fit(arch, self.exportable)
            except ConfigError as error:
                raise self._unfit(error) from None
        return arch

    def _unfit(self, error: ConfigError) -> MatchError:
        return MatchError(
            f"{error}, and space {self.name!r} sets exportable={self.exportable}",
            field="space.exportable",
            got=error.got,
            allowed=error.allowed,
        )

    def check(self, scale: Scale) -> None:
        """Raise ConfigError where no candidate of this scale can meet the space's rules; before anything is drawn."""

    def _matched(self, arch: Arch, scale: Scale, share: float | None = None) -> Arch:
        state = self._state_target(scale) if "state_bytes" in self.equal else None
        if state is not None:
            arch = with_state(arch, state, scale.seq_len)
        if not self.match:
            return arch
        found = fit(arch, self.target(scale), scale.multiple, share)
        got = found.cost(scale.seq_len).state_bytes
        if state is not None and abs(got - state) > STATE_TOLERANCE * state:
            raise MatchError(
                f"pattern '{found.pattern}' cannot have the target's active parameters and its state: sizing the "
                f"mixers moves the state from {state:,} to {got:,} bytes; add an MLP or experts, which have no state",
                field="space.equal",
                got=got,
                allowed=state,
            )
        return found

    def _state_target(self, scale: Scale) -> int:
        if self.state_bytes is not None:
            return self.state_bytes
        if self.reference is None:
            self._refuse("state_bytes", None, ">= 1", "has no reference whose state is the measure; give state_bytes")
        reference = _reference(PRESETS.get(self.reference).build, self.reference, scale)
        return reference.cost(scale.seq_len).state_bytes

    def _check_names(self, key: str, values: Iterable[Any], allowed: Iterable[str]) -> None:
        names = tuple(allowed)
        for value in values:
            if value not in names:
                self._refuse(key, value, names, f"{key}={value!r} is unknown{suggest(str(value), names)}")

    def _parsed(self, key: str, text: str, *, layers: int | None = None) -> Pattern:
        """Parse a piece of a pattern; an error opens with the space and the key."""
        try:
            pattern = parse(str(text))
        except PatternError as error:
            raise PatternError(
                f"space {self.name!r} {key}: {error}", field=f"space.{key}", got=text, allowed=error.allowed
            ) from None
        if layers is not None and len(pattern.layers) != layers:
            self._refuse(key, text, "one layer", f"{key} {text!r} must be one layer, e.g. M or '[M,E]'")
        return pattern

    def _refuse(self, key: str, got: Any, allowed: Any, problem: str) -> NoReturn:
        raise ConfigError(f"space {self.name!r} {problem}", field=f"space.{key}", got=got, allowed=allowed)


@dataclass(frozen=True, kw_only=True)
class _PatternSpace(Space):
    """What the two shapes share that draw a pattern, and then values for fields of its blocks."""

    requires: tuple[str, ...] = option((), "letters of which a pattern needs at least one [letters]")
    min_attention: int = option(0, "attention layers that a pattern needs at least, windowed ones too [count]", ge=0)
    max_mixers: int | None = option(
        None, "different letters beside attention, MLP and experts that a pattern may have at most [count]", ge=0
    )
    split: Choice | None = option(None, "share of active parameters in mixers beside experts or MLPs [fractions]")
    fields: Mapping[str, Choice] = option({}, "choices of block fields, by field or LETTER.field [mapping]")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_names("requires", self.requires, BLOCKS)
        for key, choice in self.fields.items():
            self._check_choice(key, choice)

    def _check_choice(self, key: str, choice: Choice) -> None:
        letter, dot, name = key.rpartition(".")
        letters = [letter] if dot else list(BLOCKS)
        owners = {x: field for x in letters if x in BLOCKS and (field := block_field(x, name))}
        if not owners or name == "d_model":
            known = {n for x in BLOCKS if not dot or x == letter for n in BLOCKS.get(x).Config.field_names()} - {
                "d_model"
            }
            allowed = tuple(sorted({*known, *_keys(type(self))}))
            wanted = name if dot else key
            self._refuse(key, key, allowed, f"has no choice {key!r}{suggest(wanted, allowed)}")
        for owner, field in owners.items():
            for value in choice.ends:
                try:
                    BLOCKS.get(owner).Config.check_value(field, value)
                except ConfigError as error:
                    self._refuse(key, value, error.allowed, f"{key}: {error}")

    def _check_letters(self, *pieces: str) -> None:
        """Refuse choices for a letter that none of these pieces of patterns holds."""
        letters = sorted({slot.letter for piece in pieces for slot in parse(piece).slots})
        lacking = [key for key in self.fields if "." in key and key.partition(".")[0] not in letters]
        if lacking:
            problem = f"has choices for {' and '.join(lacking)}, but only the letters {', '.join(letters)}"
            self._refuse(lacking[0], lacking[0], tuple(letters), f"{problem}; set what is not needed to null")

    def check(self, scale: Scale) -> None:
        most = self._most_attention(scale)
        if self.min_attention > most:
            problem = f"sets min_attention={self.min_attention}, but its patterns of budget.depth={scale.depth} have"
            self._refuse("min_attention", self.min_attention, f"0 to {most}", f"{problem} 0 to {most} attention layers")

    def propose(self, chooser: Chooser, scale: Scale) -> Proposal:
        choices: dict[str, Any] = {}
        pattern, fields, share = self._choices(chooser, scale, choices)
        arch = self._held(Arch.from_pattern(pattern, d_model=scale.d_model, vocab_size=scale.vocab_size, **fields))
        arch = self._matched(arch, scale, share)
        ratios = self._width_ratios(choices, scale)
        if self.match and len(set(ratios)) > 1:
            arch = spread(arch, self.target(scale), ratios, scale.multiple)
        return Proposal(self._checked(arch), choices)

    def _width_ratios(self, choices: Mapping[str, Any], scale: Scale) -> list[float]:
        """Return the drawn proportions of the layers' expert and MLP widths, one per layer; none: no proportions."""
        return []

    def choose(self, chooser: Chooser, scale: Scale) -> None:
        with contextlib.suppress(MatchError):  # of a letter that is required and missing; propose reports it
            self._choices(chooser, scale, {})

    def _choices(
        self, chooser: Chooser, scale: Scale, choices: dict[str, Any]
    ) -> tuple[Pattern, dict[str, dict[str, Any]], float | None]:
        """Return pattern, block fields by letter, and the mixers' share; every choice is put into ``choices``."""
        pattern = self._pattern(chooser, scale, choices)
        letters = {slot.letter for slot in pattern.slots}
        self._check_rules(pattern)
        missing = [letter for letter in self.requires if letter not in letters]
        if missing:
            raise MatchError(
                f"pattern '{pattern}' has no {' and no '.join(missing)}, which space {self.name!r} requires",
                field="space.requires",
                got=str(pattern),
                allowed=self.requires,
            )
        fields: dict[str, dict[str, Any]] = {}
        for key, choice in self._common().items():
            letter, dot, name = key.rpartition(".")
            owners = [x for x in letters if block_field(x, name) and (not dot or x == letter)]
            if owners:
                choices[key] = choice.draw(chooser, key)
                for owner in owners:
                    fields.setdefault(owner, {})[name] = choices[key]
        share = None
        if self.split is not None and share_free(pattern):
            choices["split"] = share = self.split.draw(chooser, "split")
        return pattern, fields, share

    def _common(self) -> Mapping[str, Choice]:
        """Return the choices of block fields that hold for the whole pattern."""
        return self.fields

    def _check_rules(self, pattern: Pattern) -> None:
        """Raise MatchError for a pattern that has too little attention or too many kinds of mixers."""
        role = {slot.letter: BLOCKS.get(slot.letter).role for slot in pattern.slots}
        attention = sum(role[slot.letter] == "attention" for slot in pattern.slots)
        if attention < self.min_attention:
            raise MatchError(
                f"pattern '{pattern}' has {attention} attention layers, and space {self.name!r} sets "
                f"min_attention={self.min_attention}",
                field="space.min_attention",
                got=attention,
                allowed=f">= {self.min_attention}",
            )
        mixers = sorted(letter for letter in role if role[letter] == "mixer")
        if self.max_mixers is not None and len(mixers) > self.max_mixers:
            raise MatchError(
                f"pattern '{pattern}' has {len(mixers)} kinds of mixers ({', '.join(mixers)}), and space "
                f"{self.name!r} sets max_mixers={self.max_mixers}",
                field="space.max_mixers",
                got=tuple(mixers),
                allowed=f"<= {self.max_mixers}",
            )

    @abstractmethod
    def _most_attention(self, scale: Scale) -> int:
        """Return the attention layers of the pattern that has most of them at a scale [count]."""

    @abstractmethod
    def _pattern(self, chooser: Chooser, scale: Scale, choices: dict[str, Any]) -> Pattern:
        """Draw the pattern and put what was chosen into ``choices``."""


@dataclass(frozen=True, kw_only=True)
class LetterSpace(_PatternSpace):
    """A motif whose every slot holds one of the letters, cycled to the depth."""

    letters: tuple[str, ...] = option(doc="what a slot of the motif may hold [pattern pieces]")
    motif_length: tuple[int, ...] = option((), "lengths of the motif that is cycled to the depth [slots]", ge=1)
    per_slot: tuple[str, ...] = option((), "choices of block fields drawn for each slot of the motif apart [names]")
    width_ratio: Choice | None = option(
        None, "drawn for each slot: its expert or MLP width relative to the others' [numbers]"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in self.per_slot:
            if key not in self.fields:
                problem = f"per_slot names {key!r}, which has no choices; add {key}: [...]"
                self._refuse("per_slot", key, tuple(self.fields), problem)
            if self.match and key.rpartition(".")[2] in ("d_expert", "d_ff"):
                problem = f"per_slot names {key!r}, which matching sets; use width_ratio: [0.5, 1, 2], or match: false"
                self._refuse("per_slot", key, "fields that matching leaves alone", problem)
        if self.width_ratio is not None:
            for value in self.width_ratio.ends:
                if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
                    problem = f"width_ratio has {value!r}, which must be a number above 0"
                    self._refuse("width_ratio", value, "> 0", problem)
        if not self.motif_length:
            problem = "has letters, so it needs motif_length, e.g. motif_length: [2, 4]"
            self._refuse("motif_length", self.motif_length, "whole numbers of 1 or more", problem)
        for piece in self.letters:
            self._parsed("letters", piece, layers=1)
        self._check_letters(*self.letters)

    def lengths(self, scale: Scale) -> list[int]:
        """Return the different lengths that a motif can have at a scale; a longer one would be cut to the depth."""
        return sorted({min(length, scale.depth) for length in self.motif_length})

    def _most_attention(self, scale: Scale) -> int:
        return scale.depth * max((_attention(piece) for piece in self.letters), default=0)

    def _pattern(self, chooser: Chooser, scale: Scale, choices: dict[str, Any]) -> Pattern:
        length = _drawn(chooser, "motif_length", self.lengths(scale), choices)
        pieces = [_drawn(chooser, f"slot{i}", self.letters, choices) for i in range(length)]
        motif = parse("".join(pieces))
        values: list[dict[tuple[str, str], Any]] = [{} for _ in pieces]  # of each slot: (letter, field) -> value
        for i, letters in enumerate({slot.letter for slot in parse(piece).slots} for piece in pieces):
            for key in self.per_slot:
                letter, dot, name = key.rpartition(".")
                owners = [(x, field) for x in letters if (not dot or x == letter) and (field := block_field(x, name))]
                if owners:
                    choices[f"{key}.{i}"] = value = self.fields[key].draw(chooser, f"{key}.{i}")
                    values[i].update(dict.fromkeys(owners, value))
            if self.width_ratio is not None and any(BLOCKS.get(x).role == "feed_forward" for x in letters):
                choices[f"width_ratio.{i}"] = self.width_ratio.draw(chooser, f"width_ratio.{i}")
        motif = motif.with_args(lambda i, slot: {f: v for (x, f), v in values[i].items() if x == slot.letter})
        return _cycle([str(layer) for layer in motif.layers], scale.depth)

    def _common(self) -> Mapping[str, Choice]:
        return {key: choice for key, choice in self.fields.items() if key not in self.per_slot}

    def _width_ratios(self, choices: Mapping[str, Any], scale: Scale) -> list[float]:
        length = choices["motif_length"]
        return [float(choices.get(f"width_ratio.{i % length}", 1.0)) for i in range(scale.depth)]


@dataclass(frozen=True, kw_only=True)
class PlacementSpace(_PatternSpace):
    """A base motif, cycled to the depth, in which some of the slots of one letter hold another piece."""

    base: str = option(doc="motif that is cycled to the depth before slots are replaced [pattern]")
    replace_letter: str | None = option(None, "letter of the base whose slots may be replaced; YAML: replace [letter]")
    insert: str | None = option(None, "what replaces it [pattern piece]")
    n_inserted: tuple[int, ...] = option((), "how many slots are replaced [count]", ge=0)
    placement: tuple[str, ...] = option(("spread",), "where the replaced slots lie [names]", choices=PLACEMENTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {"replace": self.replace_letter, "insert": self.insert, "n_inserted": self.n_inserted}
        if missing := [key for key, value in given.items() if not value]:
            self._refuse(missing[0], None, tuple(given), "has a base, so it needs insert, replace and n_inserted")
        self._parsed("insert", self.insert or "", layers=1)
        layers = self._parsed("base", self.base).layers
        if not any(str(layer)[0] == self.replace_letter for layer in layers):
            problem = f"base={self.base!r} has no {self.replace_letter!r} to replace"
            self._refuse("replace", self.replace_letter, tuple(sorted({str(layer)[0] for layer in layers})), problem)
        self._check_letters(self.base, self.insert or "")

    def _most_attention(self, scale: Scale) -> int:
        base, slots, counts = self._at(scale)
        gained = [_attention(str(self.insert)) - _attention(str(base.layers[i])) for i in slots]
        return _attention(str(base)) + max(sum(sorted(gained)[len(gained) - count :]) for count in counts)

    def _at(self, scale: Scale) -> tuple[Pattern, list[int], list[int]]:
        """Return the base at a scale, the places of the slots that may be replaced, and how many may be."""
        base = _cycle([str(layer) for layer in parse(self.base).layers], scale.depth)
        slots = [i for i, layer in enumerate(base.layers) if str(layer)[0] == self.replace_letter]
        return base, slots, [n for n in self.n_inserted if n <= len(slots)] or [0]

    def _pattern(self, chooser: Chooser, scale: Scale, choices: dict[str, Any]) -> Pattern:
        base, slots, counts = self._at(scale)
        count = _drawn(chooser, "n_inserted", counts, choices)
        partly = 0 < count < len(slots)
        where = _drawn(chooser, "placement", self.placement, choices) if partly else self.placement[0]
        chosen = {slots[i] for i in place(where, count, len(slots))}
        return parse("".join(str(self.insert if i in chosen else layer) for i, layer in enumerate(base.layers)))


@dataclass(frozen=True, kw_only=True)
class CandidateSpace(Space):
    """A list of named architectures; the only choice is which."""

    candidates: tuple[Candidate, ...] = option(doc="named architectures: pattern, motif or preset, fields [mappings]")

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [entry.name for entry in self.candidates]
        for entry in self.candidates:
            if names.count(entry.name) > 1:
                problem = f"has two candidates called {entry.name!r}; give each its own name"
                self._refuse("candidates", entry.name, None, problem)
            if entry.kind == "preset":
                self._check_names("candidates", (entry.text,), list_presets())
            else:
                self._parsed("candidates", entry.text)

    def propose(self, chooser: Chooser, scale: Scale) -> Proposal:
        chosen = self._chosen(chooser)
        if chosen.kind == "preset":
            arch = scaled_preset(chosen.text, scale, **chosen.fields)
        else:
            pieces = [str(layer) for layer in parse(chosen.text).layers]
            pattern = _cycle(pieces, scale.depth if chosen.kind == "motif" else len(pieces))
            arch = Arch.from_pattern(pattern, d_model=scale.d_model, vocab_size=scale.vocab_size, **chosen.fields)
        arch = self._checked(self._matched(self._held(arch), scale, chosen.split))
        return Proposal(arch, {"candidate": chosen.name}, chosen.name)

    def choose(self, chooser: Chooser, scale: Scale) -> None:
        self._chosen(chooser)

    def _chosen(self, chooser: Chooser) -> Candidate:
        names = [entry.name for entry in self.candidates]
        name = chooser.suggest_categorical("candidate", names) if len(names) > 1 else names[0]
        return self.candidates[names.index(name)]


SHAPES: dict[str, type[Space]] = {"letters": LetterSpace, "base": PlacementSpace, "candidates": CandidateSpace}


def load_space(name: str) -> Space:
    """Return the space of that name: the package's, a registered one, or ``./search_spaces/NAME.yaml``.

    Raises ConfigError with the list of names, and errors of a file that name the file.
    """
    settings = space_settings(name)
    try:
        return Space.from_mapping(settings)
    except (ConfigError, PatternError) as error:
        if (path := space_file(name)) is None:
            raise
        raise type(error)(f"{path}: {error}", field=error.field, got=error.got, allowed=error.allowed) from None


def _from_mapping(values: Mapping[str, Any]) -> Space:
    given = {str(key): value for key, value in values.items() if value is not None or key == "reference"}
    name = given.get("name", "")
    foreign = {key for shape in SHAPES.values() for key in _keys(shape)}
    own_alone = foreign - set(Space.field_names())
    given = {key: value for key, value in given.items() if key not in own_alone or not _empty(value)}
    shapes = [key for key in SHAPES if key in given]
    if len(shapes) != 1:
        for key in given:
            meant = suggest(key, foreign).startswith("; did you mean")
            if key not in foreign and meant:
                raise ConfigError(
                    f"space {name!r} has no key {key!r}{suggest(key, foreign)}",
                    field=f"space.{key}",
                    got=key,
                    allowed=tuple(sorted(foreign)),
                )
        raise ConfigError(
            f"space {name!r} needs exactly one of letters (with motif_length), base (with insert) "
            f"and candidates, got {len(shapes)}",
            field="space",
            got=tuple(shapes),
            allowed=tuple(SHAPES),
        )
    shape = SHAPES[shapes[0]]
    own = {key: value for key, value in given.items() if key in _keys(shape)}
    rest = {key: value for key, value in given.items() if key not in own}
    if "replace" in own:
        own["replace_letter"] = own.pop("replace")
    for key in rest:
        if key in foreign or not issubclass(shape, _PatternSpace):
            owner = next((shape for shape, cls in SHAPES.items() if key in _keys(cls)), "letters or base")
            raise ConfigError(
                f"space {name!r} has {shapes[0]}, which take no {key!r}; that belongs to a space with {owner}",
                field=f"space.{key}",
                got=key,
                allowed=tuple(sorted(_keys(shape))),
            )
    if rest:
        own["fields"] = {
            key: read_choice(value, f"space {name!r} {key}", f"space.{key}") for key, value in rest.items()
        }
    for key in ("split", "width_ratio"):
        if key in own:
            own[key] = read_choice(own[key], f"space {name!r} {key}", f"space.{key}")
    if "candidates" in own:
        own["candidates"] = tuple(_candidate(name, index, entry) for index, entry in enumerate(own["candidates"]))
    return shape.from_dict(own)


def _candidate(space: Any, index: int, entry: Any) -> Candidate:
    kinds = ("pattern", "motif", "preset")
    given = [key for key in kinds if isinstance(entry, Mapping) and key in entry]
    if len(given) != 1:
        raise ConfigError(
            f"space {space!r} candidate {index} must be a mapping with one of pattern, motif and preset, got {entry!r}",
            field="space.candidates",
            got=entry,
            allowed=kinds,
        )
    fields: dict[str, Any] = {}
    for key, value in entry.items():
        if key in ("name", "split", given[0]):
            continue
        letter, dot, name = str(key).rpartition(".")
        if name in ("d_model", "vocab_size") or (dot and (letter not in BLOCKS or not block_field(letter, name))):
            known = BLOCKS.get(letter).Config.field_names() if letter in BLOCKS else tuple(BLOCKS)
            whose = f"block {letter}" if letter in BLOCKS else "a candidate"
            allowed = tuple(sorted({*known} - {"d_model"}))
            raise ConfigError(
                f"space {space!r} candidate {index} sets {key!r}, but {whose} has no such field here (width and "
                f"vocabulary are the budget's and the data's); allowed: {', '.join(allowed)}",
                field="space.candidates",
                got=key,
                allowed=allowed,
            )
        if name in BLOCKS and not isinstance(value, Mapping):
            raise ConfigError(
                f"space {space!r} candidate {index} sets {key}={value!r}, which must be a mapping of the letter's "
                f"fields, {key}: {{field: value}}",
                field="space.candidates",
                got=value,
                allowed="a mapping of fields",
            )
        if dot:  # E.router is the field of one letter, as in a space with choices
            fields[letter] = {**fields.get(letter, {}), name: value}
        else:
            fields[name] = {**fields.get(name, {}), **value} if isinstance(value, Mapping) else value
    return Candidate(str(entry.get("name", index)), given[0], str(entry[given[0]]), entry.get("split"), fields)


def _keys(shape: type[Space]) -> set[str]:
    """Return the keys of a shape's YAML."""
    names = {name for name in shape.field_names() if name not in ("fields", "replace_letter")}
    return names | ({"replace"} if issubclass(shape, PlacementSpace) else set())


def _attention(text: str) -> int:
    """Return how many attention layers a piece of a pattern has."""
    return sum(BLOCKS.get(slot.letter).role == "attention" for slot in parse(text).slots)


def _empty(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict)) and not value


@lru_cache(maxsize=64)
def _reference(build: Callable[..., Arch], name: str, scale: Scale) -> Arch:
    """Return :func:`scaled_preset`, remembered: every draw asks for the reference. ``build``: the preset's function."""
    return scaled_preset(name, scale)


def scaled_preset(name: str, scale: Scale, **overrides: Any) -> Arch:
    """Return a preset at a scale's width, depth and vocabulary, not matched to any target.

    One without the argument ``n_blocks`` keeps its depth.
    """
    arguments = preset_arguments(name)
    given: dict[str, Any] = {"d_model": scale.d_model, "vocab_size": scale.vocab_size}
    if arguments.get("n_blocks"):
        layers_per_block = len(preset(name).pattern) / int(arguments["n_blocks"] or 1)
        given["n_blocks"] = max(1, round(scale.depth / layers_per_block))
    if "n_experts" in arguments:
        given["n_experts"] = scale.n_experts
    return preset(name, **{**given, **overrides})


def _drawn(chooser: Chooser, name: str, options: Sequence[Any], choices: dict[str, Any]) -> Any:
    choices[name] = options[0] if len(options) == 1 else chooser.suggest_categorical(name, options)
    return choices[name]


def _cycle(pieces: Sequence[str], depth: int) -> Pattern:
    return parse("".join(pieces[i % len(pieces)] for i in range(depth)))


def reason_of(error: Exception) -> str:
    """Return an error's first line: the reason that a rejected candidate is recorded with."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
