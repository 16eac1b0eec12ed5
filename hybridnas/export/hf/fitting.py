"""Which transformers class can hold an architecture, decided from the architecture alone; and why others cannot.

A family gives the config nearest to an architecture; read back, it is an architecture that the class has. Where that is
the same function, the class fits. What may differ is what training alone looks at, and what zeros or a shift of the
weights bring about:

- a shared expert of one channel of zeros, and a correction bias of zeros, where the class always has them;
- RMSNorm with weights ``1 + w`` in place of ``w``, and the reverse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridnas.arch.arch import Arch, Node
from hybridnas.arch.model import HybridLM
from hybridnas.errors import ConfigError
from hybridnas.export.hf.configs import first, kind
from hybridnas.export.hf.family import FAMILIES, Family
from hybridnas.export.hf.reading import arch_of
from hybridnas.export.hf.weights import prefix
from hybridnas.layers.block import AROUND

# In this order ``format=auto`` tries: the class with the least beside what is needed first.
_ORDER = ("llama", "mistral", "mixtral", "mamba", "mamba2", "falcon_mamba", "nemotron_h", "granitemoehybrid", "jamba")
# Fields of training: they have no part in the function that is exported.
_TRAINING = {
    *("load_balance_weight", "router_z_weight", "capacity_factor", "init_over_experts", "bias_update_rate"),
    *("init_scale", "inner_capacity_factor", "inner_load_balance_weight"),
}
_RMSNORMS = {"rmsnorm", "rmsnorm_zero"}


@dataclass(frozen=True)
class Fit:
    """An architecture as a class has it: the family, the config, and that config read back."""

    family: Family
    config: Mapping[str, Any]
    arch: Arch

    @property
    def name(self) -> str:
        """The format: the class's model type."""
        return self.family.model_types[0]


def formats() -> tuple[str, ...]:
    """Return the names of all formats, in the order in which they are tried."""
    families = [FAMILIES.get(name) for name in FAMILIES]
    names = {family.model_types[0] for family in families if family.written}
    return (*_ORDER, *sorted(names - set(_ORDER)))


def nearest(arch: Arch, name: str) -> Fit:
    """Return the architecture of a class that is nearest to one of ours: its sizes, and else what the class has.

    Raises ConfigError for a name that is no format, and where no config of the class has the pattern.
    """
    family = FAMILIES.get(name)
    if family.needs_attention and first(arch, "A") is None:
        raise ConfigError(
            f"the pattern '{arch.pattern}' has no attention, and the class cannot decode without: its cache counts "
            f"tokens there",
            field="pattern",
            got=str(arch.pattern),
            allowed="at least one A",
        )
    config = {"model_type": family.model_types[0], **family.config(arch)}
    return Fit(family, config, arch_of(family, family.settings(config)))


def fit(arch: Arch, name: str) -> Fit:
    """Return how a class holds an architecture; raises ConfigError naming the option, the layer and what it can be."""
    found = nearest(arch, name)
    for where, field, got, allowed in _differences(arch, found.arch):
        letter = next((kind(node) for node in arch.nodes if node.where == where), None)
        values = {repr(_function(node).get(field)) for node in arch.nodes if kind(node) == letter}
        one = f" for all {letter}" if len(values) > 1 else ""  # a config has one size for a kind of layer
        raise ConfigError(
            f"{where} has {field}={got!r}, and the class has {allowed!r}{one}",
            field=field,
            got=got,
            allowed=(allowed,),
        )
    return found


def completed(arch: Arch, name: str) -> Arch:
    """Return the architecture with all that a class has beside what was given: norms, positions, activations, routers.

    Options that were given, for all blocks of a letter or for one slot, stay; where a class leaves a choice, it is that
    of the releases. Raises ConfigError where the class has another value of one, or not the pattern.
    """
    given_to = {letter: dict(own) for letter, own in arch.blocks}
    style = FAMILIES.get(name).style
    styled = {
        letter: {key: value for key, value in style[letter].items() if key not in given_to.get(letter, {})}
        for letter in style
        if letter in arch.pattern.letters
    }
    found = nearest(arch.replace(**styled), name).arch
    for node, twin in _pairs(arch, found):
        given = {*given_to.get(node.slot.letter, ()), *dict(node.slot.args)}
        if kind(node) != node.slot.letter:
            given.add("window")  # what makes S of A
        own, wanted = node.config.canonical(), twin.config.canonical()
        for field in given:
            if field in own and own[field] != wanted.get(field, own[field]):
                got, allowed = own[field], wanted[field]
                raise ConfigError(
                    f"{node.where} has {field}={got!r}, and the class has {allowed!r}",
                    field=field,
                    got=got,
                    allowed=(allowed,),
                )
    routed = next((node.config for node in arch.nodes if kind(node) == "E"), None)
    if routed is None or any("d_shared" in dict(slot.args) for slot in arch.pattern.slots):
        return found
    return found.replace(E={"d_shared": routed.canonical()["d_shared"]})  # without one, its zeros are added on export


