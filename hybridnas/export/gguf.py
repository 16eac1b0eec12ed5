"""export_gguf(model, file): a model as one GGUF file, for the architectures of llama.cpp that are listed here.

A model goes through the transformers class that holds it (``hybridnas.export.hf.fitting``); tensors get the names of
``gguf``'s own map. Weights are float32. A byte-level tokenizer goes into the file (:mod:`hybridnas.export.gguf_vocab`);
without one the file takes and gives token ids. What llama.cpp does to weights on conversion is done here too:
``A = -exp(A_log)``, the order of rotary channels of Llama's queries and keys, shapes of convolutions and gated norms,
norms of Qwen3-Next as factors, multipliers of Falcon-H1 as parts of matrices.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.errors import ConfigError, ExportError
from hybridnas.export.gguf_vocab import vocabulary
from hybridnas.export.hf.fitting import Fit, fit, restated
from hybridnas.export.hf.settings import FULL, LINEAR
from hybridnas.export.hf.weights import in_class
from hybridnas.export.layout import home

if TYPE_CHECKING:
    from hybridnas.data.tokenizers import Tokenizer

_CONTEXT = 2**20  # no limit of ours
_SIGMOID = 2  # gguf.ExpertGatingFuncType


@dataclass(frozen=True, kw_only=True)
class Target:
    """One architecture of llama.cpp: its name, settings, what it lacks, and what it has in another order."""

    name: str
    settings: Callable[[Mapping[str, Any], Fit], dict[str, Any]]  # gguf key without the architecture -> value
    lacks: Callable[[Mapping[str, Any]], tuple[str, Any, Any] | None] = lambda config: None  # field, got, allowed
    permuted: bool = False  # rotary channels of queries and keys turn with their neighbors


class GgufExport(NamedTuple):
    """A written file, the name of llama.cpp's architecture, and why the file has no vocabulary, or empty."""

    path: Path
    architecture: str
    without_vocabulary: str


def _common(config: Mapping[str, Any], fitted: Fit) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    return {
        "block_count": layers,
        "context_length": _CONTEXT,
        "embedding_length": config["hidden_size"],
        "vocab_size": config["vocab_size"],
        "feed_forward_length": config.get("intermediate_size", 0),
        "attention.head_count": config.get("num_attention_heads", 0),
        "attention.head_count_kv": config.get("num_key_value_heads", 0),
        "attention.layer_norm_rms_epsilon": fitted.arch.model.norm_eps,
    }


def _heads(config: Mapping[str, Any], *, rope: bool = True) -> dict[str, Any]:
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    found = {"attention.key_length": width, "attention.value_length": width}
    return {**found, "rope.dimension_count": width, "rope.freq_base": config["rope_theta"]} if rope else found


def _ssm(conv: int, inner: int, state: int, rank: int, groups: int | None = None) -> dict[str, Any]:
    found = {"conv_kernel": conv, "inner_size": inner, "state_size": state, "time_step_rank": rank}
    found |= {} if groups is None else {"group_count": groups}
    return {f"ssm.{key}": value for key, value in found.items()}


def _llama(config: Mapping[str, Any], fitted: Fit) -> dict[str, Any]:
    found = {**_common(config, fitted), **_heads(config)}
    if "num_local_experts" in config:
        found |= {"expert_count": config["num_local_experts"], "expert_used_count": config["num_experts_per_tok"]}
    return found


def _mamba(config: Mapping[str, Any], fitted: Fit) -> dict[str, Any]:
    sizes = _ssm(*(config[key] for key in ("conv_kernel", "intermediate_size", "state_size", "time_step_rank")))
    normed = fitted.name == "falcon_mamba"
    return {**_common(config, fitted), **sizes, "feed_forward_length": 0, "ssm.dt_b_c_rms": normed}


def _mamba2(config: Mapping[str, Any], fitted: Fit) -> dict[str, Any]:
    inner, groups = config["num_heads"] * config["head_dim"], config["n_groups"]
    sizes = _ssm(config["conv_kernel"], inner, config["state_size"], config["num_heads"], groups)
    return {**_common(config, fitted), **sizes}


