"""A transformers config as a mapping with the defaults of its class, and refusals of what we cannot express."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from hybridnas.errors import ConfigError

# transformers' names of nonlinearities -> ours
ACTIVATIONS = {
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
LINEAR, FULL = "linear_attention", "full_attention"
_LEGACY = {"mamba": LINEAR, "attention": FULL}  # words of layer types before transformers 5


class Settings:
    """Values of a config by name: what is given, by any of its names, else the default of transformers' class.

    Names without a default are those that the class does not read: they cannot change the function. Settings of
    training alone (dropout, jitter, initial values) are not looked at.
    """

    def __init__(
        self, given: Mapping[str, Any], defaults: Mapping[str, Any], aliases: Mapping[str, str], model_type: str
    ) -> None:
        self.model_type = model_type
        self._given = {aliases.get(name, name): value for name, value in given.items()}
        self._defaults = defaults

    def __getitem__(self, name: str) -> Any:
        """Return a value of the default's type; raises ConfigError for one of another type."""
        default = self._defaults[name]
        value = self._given.get(name, default)
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        kinds = (
            (bool, isinstance(value, bool), "true or false"),
            (int, number and value == int(value), "a whole number"),
            (float, number, "a number"),
            (str, isinstance(value, str), "text"),
        )
        for kind, fine, words in kinds:
            if type(default) is kind:
                if not fine:
                    raise self.refusal(name, words)
                return int(value) if kind is int else value
        return value

    def given(self, name: str, default: Any = None) -> Any:
        """Return a value as it is, None included: one that may be none, or that has a former name."""
        return self._given.get(name, self._defaults.get(name, default))

    def refusal(self, name: str, allowed: Any, *, got: Any = None, why: str = "") -> ConfigError:
        """Return the error for a value that is not one of ``allowed`` (a sequence of values, or words)."""
        value = self._given.get(name, self._defaults.get(name)) if got is None else got
        words = allowed if isinstance(allowed, str) else " or ".join(repr(one) for one in allowed)
        return ConfigError(
            f"config of model_type {self.model_type!r} has {name}={value!r}{why and f', {why}'}; allowed: {words}",
            field=name,
            got=value,
            allowed=allowed if isinstance(allowed, str) else tuple(allowed),
        )

    def need(self, *allowed: Any, **names: str) -> None:
        """Raise ConfigError for settings of other values; ``need(False, mlp_bias="why others cannot be")``."""
        for name, why in names.items():
            if self[name] not in allowed:
                raise self.refusal(name, allowed, why=why)

    def silu(self, name: str = "hidden_act") -> None:
        """Raise ConfigError unless the nonlinearity is SiLU, as our convolutions and gates have it."""
        if self[name] not in ("silu", "swish"):
            raise self.refusal(name, ("silu", "swish"), why="which our convolutions and gates do not have")

    def activation(self, name: str = "hidden_act") -> str:
        """Return our name of a nonlinearity."""
        if self[name] not in ACTIVATIONS:
            raise self.refusal(name, tuple(ACTIVATIONS))
        return ACTIVATIONS[self[name]]

    def model(self, eps: str = "rms_norm_eps") -> dict[str, Any]:
        """Return the fields of what stands around the blocks."""
        return {
            "d_model": self["hidden_size"],
            "vocab_size": self["vocab_size"],
            "norm": "rmsnorm",
            "norm_eps": self[eps],
            "final_norm": True,
            "tie_embeddings": self["tie_word_embeddings"],
        }

    def heads(self) -> dict[str, Any]:
        """Return number and width of attention's heads."""
        count = self["num_attention_heads"]
        width = self.given("head_dim") or self["hidden_size"] // max(1, count)
        return {
            "n_heads": count,
            "n_kv_heads": self.given("num_key_value_heads") or count,
            "head_dim": width,
        }

    def rope(self, theta: float = 10000.0, *, fraction: float | None = None) -> dict[str, Any]:
        """Return fields of rotary positions: base, and where the class knows one the part of a head that turns.

        ``theta`` and ``fraction`` are the class's defaults; without ``fraction`` its heads turn whole. Raises
        ConfigError for scaled positions (yarn, llama3 and others).
        """
        scaling = self.given("rope_scaling")
        parameters = {**(self.given("rope_parameters") or {}), **(scaling or {})}
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in ("default", "mrope"):  # mrope: three axes that a text does not have
            name = "rope_scaling" if scaling else "rope_parameters"
            raise self.refusal(f"{name}.rope_type", ("default",), got=kind, why="and we have no scaled positions")
        base = parameters.get("rope_theta", self.given("rope_theta", theta))
        fields = {"rope_base": float(base)}
        if fraction is not None:
            part = parameters.get("partial_rotary_factor", self.given("partial_rotary_factor", fraction))
            width = self.heads()["head_dim"]
            fields["rotary_fraction"] = int(width * part) / width
        return fields

    def layer_types(self, count: int | None = None, *, name: str = "layer_types", own: Sequence[str] = ()) -> list[str]:
        """Return one word per layer; raises ConfigError for another number of them, or for words that are not known."""
        allowed = (LINEAR, FULL, *own)
        found = [_LEGACY.get(word, word) for word in self[name]]
        for word in found:
            if word not in allowed:
                raise self.refusal(name, allowed, got=word)
        if count is not None and len(found) != count:
            raise self.refusal(name, f"num_hidden_layers={count} words", got=len(found))
        return found

    def no_step_limits(self) -> None:
        """Raise ConfigError where Mamba-2's step sizes are limited."""
        low, high = (math.inf if isinstance(x, Mapping) else float(x) for x in self["time_step_limit"])
        if low > 0 or high < math.inf:
            why = "and our steps have no limits"
            raise self.refusal("time_step_limit", ((0.0, math.inf),), got=(low, high), why=why)

    def mamba2(self) -> dict[str, Any]:
        """Return the fields of a Mamba-2 mixer by the names that Bamba, Granite and Falcon-H1 share."""
        self.silu()
        self.no_step_limits()
        inner = self.given("mamba_d_ssm") or int(self["mamba_expand"] * self["hidden_size"])
        width = self.given("mamba_d_head", "auto")
        return {
            "d_inner": inner,
            "head_dim": inner // self["mamba_n_heads"] if width == "auto" else width,
            "d_state": self["mamba_d_state"],
            "d_conv": self["mamba_d_conv"],
            "n_groups": self["mamba_n_groups"],
            "conv_bias": self["mamba_conv_bias"],
            "bias": self["mamba_proj_bias"],
            "norm_eps": self["rms_norm_eps"],
        }
