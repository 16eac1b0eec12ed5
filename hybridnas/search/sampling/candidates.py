"""Whole candidates of a space: all choices on one way through it, and the architecture that they lead to.

Optuna's samplers draw parameter by parameter, repeat points, and treat two spellings of one architecture as two
points. Here a candidate is drawn completely, identified by its architecture, and drawn again while the study has that
architecture already or no architecture follows the space's rules.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hybridnas.arch.arch import Arch
from hybridnas.errors import HybridNASError
from hybridnas.search_spaces.space import Proposal, Scale, Space, reason_of
from hybridnas.study.objectives import broken, counted, violation

if TYPE_CHECKING:
    from hybridnas.search.history import History

REDRAWS = 8  # by the sampler itself: one that has settled on a point gives it again and again
RANDOM_REDRAWS = 48  # then evenly from the space; where all of these are known, the space is as good as exhausted
FURTHER_REDRAWS = 2000  # evenly, where some broke a rule or a limit: enough where one in 500 keeps them

RULES = ("requires", "min_attention", "max_mixers", "exportable")  # fields of a space that refuse patterns

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One choice as the space offers it: its values in order; ``grid`` is (low, high, step) where it is a range."""

    options: tuple[Any, ...]
    grid: tuple[float, float, float] | None = None

    @classmethod
    def range(cls, low: float, high: float, step: float) -> Parameter:
        """Return the parameter of a range, both ends included."""
        count = int((high - low) / step + 1e-9) + 1
        return cls(tuple(round(low + step * index, 9) for index in range(count)), (low, high, step))

    def index(self, value: Any) -> int:
        """Return the place of a value among the options: the nearest one of a range. Raises ValueError for others."""
        if self.grid is not None:
            return min(range(len(self.options)), key=lambda index: abs(self.options[index] - value))
        return self.options.index(value)

    def allows(self, value: Any) -> bool:
        """Whether the value is one of the options."""
        if self.grid is not None:
            return isinstance(value, (int, float)) and abs(self.options[self.index(value)] - value) < 1e-6
        return value in self.options

    @property
    def ordered(self) -> bool:
        """Whether all options are numbers, so that a value has a next one."""
        return all(isinstance(option, (int, float)) and not isinstance(option, bool) for option in self.options)


@dataclass(frozen=True)
class Drawn:
    """The choices that were made on one way through a space, and what each was chosen from."""

    params: dict[str, Any]
    parameters: dict[str, Parameter]


class Fixed:
    """A chooser whose choices were made before; raises KeyError for one that was not."""

    def __init__(self, choices: Params) -> None:
        self.choices = choices

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.choices[name]

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float:
        return float(self.choices[name])


class _Asking:
    """A chooser that asks a function once for every choice and remembers the answers."""

    def __init__(self, ask: Callable[[str, Parameter], Any]) -> None:
        self.ask = ask
        self.drawn = Drawn({}, {})

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._take(name, Parameter(tuple(choices)))

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float:
        assert step is not None, "spaces have stepped ranges alone"
        return float(self._take(name, Parameter.range(low, high, step)))

    def _take(self, name: str, parameter: Parameter) -> Any:
        if name not in self.drawn.params:
            value = self.ask(name, parameter)
            if parameter.grid is not None:  # one spelling of a number, whichever way it was computed
                value = parameter.options[parameter.index(value)]
            self.drawn.params[name] = value
            self.drawn.parameters[name] = parameter
        return self.drawn.params[name]


@dataclass(frozen=True)
class Candidate:
    """A set of choices and what became of it: an architecture, or the reason why there is none."""

    key: str  # the architecture's fingerprint; of an infeasible candidate its choices
    params: Params  # what a sampler chose
    choices: Params  # the same with what the space chose alone
    arch: Arch | None
    pattern: str = ""  # canonical
    cost: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reason: str | None = None  # why it is infeasible
    breaks: str = ""  # the rule or limit that makes it infeasible, such as requires, size or max_state_bytes
    preset: str | None = None
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)  # counted, where there are limits

    @property
    def fingerprint(self) -> str:
        """The architecture's fingerprint; empty where there is none."""
        return "" if self.arch is None else self.key


def _nothing(candidate: Candidate) -> str | None:
    """Return what limit a candidate will pass where none is measured; a function, so that processes can share it."""
    return None