def _jamba(config: Mapping[str, Any], fitted: Fit) -> dict[str, Any]:
    attention = _layers_with(fitted, "A")
    inner = config["mamba_expand"] * config["hidden_size"]
    kv = config["num_key_value_heads"]
    found = {
        **_common(config, fitted),
        **_ssm(config["mamba_d_conv"], inner, config["mamba_d_state"], config["mamba_dt_rank"]),
        "attention.head_count_kv": [kv if i in attention else 0 for i in range(config["num_hidden_layers"])],
    }
    if config["num_experts"] > 1:
        found |= {"expert_count": config["num_experts"], "expert_used_count": config["num_experts_per_tok"]}
    return found


def _nemotron_h(config: Mapping[str, Any], fitted: Fit) -> dict[str, Any]:
    types = config["hybrid_override_pattern"]
    inner = config["mamba_num_heads"] * config["mamba_head_dim"]
    sizes = config["conv_kernel"], inner, config["ssm_state_size"], config["mamba_num_heads"], config["n_groups"]
    kv = config["num_key_value_heads"]
    routed = "E" in types
    width = config["moe_intermediate_size"] if routed else config["intermediate_size"]
    found = {
        **_common(config, fitted),
        **_heads(config, rope=False),
        **_ssm(*sizes),
        "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        "attention.head_count_kv": [kv if sign == "*" else 0 for sign in types],
        "feed_forward_length": [width if sign in "E-" else 0 for sign in types],
    }
    if routed:
        found |= {
            "expert_count": config["n_routed_experts"],
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": width,
            "expert_shared_feed_forward_length": config["moe_shared_expert_intermediate_size"],
            "expert_shared_count": 1,
            "expert_weights_norm": config["norm_topk_prob"],
            "expert_weights_scale": float(config["routed_scaling_factor"]),
            "expert_group_count": 1,
        }
    return found


def _granite(config: Mapping[str, Any], fitted: Fit) -> dict[str, Any]:
    attention, kv = _layers_with(fitted, "A"), config["num_key_value_heads"]
    inner = config["mamba_n_heads"] * config["mamba_d_head"]
    sizes = config["mamba_d_conv"], inner, config["mamba_d_state"], config["mamba_n_heads"], config["mamba_n_groups"]
    found = {
        **_common(config, fitted),
        **_ssm(*sizes),
        "attention.head_count_kv": [kv if i in attention else 0 for i in range(config["num_hidden_layers"])],
        "rope.scaling.finetuned": False,  # no rotary positions
        "embedding_scale": float(config["embedding_multiplier"]),
        "residual_scale": float(config["residual_multiplier"]),
        "logit_scale": float(config["logits_scaling"]),
    }
    found |= {"attention.scale": config["attention_multiplier"]} if attention else {}
    if config["num_local_experts"]:
        found |= {
            "expert_count": config["num_local_experts"],
            "expert_used_count": config["num_experts_per_tok"],
            "expert_shared_feed_forward_length": config["shared_intermediate_size"],
        }
    return found


def _lfm2(config: Mapping[str, Any], fitted: Fit) -> dict[str, Any]:
    attention, kv = _layers_with(fitted, "A"), config["num_key_value_heads"]
    return {
        **_common(config, fitted),
        "rope.freq_base": config["rope_theta"],
        "attention.head_count_kv": [kv if i in attention else 0 for i in range(config["num_hidden_layers"])],
        "shortconv.l_cache": config["conv_L_cache"],
    }


