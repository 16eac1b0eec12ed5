"""The pattern string is the architecture: one letter is one residual sub-layer.

::

    pattern  := item+                                  blanks ignored
    item     := atom repeat?
    atom     := LETTER args? share?  |  "(" pattern ")"  |  "[" pattern ("," pattern)* "]"
    repeat   := "x" integer                            (ME)x8
    args     := "{" key "=" value ("," key "=" value)* "}"      M{d_state=32}
    share    := "@" name                               A@s: all A@s are one module, weights shared

A parsed pattern is expanded: ``parse("(ME)x2") == parse("MEME")``, and ``str`` writes the shortest folded spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, Union

from hybridnas.arch.folding import Motif, fold, spell
from hybridnas.errors import PatternError
from hybridnas.registry import ALIASES, BLOCKS

MAX_LAYERS = 4096  # a typo such as x80000 ends in one sentence instead of an exhausted memory
MAX_NESTING = 64  # and so do ten thousand brackets, instead of an exhausted stack

# Megatron and Nemotron-H write Mamba-2 as M; our M is Mamba-1.
_FROM_MEGATRON = {"M": "N", "*": "A", "-": "F", "E": "E", "G": "G"}
_NESTED = "has a parallel layer inside a parallel layer; write its branches side by side"
_TO_MEGATRON = {ours: theirs for theirs, ours in _FROM_MEGATRON.items()}


@dataclass(frozen=True)
class Slot:
    """One letter with its arguments (key, text) in sorted order, and the name it shares weights under."""

    letter: str
    args: tuple[tuple[str, str], ...] = ()
    share: str | None = None

    def __str__(self) -> str:
        args = "{" + ",".join(f"{key}={value}" for key, value in self.args) + "}" if self.args else ""
        return self.letter + args + (f"@{self.share}" if self.share else "")


@dataclass(frozen=True)
class Parallel:
    """One layer whose branches read the same normed input and are summed into the residual."""

    branches: tuple[tuple[Slot, ...], ...]

    def __str__(self) -> str:
        return "[" + ",".join(spell([str(slot) for slot in branch]) for branch in self.branches) + "]"


Layer: TypeAlias = Union[Slot, Parallel]  # noqa: UP007 - evaluated at run time, also by Python 3.10


@dataclass(frozen=True)
class Pattern:
    """An expanded pattern; equal patterns have equal layers, whatever their spelling was."""

    layers: tuple[Layer, ...]

    def __str__(self) -> str:
        return self._text

    def __len__(self) -> int:
        return len(self.layers)

    @cached_property
    def motif(self) -> Motif:
        """The layers folded into repeated motifs: the tree of which ``str(pattern)`` is the text."""
        return fold([str(layer) for layer in self.layers])

    @cached_property
    def _text(self) -> str:
        return spell([str(layer) for layer in self.layers])

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every letter in reading order, the branches of parallel layers included."""
        return tuple(
            slot
            for layer in self.layers
            for branch in (layer.branches if isinstance(layer, Parallel) else ((layer,),))
            for slot in branch
        )

    @property
    def letters(self) -> str:
        """The letters alone, expanded: ``MEME``; a parallel layer keeps its brackets."""
        return "".join(
            layer.letter
            if isinstance(layer, Slot)
            else "[" + ",".join("".join(slot.letter for slot in branch) for branch in layer.branches) + "]"
            for layer in self.layers
        )

    def with_args(self, args_of: Callable[[int, Slot], Mapping[str, Any]]) -> Pattern:
        """Return the pattern with what ``args_of(layer, slot)`` names set on each slot; a slot's own arguments win."""

        def filled(index: int, slot: Slot) -> Slot:
            added = {key: _text(value) for key, value in args_of(index, slot).items()}
            return Slot(slot.letter, tuple(sorted({**added, **dict(slot.args)}.items())), slot.share)

        return Pattern(
            tuple(
                Parallel(tuple(tuple(filled(index, slot) for slot in branch) for branch in layer.branches))
                if isinstance(layer, Parallel)
                else filled(index, layer)
                for index, layer in enumerate(self.layers)
            )
        )

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse and expand a pattern string, as :func:`parse` of this module does."""
        return parse(text)

    @classmethod
    def from_megatron(cls, text: str) -> Pattern:
        """Read a Megatron / Nemotron-H pattern such as ``M-M-M*-``, where M is Mamba-2; ``|`` marks are dropped."""
        layers = []
        for place, symbol in enumerate(text, 1):
            if symbol == "|" or symbol.isspace():
                continue
            if symbol not in _FROM_MEGATRON:
                raise _error(
                    f"Megatron pattern {text!r} has symbol {symbol!r} at character {place} without a counterpart here; "
                    f"known symbols: {' '.join(_FROM_MEGATRON)}",
                    text,
                    place - 1,
                )
            layers.append(Slot(_FROM_MEGATRON[symbol]))
        if not layers:
            raise PatternError(
                "a Megatron pattern needs at least one symbol, got an empty text", field="pattern", got=text
            )
        return cls(tuple(layers))

    def to_megatron(self) -> str:
        """Write as Megatron / Nemotron-H symbols; raises PatternError for what that notation cannot express."""
        symbols = []
        for index, layer in enumerate(self.layers):
            where = f"layer {index} ({layer}) of pattern '{self}'"
            if isinstance(layer, Parallel):
                raise PatternError(
                    f"{where} is parallel, which Megatron's notation cannot express", field="pattern", got=str(layer)
                )
            if layer.letter not in _TO_MEGATRON:
                raise PatternError(
                    f"{where} has no Megatron symbol; letters that have one: {' '.join(_TO_MEGATRON)}",
                    field="pattern",
                    got=layer.letter,
                    allowed=tuple(_TO_MEGATRON),
                )
            if layer.args or layer.share:
                raise PatternError(
                    f"{where} has arguments or a share name, which Megatron's notation cannot express",
                    field="pattern",
                    got=str(layer),
                )
            symbols.append(_TO_MEGATRON[layer.letter])
        return "".join(symbols)


def parse(text: str) -> Pattern:
    """Parse and expand a pattern string; raises PatternError that points at the character and names what is allowed."""
    if not isinstance(text, str):
        raise PatternError(
            f"a pattern is a string such as '(ME)x8', got {type(text).__name__}", field="pattern", got=text
        )
    return Pattern(_unify_shared(_Parser(text).parse(), text))


class _Parser:
    """Recursive descent over the grammar in the file's head; ``at`` is the next character to read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.nesting = 0

    def parse(self) -> tuple[Layer, ...]:
        layers = self._items(closers="")
        if self._peek():
            raise self._fail(f"has {self._peek()!r} without a matching opening bracket")
        return layers

    def _items(self, closers: str, opened: int | None = None) -> tuple[Layer, ...]:
        start = self.at
        layers: list[Layer] = []
        blocks = 0
        while self._peek() and self._peek() not in ")],":
            item = self._item(inside_parallel="]" in closers)
            layers.extend(item)
            blocks += _blocks(item)
            if blocks > MAX_LAYERS:
                raise self._fail(f"has more than {MAX_LAYERS} layers", start)
        if closers and self._peek() not in tuple(closers):
            raise self._fail(f"has {self.text[opened or 0]!r} that is never closed", opened)
        if not layers:
            raise self._fail("needs at least one letter" + (" between its brackets" if closers else ""), start)
        return tuple(layers)

    def _item(self, *, inside_parallel: bool) -> tuple[Layer, ...]:
        opened = self.at
        char = self._peek()
        atom: tuple[Layer, ...]
        if char == "(":
            self.at += 1
            self.nesting += 1
            if self.nesting > MAX_NESTING:
                raise self._fail(f"nests brackets more than {MAX_NESTING} deep", opened)
            atom = self._items(closers=")", opened=opened)
            self.nesting -= 1
            self.at += 1
        elif char == "[":
            if inside_parallel:
                raise self._fail(_NESTED)
            self.at += 1
            atom = (self._parallel(opened),)
        else:
            atom = (self._slot(),)
        count = self._repeat()
        if _blocks(atom) * count > MAX_LAYERS:
            raise self._fail(f"has more than {MAX_LAYERS} layers", opened)
        return atom * count

    def _parallel(self, opened: int) -> Parallel:
        branches: list[tuple[Slot, ...]] = []
        while True:
            branch = self._items(closers=",]", opened=opened)
            if any(isinstance(layer, Parallel) for layer in branch):
                raise self._fail(
                    "has a parallel layer inside a parallel layer; write its branches side by side", opened
                )
            branches.append(tuple(layer for layer in branch if isinstance(layer, Slot)))
            closer = self._peek()
            self.at += 1
            if closer == "]":
                break
        if len(branches) < 2 and len(branches[0]) < 2:  # one branch of several blocks is one residual layer
            raise self._fail("has a parallel layer with one branch; separate branches by commas: [M,E]", opened)
        return Parallel(tuple(sorted(branches, key=str)))  # a sum has no order, so one spelling for all orders

    def _slot(self) -> Slot:
        place = self.at
        char = ALIASES.get(self.text[place], self.text[place]) if BLOCKS else ""
        if char not in BLOCKS:
            raise _unknown_letter(self.text, place)
        self.at += 1
        args = self._args() if self._peek() == "{" else ()
        share = None
        if self._peek() == "@":
            self.at += 1
            share = self._word("a name after '@'", lambda c: c.isalnum() or c == "_", stop_at_repeat=True)
        return Slot(char, args, share)

    def _args(self) -> tuple[tuple[str, str], ...]:
        opened = self.at
        self.at += 1
        args: dict[str, str] = {}
        while True:
            place = self.at
            key = self._word("an argument name", lambda c: c.isalnum() or c == "_")
            if self._peek() != "=":
                raise self._fail(f"needs '=' after argument {key!r}: write {{key=value}}")
            self.at += 1
            value = self._word(f"a value for argument {key!r}", lambda c: c.isalnum() or c in "_.+-")
            if key in args:
                raise self._fail(f"has argument {key!r} twice in one slot", place)
            args[key] = value
            closer = self._peek()
            if closer not in (",", "}"):
                raise self._fail("has '{' that is never closed", opened)
            self.at += 1
            if closer == "}":
                return tuple(sorted(args.items()))

    def _repeat(self) -> int:
        if self._peek() != "x":
            return 1
        place = self.at
        self.at += 1
        digits = ""
        while self._peek().isdigit() and self._peek().isascii():
            digits += self._peek()
            self.at += 1
        if not digits:
            raise self._fail("needs a whole number after 'x'", place)
        if int(digits[:9]) < 1:
            raise self._fail(f"repeats {digits} times; a repeat is at least 1", place)
        return int(digits[:9])

    def _word(self, what: str, allowed: Callable[[str], bool], *, stop_at_repeat: bool = False) -> str:
        self._peek()
        start = self.at
        while self.at < len(self.text) and self.text[self.at].isascii() and allowed(self.text[self.at]):
            rest = self.text[self.at + 1 : self.at + 2]
            if stop_at_repeat and self.at > start and self.text[self.at] == "x" and rest.isdigit():
                break  # A@sx2 repeats A@s twice
            if stop_at_repeat and self.text[self.at].isupper():
                break  # A@sM is A@s, then M: share names are lower case
            self.at += 1
        if self.at == start:
            raise self._fail(f"needs {what}")
        return self.text[start : self.at]

    def _peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at] if self.at < len(self.text) else ""

    def _fail(self, problem: str, place: int | None = None) -> PatternError:
        place = self.at if place is None else place
        return _error(f"pattern {self.text!r} {problem} at character {place + 1}", self.text, place)