def exportable(arch: Arch) -> dict[str, str]:
    """Return format -> why it cannot hold the architecture; empty where it can."""
    found = {}
    for name in formats():
        try:
            fit(arch, name)
            found[name] = ""
        except ConfigError as error:
            found[name] = str(error)
    return found


def chosen(arch: Arch, name: str) -> Fit:
    """Return how the asked format holds an architecture, or with ``auto`` the first that can.

    Raises ConfigError that says why it cannot, and which formats can.
    """
    if name != "auto":
        FAMILIES.get(name)  # an unknown name is refused with those that there are
    reasons = exportable(arch)
    fitting = [one for one, reason in reasons.items() if not reason]
    if name == "auto":
        if fitting:
            return fit(arch, fitting[0])
        words = "; ".join(f"{one}: {reason}" for one, reason in reasons.items())
        raise ConfigError(
            f"no class of transformers holds pattern '{arch.pattern}' ({words}); use format=hybridnas",
            field="format",
            got="auto",
            allowed=("hybridnas",),
        )
    try:
        return fit(arch, name)
    except ConfigError as error:
        others = " or ".join(f"format={one}" for one in [*fitting, "hybridnas"])
        raise ConfigError(
            f"format={name} cannot hold pattern '{arch.pattern}': {error}; use {others}",
            field=error.field,
            got=error.got,
            allowed=error.allowed,
        ) from None


def _differences(ours: Arch, theirs: Arch) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield where, which field, ours and theirs, of what the two compute differently."""
    mine, other = ours.model.to_dict(), theirs.model.to_dict()
    for name, value in mine.items():
        if value != other[name] and name not in _TRAINING and {value, other[name]} != _RMSNORMS:
            yield "the model", name, value, other[name]
    for node, twin in _pairs(ours, theirs):
        if kind(node) != kind(twin):
            yield node.where, "pattern", kind(node), kind(twin)
            continue
        own, wanted = _function(node), _function(twin)
        if kind(node) == "E":
            if not own.get("d_shared"):  # a shared expert of zeros
                wanted |= {name: own[name] for name in ("d_shared", "shared_gate") if name in own}
                wanted = {name: value for name, value in wanted.items() if name in own or name != "shared_gate"}
            if not own.get("correction_bias"):  # a bias of zeros
                wanted["correction_bias"] = own["correction_bias"]
        for name in sorted({*own, *wanted}):
            if own.get(name) != wanted.get(name):
                yield node.where, name, own.get(name), wanted.get(name)


def _function(node: Node) -> dict[str, Any]:
    """Return the fields that say what a block computes."""
    fields = {**node.config.canonical(), **{name: getattr(node.config, name) for name in AROUND}}
    return {name: value for name, value in fields.items() if name not in {*_TRAINING, "qk_norm_zero_centered"}}


def _pairs(ours: Arch, theirs: Arch) -> Iterator[tuple[Node, Node]]:
    """Yield the blocks that stand for each other; those of a parallel layer have no order."""
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        yield from zip(*(sorted((n for b in x for n in b), key=kind) for x in (layer, other)), strict=True)


def restated(model: HybridLM, fitted: Fit) -> dict[str, Tensor]:
    """Return the model's tensors under the names of the fitted architecture, with what the class has beside them."""
    own = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    names = {}  # prefix of a block there -> here, where branches stand in another order
    zero_centered = []
    for node, twin in _pairs(model.arch, fitted.arch):
        names[f"{prefix(twin)}."] = f"{prefix(node)}."
        names[f"layers.{twin.layer}.around.{twin.branch}_{twin.position}."] = (
            f"layers.{node.layer}.around.{node.branch}_{node.position}."
        )
        mine, other = (getattr(x.config, "qk_norm_zero_centered", False) for x in (node, twin))
        if mine != other:
            zero_centered += [(f"{prefix(twin)}.{name}.weight", mine) for name in ("q_norm", "k_norm")]
    norms = model.arch.model.norm, fitted.arch.model.norm
    found = {}
    for name, wanted in HybridLM(fitted.arch, device="meta").state_dict().items():
        there = next((here + name[len(start) :] for start, here in names.items() if name.startswith(start)), name)
        tensor = own.get(there)
        found[name] = torch.zeros(wanted.shape, dtype=model.embedding.weight.dtype) if tensor is None else tensor
        if norms[0] != norms[1] and (name == "final_norm.weight" or (".branches." not in name and "norm" in name)):
            zero_centered.append((name, norms[0] == "rmsnorm_zero"))
    for name, adds_one in zero_centered:
        if name in found:
            found[name] = found[name] + 1 if adds_one else found[name] - 1
    return found