def _lfm2_moe(config: Mapping[str, Any], fitted: Fit) -> dict[str, Any]:
    return {
        **_lfm2(config, fitted),
        "expert_count": config["num_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_gating_func": _SIGMOID,
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "leading_dense_block_count": config["num_dense_layers"],
    }


def _falcon_h1(config: Mapping[str, Any], fitted: Fit) -> dict[str, Any]:
    keys = "mamba_d_conv", "mamba_d_ssm", "mamba_d_state", "mamba_n_heads", "mamba_n_groups"
    return {**_common(config, fitted), **_heads(config), **_ssm(*(config[key] for key in keys))}


def _qwen3_next(config: Mapping[str, Any], fitted: Fit) -> dict[str, Any]:
    recurrent = [kind == LINEAR for kind in config["layer_types"]]
    values = config["linear_num_value_heads"]
    inner, groups = values * config["linear_value_head_dim"], config["linear_num_key_heads"]
    sizes = _ssm(config["linear_conv_kernel_dim"], inner, config["linear_key_head_dim"], values, groups)
    rotary = round(config["head_dim"] * config["rope_parameters"].get("partial_rotary_factor", 1.0))
    return {
        **_common(config, fitted),
        **_heads(config),
        **sizes,
        "rope.dimension_count": rotary,
        "attention.recurrent_layers": recurrent,
        "full_attention_interval": 1 + recurrent.index(False),  # read by older versions
        "expert_count": config["num_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
    }


def _layers_with(fitted: Fit, letter: str) -> set[int]:
    """Return the class's layers, of two sub-layers each, that have a letter."""
    return {node.layer // 2 for node in fitted.arch.nodes if node.slot.letter == letter}


def _needs(**fields: Any) -> Callable[[Mapping[str, Any]], tuple[str, Any, Any] | None]:
    """Return the first of these fields that a config has with another value."""

    def lacks(config: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
        for field, allowed in fields.items():
            if config.get(field, allowed) != allowed:
                return field, config[field], allowed
        return None

    return lacks


def _nemotron_lacks(config: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    types = config["hybrid_override_pattern"]
    if "E" in types and "-" in types:
        return "hybrid_override_pattern", types, "MLPs or experts, not both"
    if "M" not in types:
        return "hybrid_override_pattern", types, "at least one Mamba-2 (M)"
    return _needs(mlp_hidden_act="relu2", use_bias=False, mlp_bias=False, n_group=1)(config)


def _granite_lacks(config: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    if config["position_embedding_type"] == "rope":
        return "position_embedding_type", "rope", "nope"
    if "mamba" not in config["layer_types"]:
        return "layer_types", tuple(config["layer_types"]), "at least one mamba"
    return _needs(mamba_proj_bias=False)(config)


def _qwen3_next_lacks(config: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    types = config["layer_types"]
    if len(set(types)) < 2:
        return "layer_types", tuple(types), f"both {LINEAR} and {FULL}"
    if config["linear_value_head_dim"] != config["linear_key_head_dim"]:
        return "linear_value_head_dim", config["linear_value_head_dim"], config["linear_key_head_dim"]
    return _needs(mlp_only_layers=[], norm_topk_prob=True, attention_bias=False)(config)


# transformers' class -> architecture of llama.cpp
_MAMBA_LACKS = _needs(expand=2, use_bias=False, use_conv_bias=True)
TARGETS = {
    "llama": Target(name="llama", settings=_llama, permuted=True),
    "mixtral": Target(name="llama", settings=_llama, permuted=True, lacks=_needs(sliding_window=None)),
    "mamba": Target(name="mamba", settings=_mamba, lacks=_MAMBA_LACKS),
    "falcon_mamba": Target(name="mamba", settings=_mamba, lacks=_MAMBA_LACKS),
    "mamba2": Target(name="mamba2", settings=_mamba2, lacks=_needs(use_bias=False, use_conv_bias=True)),
    "nemotron_h": Target(name="nemotron_h", settings=_nemotron_h, lacks=_nemotron_lacks),
    "granitemoehybrid": Target(name="granitehybrid", settings=_granite, lacks=_granite_lacks),
    "jamba": Target(
        name="jamba", settings=_jamba, lacks=_needs(mamba_expand=2, mamba_proj_bias=False, mamba_conv_bias=True)
    ),
    "falcon_h1": Target(
        name="falcon-h1", settings=_falcon_h1, lacks=_needs(attention_bias=False, projectors_bias=False)
    ),
    "lfm2": Target(name="lfm2", settings=_lfm2, lacks=_needs(conv_bias=False)),
    "lfm2_moe": Target(name="lfm2moe", settings=_lfm2_moe, lacks=_needs(conv_bias=False, norm_topk_prob=True)),
    "qwen3_next": Target(name="qwen3next", settings=_qwen3_next, lacks=_qwen3_next_lacks),
}


def gguf_fit(arch: Arch) -> Fit:
    """Return how the first of llama.cpp's architectures holds ours, or raise ConfigError that says why none does."""
    reasons: dict[str, str] = {}
    others: dict[str, str] = {}  # of architectures that have not even the pattern
    for name, target in TARGETS.items():
        try:
            found = fit(arch, name)
        except ConfigError as error:
            (others if error.field == "pattern" else reasons)[name] = str(error)
            continue
        lacking = _needs(hidden_act="silu")(found.config) or target.lacks(found.config)
        if lacking is None:
            return found
        field, got, allowed = lacking
        reasons[name] = f"llama.cpp's {target.name} has {field}={allowed!r}, got {got!r}"
    words = "; ".join(f"{name}: {reason}" for name, reason in (reasons or others).items())
    raise ConfigError(
        f"no architecture of llama.cpp holds pattern '{arch.pattern}' ({words}); use format=auto or format=hybridnas",
        field="format",
        got="gguf",
        allowed=("auto", "hybridnas"),
    )


def export_gguf(model: HybridLM, file: str | Path, *, tokenizer: Tokenizer | None = None) -> GgufExport:
    """Write the model, and the vocabulary of its tokenizer where llama.cpp has such a kind, as a GGUF file.

    The file appears whole or not at all. Raises ConfigError where no architecture holds the model and where the
    package ``gguf`` is not installed, ExportError where the file cannot be written.
    """
    if find_spec("gguf") is None:
        raise ConfigError("format=gguf needs gguf: pip install 'hybridnas[gguf]'", field="format", got="gguf")
    import gguf

    fitted = gguf_fit(model.arch)
    target = TARGETS[fitted.name]
    settings = target.settings(fitted.config, fitted)
    name = f"{target.name}_moe" if target.name == "nemotron_h" and "expert_count" in settings else target.name
    path = home(file)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(partial, name)
        for key, value in settings.items():
            _add(writer, f"{name}.{key}", value)
        words = vocabulary(tokenizer, model.arch.vocab_size)
        for key, value in words.fields.items():
            _add(writer, key, value)
        for key, tensor in gguf_tensors(model, fitted, name).items():
            writer.add_tensor(key, tensor.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    except OSError as error:
        raise ExportError(
            f"could not write {path} ({error.strerror or error}); free space there, or choose another file"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return GgufExport(path, name, words.reason)


def _add(writer: Any, key: str, value: Any) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)


def gguf_tensors(model: HybridLM, fitted: Fit, name: str) -> dict[str, Tensor]:
    """Return the model's weights, float32, under llama.cpp's names for the architecture ``name``."""
    import gguf

    own = restated(model, fitted)
    theirs = in_class(fitted.family.pieces(fitted.family.settings(fitted.config), fitted.arch), own)
    architecture = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[name]
    names = gguf.get_tensor_name_map(architecture, fitted.config["num_hidden_layers"])
    found: dict[str, Tensor] = {}
    for key, tensor in theirs.items():
        for own_key, part in _parts(key, tensor.float(), fitted):
            ready = own_key.startswith(("blk.", "output."))
            stored = own_key if ready else names.get_name(own_key, try_suffixes=(".weight", ".bias"))
            if stored is None:
                raise ExportError(f"gguf has no name for {own_key!r} in {name}", field=own_key)
            found[stored] = part
    if name == "lfm2moe" and not fitted.config["use_expert_bias"]:  # which llama.cpp asks for
        for node in fitted.arch.nodes:
            if node.slot.letter == "E":
                found[f"blk.{node.layer // 2}.exp_probs_b.bias"] = torch.zeros(fitted.config["num_experts"])
    return found


def _parts(key: str, tensor: Tensor, fitted: Fit) -> Iterator[tuple[str, Tensor]]:
    """Yield what llama.cpp makes of one tensor of the class, each under a name that gguf's map knows."""
    if match := re.fullmatch(r"model\.layers\.(\d+)\..*experts\.(gate_up_proj|up_proj|down_proj)", key):
        names = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else (match[2],)
        for name, part in zip(names, tensor.chunk(len(names), dim=1), strict=True):
            yield f"model.layers.{match[1]}.mlp.experts.{name}.weight", part
        return
    for pattern, by in fitted.family.hub.renames:
        key = re.sub(pattern, by, key)
    if fitted.name == "falcon_h1":
        if key == "model.embed_tokens.weight" and fitted.config["tie_word_embeddings"]:
            yield "output.weight", tensor * fitted.config["lm_head_multiplier"]
        tensor = tensor * _multiplier(key, fitted.config)
    if fitted.name == "qwen3_next" and key.endswith("in_proj_qkvz.weight"):
        heads, width = fitted.config["linear_num_key_heads"], fitted.config["linear_key_head_dim"]
        values = tensor.shape[0] // heads // 2 - width
        parts = torch.split(tensor.view(heads, -1, tensor.shape[1]), [width, width, values, values], dim=1)
        stem = key.removesuffix("qkvz.weight")
        yield f"{stem}qkv.weight", torch.cat([part.flatten(0, 1) for part in parts[:3]])
        yield f"{stem}z.weight", parts[3].flatten(0, 1)
        return
    if key.endswith("shared_mlp.input_linear.weight"):
        routed = fitted.config["num_local_experts"] > 0
        for name, part in zip(("gate", "up"), tensor.chunk(2), strict=True):
            own = f"ffn_{name}_shexp" if routed else f"ffn_{name}"
            yield f"blk.{key.split('.')[2]}.{own}.weight", part
        return
    config: Any = next((node.config for node in fitted.arch.nodes if node.slot.letter == "N"), None)
    if key.endswith("A_log"):
        tensor = -tensor.exp()
    if config is not None and key.endswith(("A_log", ".D")):
        tensor = tensor.unsqueeze(-1)
    elif config is not None and re.search(r"(mixer|mamba)\.norm\.weight$", key):
        tensor = tensor.view(config.n_groups, -1)
    elif key.endswith(("conv1d.weight", "conv.conv.weight")):
        tensor = tensor.squeeze(1)
    elif TARGETS[fitted.name].permuted and (match := re.search(r"\.([qk])_proj\.(weight|bias)$", key)):
        heads = fitted.config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
        tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    elif fitted.name == "qwen3_next" and key.endswith("norm.weight") and not key.endswith("linear_attn.norm.weight"):
        tensor = 1 + tensor
    yield _known(key), tensor


def _known(key: str) -> str:
    """Return a tensor's name of the class as gguf's map knows it."""
    key = re.sub(r"\.dt_bias$", ".dt_proj.bias", key)
    key = re.sub(r"(e_score_correction)_bias$", r"\1.bias", key)
    key = re.sub(r"\.expert_bias$", ".expert_bias.bias", key)
    return "output.weight" if key == "lm_head.weight" else key


def _multiplier(key: str, config: Mapping[str, Any]) -> float:
    """Return what Falcon-H1 multiplies the result of a matrix by, or its input; those of rows are in the matrix."""
    factors = {
        "model.embed_tokens.weight": "embedding_multiplier",
        "lm_head.weight": "lm_head_multiplier",
        "q_proj.weight": "attention_in_multiplier",
        "k_proj.weight": "attention_in_multiplier",
        "v_proj.weight": "attention_in_multiplier",
        "o_proj.weight": "attention_out_multiplier",
        "mamba.in_proj.weight": "ssm_in_multiplier",
        "mamba.out_proj.weight": "ssm_out_multiplier",
    }
    if re.search(r"down_proj\.(weight|bias)$", key):
        return float(config["mlp_multipliers"][1])
    return float(next((config[field] for name, field in factors.items() if key.endswith(name)), 1.0))