def _blocks(layers: Sequence[Layer]) -> int:
    return sum(sum(map(len, layer.branches)) if isinstance(layer, Parallel) else 1 for layer in layers)


def _unknown_letter(text: str, place: int) -> PatternError:
    known = ", ".join(f"{letter} {BLOCKS.get(letter).name}" for letter in BLOCKS)
    message = f"pattern {text!r} has unknown letter {text[place]!r} at character {place + 1}"
    notes = [f"known letters: {known}", *filter(None, [BLOCKS.failures.get(text[place])])]
    return _error(message, text, place, *notes, got=text[place], allowed=tuple(BLOCKS))


def _error(
    message: str, text: str, place: int, *notes: str, got: str | None = None, allowed: Any = None
) -> PatternError:
    lines = [message, f"    {text}", "    " + " " * place + "^", *(f"  {note}" for note in notes)]
    return PatternError("\n".join(lines), field="pattern", got=text if got is None else got, allowed=allowed)


def _unify_shared(layers: Sequence[Layer], text: str) -> tuple[Layer, ...]:
    """Give every slot of one share name the same arguments, so that each occurrence describes the module."""
    owners: dict[str, Slot] = {}
    for slot in Pattern(tuple(layers)).slots:
        if slot.share is None:
            continue
        owner = owners.get(slot.share)
        if owner is None or (owner.letter == slot.letter and not owner.args):
            owners[slot.share] = slot
        elif owner.letter != slot.letter:
            raise PatternError(
                f"pattern {text!r} shares '@{slot.share}' between {owner.letter} and {slot.letter}; "
                f"one name is one module, give them different names",
                field="pattern",
                got=f"@{slot.share}",
            )
        elif slot.args and slot.args != owner.args:
            raise PatternError(
                f"pattern {text!r} gives '@{slot.share}' two sets of arguments, {owner} and {slot}; "
                f"one name is one module, write the arguments once",
                field="pattern",
                got=f"@{slot.share}",
            )

    def unify(slot: Slot) -> Slot:
        return owners[slot.share] if slot.share is not None else slot

    return tuple(
        unify(layer)
        if isinstance(layer, Slot)
        else Parallel(tuple(sorted((tuple(unify(slot) for slot in branch) for branch in layer.branches), key=str)))
        for layer in layers
    )


def _text(value: Any) -> str:
    """Return a value as an argument spells it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