class Candidates:
    """The candidates of a space at one scale; remembers them, because matching costs milliseconds.

    ``check`` raises a HybridNASError for an architecture that cannot be trained, such as one that a table lacks.
    ``limits``: those that follow from an architecture; a candidate that passes one is infeasible, a preset is not.
    ``state_length``: context at which the state counts [tokens]; None: that of the scale.
    """

    def __init__(
        self,
        space: Space,
        scale: Scale,
        check: Callable[[Arch], None] | None = None,
        *,
        limits: Mapping[str, float] | None = None,
        state_length: int | None = None,
    ) -> None:
        self.space, self.scale = space, scale
        self.limits, self.state_length = dict(limits or {}), state_length or scale.seq_len
        self.unlikely: Callable[[Candidate], str | None] = _nothing  # which measured limit it will pass
        self._check = check
        self._known: dict[str, Candidate] = {}
        self._drawn: dict[str, Drawn] = {}
        self._allowed: Container[str] | None = None  # keys; None: all

    def only(self, keys: Container[str]) -> Candidates:
        """Return the candidates of which all but these architectures are infeasible; they share what is remembered."""
        found = Candidates(self.space, self.scale, self._check, limits=self.limits, state_length=self.state_length)
        found._known, found._drawn, found._allowed = self._known, self._drawn, keys
        return found

    def of(self, params: Params) -> Candidate:
        """Return what ``params`` lead to."""
        key = json.dumps(dict(params), sort_keys=True)
        if key not in self._known:
            found = self._make(key, params, lambda: self.space.propose(Fixed(params), self.scale))
            self._known[key] = self._within(key, found)
        candidate = self._known[key]
        if self._allowed is None or candidate.key in self._allowed or candidate.arch is None:
            return candidate
        reason = f"pattern '{candidate.pattern}' at these sizes has no known score"
        return dataclasses.replace(
            candidate, key=f"infeasible {key}", arch=None, pattern="", reason=reason, breaks="unknown"
        )

    def recorded(self, choices: Params) -> Candidate:
        """Return what stored choices lead to."""
        return self.of(self.drawn(choices).params)

    def preset(self, name: str) -> Candidate:
        """Return a preset at the scale of the space."""
        key = f"preset {name}"
        if key not in self._known:
            found = self._make(key, {}, lambda: Proposal(self.space.baseline(name, self.scale), {}, name))
            self._known[key] = dataclasses.replace(found, preset=name)
        return self._known[key]

    def _make(self, key: str, params: Params, propose: Callable[[], Proposal]) -> Candidate:
        try:
            proposal = propose()
            if self._check is not None:
                self._check(proposal.arch)
        except HybridNASError as error:
            return Candidate(
                f"infeasible {key}", dict(params), dict(params), None, reason=reason_of(error), breaks=_rule(error)
            )
        arch = proposal.arch
        cost = dataclasses.asdict(arch.cost(self.scale.seq_len))
        return Candidate(arch.fingerprint(), dict(params), dict(proposal.choices), arch, str(arch.pattern), cost)

    def values(self, candidate: Candidate) -> dict[str, float]:
        """Return what is counted of a candidate that has an architecture, its state at ``state_length``."""
        assert candidate.arch is not None
        state_bytes = candidate.cost["state_bytes"]
        if self.state_length != self.scale.seq_len:
            state_bytes = candidate.arch.cost(self.state_length).state_bytes
        return counted(candidate.cost, state_bytes)

    def _within(self, key: str, candidate: Candidate) -> Candidate:
        """Return the candidate, infeasible where it passes a limit."""
        if candidate.arch is None or not self.limits:
            return candidate
        values = self.values(candidate)
        over = broken(self.limits, values)
        if not over:
            return dataclasses.replace(candidate, values=values)
        reason = violation(self.limits, values)
        return dataclasses.replace(
            candidate, key=f"infeasible {key}", arch=None, reason=reason, breaks=over[0], values=values
        )

    def walk(self, ask: Callable[[str, Parameter], Any]) -> Drawn:
        """Return all choices on one way through the space, each asked for."""
        asking = _Asking(ask)
        self.space.choose(asking, self.scale)
        return asking.drawn

    def drawn(self, choices: Params) -> Drawn:
        """Return stored choices as a sampler made them; nothing where they are of another space."""
        key = json.dumps(dict(choices), sort_keys=True)
        if key not in self._drawn:
            try:
                self._drawn[key] = self.walk(lambda name, parameter: _stored(choices, name, parameter))
            except KeyError:
                self._drawn[key] = Drawn({}, {})
        return self._drawn[key]


def _rule(error: HybridNASError) -> str:
    """Return the name of the rule that a proposal broke: of the space, or that no sizes meet the target."""
    field = str(error.field or "")
    return field.removeprefix("space.") if field.startswith("space.") else "size"


def _stored(choices: Params, name: str, parameter: Parameter) -> Any:
    if not parameter.allows(choices[name]):
        raise KeyError(name)
    return choices[name]


@dataclass(frozen=True)
class Draw:
    """The next candidate of a study; ``marks`` are what Optuna's sampler wants to find on the trial later."""

    candidate: Candidate
    marks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    redrawn: int = 0  # draws that were thrown away
    refused: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of them, by the rule or limit they broke


class Sampler(Protocol):
    """Draws candidates. A draw is a function of the study's seed, the trial's number and what is recorded alone."""

    def draw(self, history: History, number: int) -> Draw | None:
        """Return the candidate of trial ``number``; None where no further one keeps the rules and limits."""
        ...


def first_new(
    candidates: Candidates, known: Container[str], own: Callable[[], Drawn], uniform: Callable[[], Drawn]
) -> Draw | None:
    """Return the first drawn candidate that can be trained and is not known; None where none was found.

    Where every draw was known, it is a known one, whose result is reused.
    """
    refused: Counter[str] = Counter()
    candidate = candidates.of(own().params)
    attempt = 0
    while attempt < REDRAWS + RANDOM_REDRAWS + (FURTHER_REDRAWS if refused else 0):
        why = candidate.breaks if candidate.arch is None else candidates.unlikely(candidate)
        if candidate.arch is not None and candidate.key not in known and not why:
            return Draw(candidate, redrawn=attempt, refused=dict(refused))
        if why and candidate.key not in known:
            refused[why] += 1
        candidate = candidates.of((own if attempt < REDRAWS else uniform)().params)
        attempt += 1
    return None if refused else Draw(candidate, redrawn=attempt)
