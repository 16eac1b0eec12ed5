"""An architecture, resolved: every layer's config filled in, its cost known, its identity a fingerprint.

The order in which a field gets its value: the block's default, then what the preset, space or caller gives for all
blocks (or for one letter), then the slot's own ``{args}``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import numbers
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hybridnas.arch.pattern import Parallel, Pattern, Slot, parse
from hybridnas.config import FrozenConfig, option, plain
from hybridnas.cost import Cost
from hybridnas.errors import ConfigError, suggest
from hybridnas.layers.block import AROUND, BlockConfig
from hybridnas.registry import BLOCKS

if TYPE_CHECKING:
    import networkx as nx

FACTORS = {"expand": "d_inner"}  # two fields that set one width: a factor of d_model, and the width itself
_FIRST_FIELDS = ("d_model", "vocab_size", "norm", "norm_eps", "final_norm", "tie_embeddings", "init_scale")
BlockFields = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]  # letter -> its fields, sorted and hashable


@dataclass(frozen=True, kw_only=True)
class ModelConfig(FrozenConfig):
    """What surrounds the blocks; the defaults are the MoE-Mamba code's (paper-version 2, its released branch)."""

    d_model: int = option(doc="width of the residual stream [channels]", ge=1)
    vocab_size: int = option(doc="rows of the embedding and columns of the head [tokens]", ge=1)
    norm: str = option(
        "layernorm",
        "kind of all norms around sub-layers; rmsnorm_zero: weights 1 + w",
        choices=("layernorm", "rmsnorm", "rmsnorm_zero"),
    )
    norm_eps: float = option(1e-5, "added to the variance inside the norm [1]", gt=0)
    final_norm: bool = option(False, "whether there is a norm before the head [yes/no]")
    tie_embeddings: bool = option(False, "whether head and embedding share one matrix [yes/no]")
    init_scale: float = option(0.1, "s of the truncated normal with std sqrt(s / fan_in) [1]", gt=0)
    embedding_multiplier: float = option(1.0, "factor on the embedding's vectors [1]", gt=0)
    logits_multiplier: float = option(1.0, "factor on the logits (Granite: 1 / logits_scaling) [1]", gt=0)
    final_softcap: float | None = option(None, "c of logits c * tanh(logits / c); none: not capped [1]", gt=0)
    embedding_norm: bool = option(False, "whether there is a norm after the embedding [yes/no]")
    n_meta_tokens: int = option(0, "learned vectors that every sequence starts with [tokens]", ge=0)

    @classmethod
    def label(cls) -> str:
        return "architecture"

    def canonical(self) -> dict[str, Any]:
        """Return the model's part of a fingerprint: the fields of version 0.1, and later ones off their defaults.

        So a later version's new field leaves old fingerprints as they are.
        """
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        return {
            name: value for name, value in self.to_dict().items() if name in _FIRST_FIELDS or value != defaults[name]
        }

    @property
    def norm_params(self) -> int:
        """Weights of one norm: scale and shift for LayerNorm, scale alone for RMSNorm [count]."""
        return self.d_model * (2 if self.norm == "layernorm" else 1)


@dataclass(frozen=True)
class Node:
    """One block at its place: layer, branch of a parallel layer, position in the branch, and whose weights it uses."""

    layer: int
    branch: int
    position: int
    slot: Slot
    config: BlockConfig
    module: str  # two nodes with the same module share weights

    @property
    def where(self) -> str:
        """Words by which errors and tables name the node."""
        return f"layer {self.layer} ({self.slot.letter} {BLOCKS.get(self.slot.letter).name})"

    @property
    def norm_before(self) -> bool:
        """Whether the block reads the layer's norm: within a branch the first block does."""
        return self.position == 0 and self.config.norm_position != "post"

    @property
    def norm_after(self) -> bool:
        """Whether the block's output has a norm of its own."""
        return self.config.norm_position in ("post", "sandwich")


@dataclass(frozen=True)
class Arch:
    """A frozen, complete description of a model; make one with :meth:`from_pattern`, :meth:`from_dict` or a preset."""

    pattern: Pattern
    model: ModelConfig
    blocks: BlockFields = ()

    @classmethod
    def from_pattern(cls, pattern: str | Pattern, **fields: Any) -> Arch:
        """Resolve a pattern; ``fields`` are those of the model, of all blocks that have them, or of one letter.

        Model: ``d_model=512, norm="rmsnorm"``. All blocks: ``n_experts=32``. One letter: ``E={"d_expert": 1536}``.

        Raises PatternError, and ConfigError for a field that nothing in the pattern has.
        """
        parsed = parse(pattern) if isinstance(pattern, str) else pattern
        names = ModelConfig.field_names()
        model = ModelConfig.from_dict({k: v for k, v in fields.items() if k in names})
        rest = {k: v for k, v in fields.items() if k not in names}
        arch = cls(parsed, model, _distribute(parsed, rest))
        _ = arch.layers  # resolve now: a wrong field is reported here and not at first use
        return arch

    def replace(self, **fields: Any) -> Arch:
        """Return a copy with some fields of :meth:`from_pattern` (``pattern`` included) changed, the others kept."""
        pattern = fields.pop("pattern", self.pattern)
        parsed = parse(pattern) if isinstance(pattern, str) else pattern
        kept: dict[str, Any] = {letter: dict(own) for letter, own in self.blocks if letter in _letters(parsed)}
        for key, value in fields.items():
            if key in kept and isinstance(value, Mapping):
                kept[key] = overlay(kept[key], _current(key, value))
            elif key in ModelConfig.field_names() or key in BLOCKS:
                kept[key] = value
            else:
                for letter, name in _owners(parsed, key).items():
                    kept[letter] = overlay(kept.get(letter, {}), {name: value})
        return Arch.from_pattern(parsed, **{**self.model.to_dict(), **kept})

    @cached_property
    def layers(self) -> tuple[tuple[tuple[Node, ...], ...], ...]:
        """Layers, each a tuple of branches, each a tuple of nodes; a plain layer is one branch of one node."""
        configs: dict[Slot, BlockConfig] = {}  # equal slots have equal configs: each is made once
        layers = []
        for index, layer in enumerate(self.pattern.layers):
            branches = layer.branches if isinstance(layer, Parallel) else ((layer,),)
            nodes = tuple(
                tuple(self._node(index, b, position, slot, configs) for position, slot in enumerate(branch))
                for b, branch in enumerate(branches)
            )
            _check_one_stream(nodes)
            layers.append(nodes)
        _check_firsts(node for layer in layers for branch in layer for node in branch)
        return tuple(layers)

    def _node(self, layer: int, branch: int, position: int, slot: Slot, configs: dict[Slot, BlockConfig]) -> Node:
        if slot not in configs:
            configs[slot] = self._config(layer, slot)
        module = f"shared.{slot.share}" if slot.share else f"layers.{layer}.{branch}.{position}"
        return Node(layer, branch, position, slot, configs[slot], module)

    def _config(self, layer: int, slot: Slot) -> BlockConfig:
        block = BLOCKS.get(slot.letter)
        where = f"layer {layer} ({slot.letter} {block.name})"
        args = _current(slot.letter, dict(slot.args))
        if "d_model" in args:
            raise ConfigError(
                f"{where} cannot set d_model={args['d_model']}: the residual stream has one width",
                field="d_model",
                got=args["d_model"],
                allowed=self.d_model,
            )
        given = dict(dict(self.blocks).get(slot.letter, ()))
        config: BlockConfig = block.Config.from_dict(
            overlay({"d_model": self.d_model, **given}, args), where=where, parse=True
        )
        return config

    @property
    def nodes(self) -> Iterator[Node]:
        """Every block in the order of execution."""
        return (node for layer in self.layers for branch in layer for node in branch)

    @property
    def d_model(self) -> int:
        """Width of the residual stream [channels]."""
        return self.model.d_model

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the embedding knows [count]."""
        return self.model.vocab_size

    @property
    def causal(self) -> bool:
        """Whether every block is causal, so that the model can generate."""
        return all(node.config.causal for node in self.nodes)

    def cost(self, seq_len: int = 1024, dtype_bytes: int = 4) -> Cost:
        """Return what the model costs at a sequence length, without building it; exact against the built module.

        Parameters exclude embedding and head (the papers' convention), and meta tokens with them, which are learned
        input vectors like rows of the embedding. FLOPs include the head's matmul. With meta tokens the work of all
        ``n_meta_tokens + seq_len`` positions is divided by the ``seq_len`` tokens, and the state has read both.
        """
        d, vocab = self.d_model, self.vocab_size
        norms = self.model.norm_params * self.n_norms
        total = Cost(
            params=norms,
            active_params=norms,
            embedding_params=d * vocab * (1 if self.model.tie_embeddings else 2) + d * self.model.n_meta_tokens,
            flops_per_token=2.0 * d * vocab,
        )
        seen: set[str] = set()
        for node in self.nodes:
            total += self.node_cost(node, seq_len, dtype_bytes, first_use=node.module not in seen)
            seen.add(node.module)
        return total

    @property
    def n_norms(self) -> int:
        """Norms around the blocks, and those after the embedding and before the head [count]."""
        before = sum(any(node.norm_before for branch in layer for node in branch) for layer in self.layers)
        return before + sum(node.norm_after for node in self.nodes) + self.model.final_norm + self.model.embedding_norm

    def node_cost(self, node: Node, seq_len: int, dtype_bytes: int = 4, *, first_use: bool = True) -> Cost:
        """Return the cost of one block at its place, its Canon layer included; the weights of a shared one count once.

        ``first_use``: whether the node is the first of those that share its weights.
        """
        config, meta = node.config, self.model.n_meta_tokens
        cost = config.cost(seq_len + meta, dtype_bytes)
        if not first_use:
            own = config.own_params
            cost = cost.without_params() + Cost(params=own, active_params=own)
        if config.canon:
            weights, state = config.canon_params, (config.canon - 1) * config.d_model * dtype_bytes
            cost += Cost(params=weights, active_params=weights, flops_per_token=2.0 * weights, state_bytes=state)
        if meta:
            cost = dataclasses.replace(cost, flops_per_token=cost.flops_per_token * (seq_len + meta) / seq_len)
        return cost

    def graph(self) -> nx.DiGraph:
        """Return the architecture as a networkx DiGraph: nodes ``embed``, blocks, sums and ``head``; a view to analyze.

        Node attributes: ``kind`` (embed, block, sum or head), ``width``, and for blocks ``node`` (the resolved Node).
        """
        from hybridnas.arch.graph import arch_graph

        return arch_graph(self)

    def fingerprint(self) -> str:
        """Return the sha256 of the canonical description: equal for every spelling of one architecture."""
        return hashlib.sha256(json.dumps(self._canonical(), sort_keys=True).encode()).hexdigest()

    @property
    def short(self) -> str:
        """The first 12 characters of the fingerprint, as shown to people."""
        return self.fingerprint()[:12]

    def _canonical(self) -> dict[str, Any]:
        uses: dict[str, list[int]] = {}
        for node in self.nodes:
            uses.setdefault(node.module, []).append(node.layer)
        order: dict[str, int] = {}
        layers = []
        for layer in self.layers:
            # A sum has no order: branches are sorted by what they compute and where else their modules are used.
            branches = [[(_letter(node), _changed(node), node.module) for node in branch] for branch in layer]
            branches.sort(
                key=lambda branch: json.dumps([[*node[:2], uses[node[2]]] for node in branch], sort_keys=True)
            )
            layers.append(
                [
                    [
                        {"letter": letter, "config": config, "module": order.setdefault(module, len(order))}
                        for letter, config, module in branch
                    ]
                    for branch in branches
                ]
            )
        return {"version": 1, "model": self.model.canonical(), "layers": layers}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values from which :meth:`from_dict` makes the same architecture, ready for JSON."""
        blocks = {letter: dict(own) for letter, own in self.blocks}
        return {"pattern": str(self.pattern), **self.model.to_dict(), "blocks": blocks}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Arch:
        """Rebuild from :meth:`to_dict`; raises ConfigError for unknown or missing fields."""
        fields = dict(values)
        blocks = fields.pop("blocks", {})
        if "pattern" not in fields:
            raise ConfigError("an architecture needs a 'pattern', such as pattern='(ME)x8'", field="pattern")
        for letter in blocks:
            if letter not in BLOCKS:
                raise ConfigError(
                    f"architecture blocks has unknown letter {letter!r}{suggest(letter, BLOCKS)}",
                    field="blocks",
                    got=letter,
                    allowed=tuple(BLOCKS),
                )
        return cls.from_pattern(fields.pop("pattern"), **fields, **blocks)


def overlay(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``under`` updated by ``over``: a factor in ``over`` (``expand``) replaces a width, and the reverse."""
    hidden = {
        theirs for pair in FACTORS.items() for mine, theirs in (pair, pair[::-1]) if mine in over and theirs not in over
    }
    return {**{key: value for key, value in under.items() if key not in hidden}, **over}


def block_field(letter: str, name: str) -> str | None:
    """Return the name of a field of a letter's block, given that or a former name; None where it has no such field."""
    config = BLOCKS.get(letter).Config
    name = config.renamed.get(name, name)
    return name if name in config.field_names() else None


def _current(letter: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a letter by their present names."""
    return {block_field(letter, key) or key: value for key, value in fields.items()}


def _letter(node: Node) -> str:
    """Return the letter by which a fingerprint knows a node: S is A with a window."""
    return BLOCKS.get(node.slot.letter).same_as or node.slot.letter


def _changed(node: Node) -> dict[str, Any]:
    """Return the fields that differ from their defaults, by their first names, as a fingerprint has them.

    So a later version's new or renamed field leaves old fingerprints as they are.
    """
    config = node.config
    defaults = {item.name: item.default for item in dataclasses.fields(BLOCKS.get(_letter(node)).Config)}
    first = {name: former for former, name in config.renamed.items()}
    values = {**config.canonical(), **{name: getattr(config, name) for name in AROUND}}
    if node.position > 0:  # reads what stands before it in its branch: of the norms, only the one after it is its own
        values["norm_position"] = "post" if node.norm_after else "pre"
    return {
        first.get(key, key): value for key, value in values.items() if value != defaults.get(key, dataclasses.MISSING)
    }


def _check_one_stream(layer: tuple[tuple[Node, ...], ...]) -> None:
    """Raise ConfigError where the blocks of a layer differ in what happens to the residual stream that they add to."""
    first, *others = (node for branch in layer for node in branch)
    for node in others:
        for name in ("stream_multiplier", "norm_position"):
            values = getattr(first.config, name), getattr(node.config, name)
            if values[0] != values[1] and (name != "norm_position" or "stream" in values):
                raise ConfigError(
                    f"{first.where} has {name}={values[0]} beside {node.slot.letter} "
                    f"{BLOCKS.get(node.slot.letter).name} {name}={values[1]}, but the blocks of a parallel layer add "
                    f"to one residual stream; give both the same {name}",
                    field=name,
                    got=values,
                    allowed="one value for the layer",
                )


def _check_firsts(nodes: Iterator[Node]) -> None:
    """Raise ConfigError for a block that reads what the first of its letter hands on, where that is not there."""
    firsts: dict[str, Node] = {}
    for node in nodes:
        first = firsts.setdefault(node.slot.letter, node)
        if not node.config.reads_first:
            continue
        if first is node:
            raise ConfigError(
                f"{node.where} reads what the first block of its letter hands on, but is the first itself; "
                f"set value_rank=0 on it, as in {node.slot.letter}{{value_rank=0}}",
                field="value_rank",
                got=str(node.slot),
                allowed="value_rank=0 on the first",
            )
        if first.config.first_width != node.config.first_width:
            widths = first.config.first_width, node.config.first_width
            raise ConfigError(
                f"{node.where} mixes its {widths[1]} channels with the {widths[0]} of {first.where}; give both one "
                f"d_inner, or set value_rank=0",
                field="d_inner",
                got=widths[1],
                allowed=widths[0],
            )


def _letters(pattern: Pattern) -> list[str]:
    return sorted({slot.letter for slot in pattern.slots})


def _owners(pattern: Pattern, field: str) -> dict[str, str]:
    """Return the letters of the pattern whose blocks have the field, each with the field's present name.

    Raises ConfigError naming what the blocks have.
    """
    owners = {letter: name for letter in _letters(pattern) if (name := block_field(letter, field))}
    if not owners:
        known = {name for x in _letters(pattern) for name in BLOCKS.get(x).Config.field_names()}
        raise ConfigError(
            f"no block of pattern '{pattern}' has a field {field!r}{suggest(field, known)}",
            field=field,
            got=field,
            allowed=tuple(sorted(known)),
        )
    return owners


def _distribute(pattern: Pattern, fields: Mapping[str, Any]) -> BlockFields:
    """Give each letter of the pattern the fields that concern it; one letter's own value wins over the common one."""
    given: dict[str, dict[str, Any]] = {letter: {} for letter in _letters(pattern)}
    for key, value in fields.items():
        if key in BLOCKS:
            continue
        for letter, name in _owners(pattern, key).items():
            given[letter][name] = value
    for key, value in fields.items():
        if key not in BLOCKS:
            continue
        name = BLOCKS.get(key).name
        if key not in given:
            raise ConfigError(
                f"pattern '{pattern}' has no {key} ({name}) to set {value!r} on",
                field=key,
                got=value,
                allowed=tuple(given),
            )
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"{key}={value!r} must be a mapping of {name} fields, e.g. {key}={{...}}",
                field=key,
                got=value,
                allowed="a mapping",
            )
        given[key] = overlay(given[key], _current(key, value))
    return tuple(
        (letter, tuple((key, _number(value)) for key, value in sorted(own.items())))
        for letter, own in sorted(given.items())
        if own
    )


def _number(value: Any) -> Any:
    """Return NumPy's numbers as Python's, which JSON has; other values as they are."""
    return plain(value) if isinstance(value, numbers.Number) else value
