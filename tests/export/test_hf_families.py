"""Models of transformers' classes read as ours: logits, decoding, gradients; configs and weights that are refused."""

import dataclasses
import functools
import json
import math
import subprocess
import sys

import pytest
import torch

import hybridnas
from hybridnas.arch.decode import Decoder
from hybridnas.errors import ConfigError, ExportError
from hybridnas.export.hf import read, read_arch
from hybridnas.export.hf.family import FAMILIES
from tests.oracles import randomize, relative

transformers = pytest.importorskip("transformers")

V, D, PROMPT, STEPS = 37, 32, 37, 16
SIZES = {"vocab_size": V, "hidden_size": D}
SIZES |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
HEADS = {**SIZES, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
QWEN = {**HEADS, **DELTA, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
QWEN_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 10,
    "moe_intermediate_size": 12,
    "num_experts_per_tok": 2,
}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 16}
# model_type -> class without its ending, settings of a tiny model with every kind of layer
MODELS = {
    "mistral, no window": ("Mistral", {**HEADS, "num_hidden_layers": 1, "sliding_window": None}),
    "llama": ("Llama", {**HEADS, "num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {**HEADS, "num_hidden_layers": 2, "sliding_window": 9}),
    "mixtral": ("Mixtral", {**HEADS, "num_hidden_layers": 2, "num_local_experts": 4}),
    "mamba": ("Mamba", {**SIZES, "num_hidden_layers": 2}),
    "falcon_mamba": ("FalconMamba", {**SIZES, "num_hidden_layers": 2, "use_bias": True}),
    "mamba2": (
        "Mamba2",
        {**SIZES, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 8},
    ),
    "jamba": (
        "Jamba",
        {**HEADS, "num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 4},
    ),
    "bamba": ("Bamba", {**HEADS, **MAMBA2, "num_hidden_layers": 3, "attn_layer_indices": [1], "mlp_bias": True}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            **HEADS,
            **MAMBA2,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 4,
            "shared_intermediate_size": 20,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.2,
            "logits_scaling": 6.0,
            "tie_word_embeddings": True,
        },
    ),
    "granitemoehybrid, dense, rope": (
        "GraniteMoeHybrid",
        {
            **HEADS,
            **MAMBA2,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "linear_attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 20,
            "position_embedding_type": "rope",
        },
    ),
    "falcon_h1": (
        "FalconH1",
        {
            **HEADS,
            **MAMBA2,
            "num_hidden_layers": 2,
            "mamba_d_ssm": 48,
            "mamba_n_groups": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 5.6,
            "lm_head_multiplier": 0.04,
            "key_multiplier": 0.4,
            "attention_in_multiplier": 0.9,
            "attention_out_multiplier": 0.6,
            "ssm_in_multiplier": 1.25,
            "ssm_out_multiplier": 0.24,
            "ssm_multipliers": [0.35, 0.5, 0.7, 1.4, 1.1],
            "mlp_multipliers": [0.8, 0.3],
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            **HEADS,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "moe_intermediate_size": 12,
            "moe_shared_expert_intermediate_size": 20,
            "time_step_min": 1e-12,  # see the test on steps below it
        },
    ),
    "qwen3_next": ("Qwen3Next", {**QWEN, **QWEN_EXPERTS, "mlp_only_layers": [0], "num_hidden_layers": 3, **{
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "attention_bias": True}}),
    "qwen3_5_text": ("Qwen3_5", {**QWEN, "tie_word_embeddings": True}),
    "qwen3_5_moe_text": ("Qwen3_5Moe", {**QWEN, **QWEN_EXPERTS}),
    "olmo_hybrid": ("OlmoHybrid", {**HEADS, **DELTA, "num_hidden_layers": 2, "layer_types": QWEN["layer_types"]}),
    "kimi_linear": (
        "KimiLinear",
        {
            **HEADS,
            **LATENT,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "num_local_experts": 4,
        },
    ),
    "minimax": (
        "MiniMax",
        {
            **HEADS,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "block_size": 16,
            "num_local_experts": 4,
            "full_attn_alpha_factor": 3.5,
            "full_attn_beta_factor": 0.8,
            "linear_attn_alpha_factor": 1.7,
            "mlp_alpha_factor": 2.5,
            "mlp_beta_factor": 1.2,
        },
    ),
    "lfm2": (
        "Lfm2",
        {
            **HEADS,
            "num_hidden_layers": 2,
            "layer_types": ["conv", "full_attention"],
            "block_multiple_of": 20,
            "conv_bias": True,
        },
    ),
    "lfm2_moe": (
        "Lfm2Moe",
        {
            **HEADS,
            "num_hidden_layers": 2,
            "layer_types": ["conv", "full_attention"],
            "num_dense_layers": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "routed_scaling_factor": 1.5,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **HEADS,
            **LATENT,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 12,
            "attention_bias": True,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "deepseek_v3, no query latent": (
        "DeepseekV3",
        {**HEADS, **LATENT, "num_hidden_layers": 1, "q_lora_rank": None, "rope_interleave": False},
    ),
}  # fmt: skip
MODELS["recurrent_gemma"] = (
    "RecurrentGemma",
    {**HEADS, "num_hidden_layers": 3, "num_key_value_heads": 1, "attention_window_size": 9, "lru_width": 40},
)
# its cache has multiples of 64 channels
MODELS["xlstm"] = ("xLSTM", {**SIZES, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2})
_ZAMBA2 = {
    **{**SIZES, "num_attention_heads": 4, "intermediate_size": 48, "adapter_rank": 3, "mamba_d_state": 8},
    **{"n_mamba_heads": 4, "mamba_ngroups": 2, "chunk_size": 16, "num_hidden_layers": 5},
    "time_step_min": 1e-12,  # its prompts clamp steps below it, as Nemotron-H's do
}
MODELS["zamba2"] = (
    "Zamba2",
    {**_ZAMBA2, "num_mem_blocks": 2, "layers_block_type": ["mamba", *["hybrid"] * 3, "mamba"]},
)
MODELS["zamba2, one block, rope"] = (
    "Zamba2",
    {
        **_ZAMBA2,
        **{"use_shared_attention_adapter": True, "use_mem_rope": True},
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
    },
)
every_model = pytest.mark.parametrize("name", MODELS)


def config_class(name):
    kind = MODELS[name][0]
    return getattr(transformers, f"{kind}{'Text' if kind.startswith('Qwen3_5') else ''}Config")


@functools.cache
def theirs_of(name):
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config_class(name)(**settings))
    randomize(model, std=0.1)
    for buffer, tensor in model.named_buffers():
        if buffer.endswith(("e_score_correction_bias", "expert_bias")):
            torch.nn.init.normal_(tensor, std=0.3)
    return model.eval()


def ids_BL(length):
    return torch.randint(V, (2, length), generator=torch.Generator().manual_seed(1))


def prefilled(model, ids):
    """Return their output with a cache, and the name of the cache."""
    output = model(ids, use_cache=True)
    return output, "past_key_values" if hasattr(output, "past_key_values") else "cache_params"


def decoded(model, ids, read_first):
    """Return their logits of the tokens after the first ones, one after another; positions given, as generate does."""
    output, key = prefilled(model, ids[:, :read_first])
    if not hasattr(output, key):  # RecurrentGemma keeps its states in its modules, and hands none on
        return model(ids, use_cache=False).logits[:, read_first:]
    cache, found = getattr(output, key), []
    for t in range(read_first, ids.shape[1]):
        positions = {} if key == "cache_params" else {"position_ids": torch.tensor([[t]])}
        found.append(model(ids[:, t : t + 1], use_cache=True, **{key: cache}, **positions).logits)
    return torch.cat(found, dim=1)


@every_model
@torch.no_grad()
def test_prefill_and_decoding_give_the_logits_of_transformers(name):
    theirs, ids = theirs_of(name), ids_BL(PROMPT + STEPS)
    ours = read(theirs)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    output = ours(ids[:, :PROMPT], state=ours.init_state(2))
    prefill = relative(output.logits, prefilled(theirs, ids[:, :PROMPT])[0].logits)
    decode = Decoder(ours, output.state)
    stepped = torch.stack([decode(ids[:, t]) for t in range(PROMPT, PROMPT + STEPS)], dim=1)
    step = relative(stepped, decoded(theirs, ids, PROMPT))
    assert (prefill < 1e-5, step < 1e-5) == (True, True), (prefill, step)


@every_model
def test_the_loss_in_training_has_the_gradient_of_transformers(name):
    theirs, ids = theirs_of(name), ids_BL(PROMPT)
    ours = read(theirs).train()
    theirs.train()
    theirs.zero_grad()
    wanted = theirs(ids, labels=ids, use_cache=False).loss
    wanted.backward()
    theirs.eval()
    got = ours(ids, labels=ids).loss
    got.backward()
    assert abs(got.item() - wanted.item()) < 1e-5 * wanted.item()
    assert relative(ours.embedding.weight.grad, theirs.get_input_embeddings().weight.grad) < 2e-5


@every_model
def test_a_folder_as_transformers_writes_it_is_the_same_model(name, tmp_path):
    theirs_of(name).save_pretrained(tmp_path)
    ours, again = read(theirs_of(name)), read(tmp_path)
    assert again.arch.fingerprint() == ours.arch.fingerprint()
    expected = ours.state_dict()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_from_hf_is_a_public_name_for_reading(tmp_path):
    theirs_of("llama").save_pretrained(tmp_path)
    ours = hybridnas.from_hf(tmp_path)
    assert torch.equal(ours(ids_BL(5)).logits, read(theirs_of("llama"))(ids_BL(5)).logits)
    assert next(hybridnas.from_hf(theirs_of("llama"), device="meta").parameters()).device.type == "meta"


@pytest.mark.parametrize("name", ["minimax", "falcon_h1", "lfm2_moe"])
def test_what_was_read_is_saved_and_loaded_as_any_model_of_ours(name, tmp_path):
    ours = read(theirs_of(name))
    ours.save_pretrained(tmp_path / "model")
    assert torch.equal(hybridnas.load(tmp_path / "model")(ids_BL(9)).logits, ours(ids_BL(9)).logits)


@pytest.mark.slow
def test_a_folder_is_read_without_transformers(tmp_path):
    theirs_of("llama").save_pretrained(tmp_path)
    program = f"import sys; sys.modules['transformers'] = None; import hybridnas; hybridnas.from_hf({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", program], check=True)


@torch.no_grad()
def test_nemotron_clamps_steps_in_the_prompt_alone_and_ours_never():
    settings = MODELS["nemotron_h"][1]
    torch.manual_seed(0)
    clamping = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**{**settings, "time_step_min": 0.05}))
    clamping.load_state_dict(theirs_of("nemotron_h").state_dict())
    clamping.eval()
    ids = ids_BL(PROMPT)
    whole, stepped = clamping(ids, use_cache=False).logits, decoded(clamping, ids, 1)
    assert relative(stepped, whole[:, 1:]) > 1e-3  # transformers disagrees with itself
    free = theirs_of("nemotron_h")(ids, use_cache=False).logits
    assert relative(read(clamping)(ids).logits, free) < 1e-5


DEFAULTS = sorted({name for name in MODELS if "," not in name})
NEEDED = {"lfm2_moe": {"layer_types": ["conv"] * 31 + ["full_attention"]}}


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_a_config_leaves_out_is_the_default_of_the_class(name):
    given = NEEDED.get(name, {})
    theirs = config_class(name)(**given)
    assert read_arch({"model_type": name, **given}).fingerprint() == read_arch(theirs).fingerprint()


# Settings that have no part in the function: of training, caches, tokens, output, and of chunks of computation.
HARMLESS = {
    *("attention_dropout", "initializer_range", "max_position_embeddings", "use_cache", "hidden_dropout"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "output_router_logits", "router_jitter_noise", "pretraining_tp"),
    *("num_logits_to_keep", "z_loss_coefficient", "residual_in_fp32", "rescale_prenorm_residual", "use_mambapy"),
    *("use_associative_scan", "use_mamba_kernels", "chunk_size", "mamba_chunk_size", "mamba_ssm_cache_dtype"),
    *("time_step_min", "time_step_max", "time_step_floor", "time_step_scale", "time_step_init_scheme", "block_size"),
    *("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor"),
    *("num_mtp_layers", "num_nextn_predict_layers", "mtp_layers_block_type", "moe_shared_expert_overlap"),
    "mamba_d_head",  # read with the default of the class, which is text in place of a number
    *("layer_types", "base_config_key", "ignore_keys_at_rope_validation"),
    "w_init_variance_scale",
    *("use_mem_eff_path",),
}
# Settings that a class has and does not read.
NOT_READ = {
    "xlstm": {
        *("norm_reduction_force_float32", "add_out_norm", "chunkwise_kernel", "sequence_kernel", "step_kernel", "mode"),
        *("return_last_states", "autocast_kernel_dtype", "inference_state_dtype", "max_inference_chunksize"),
    },
    "mamba2": {"time_step_rank"},
    "nemotron_h": {
        *("attention_bias", "sliding_window", "expand", "mamba_proj_bias", "n_shared_experts", "time_step_limit"),
    },
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_setting_that_a_class_reads_is_read(name):
    family = FAMILIES.get(name)
    own = {field.name for field in dataclasses.fields(config_class(name))}
    base = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    known = {*family.defaults, *family.aliases, *HARMLESS, *NOT_READ.get(name, ())}
    assert own - base - known == set()


@pytest.mark.parametrize(
    ("config", "field", "got"),
    [
        ({"model_type": "zamba3"}, "model_type", "zamba3"),
        ({}, "model_type", None),
        ({"model_type": "mixtral", "quantization_config": {"bits": 4}}, "quantization_config", {"bits": 4}),
        ({"model_type": "mixtral", "hidden_act": "mish"}, "hidden_act", "mish"),
        ({"model_type": "mixtral", "hidden_size": "big"}, "hidden_size", "big"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type", "yarn"),
        ({"model_type": "mamba2", "time_step_limit": [0.0, 0.1]}, "time_step_limit", (0.0, 0.1)),
        ({"model_type": "mamba", "hidden_act": "gelu"}, "hidden_act", "gelu"),
        ({"model_type": "nemotron_h", "moe_latent_size": 64}, "moe_latent_size", 64),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-+"}, "hybrid_override_pattern", "+"),
        ({"model_type": "granitemoehybrid", "layer_types": ["rnn"] * 32}, "layer_types", "rnn"),
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba"]}, "layer_types", 1),
        ({"model_type": "falcon_h1", "mamba_rms_norm": True}, "mamba_norm_before_gate", True),
        ({"model_type": "falcon_h1", "projectors_bias": True}, "projectors_bias", True),
        ({"model_type": "deepseek_v3", "num_key_value_heads": 8}, "num_key_value_heads", 8),
        ({"model_type": "kimi_linear", "attention_bias": True}, "attention_bias", True),
        ({"model_type": "minimax", "postnorm": False}, "postnorm", False),
        ({"model_type": "bamba", "mamba_n_heads": 0}, "config", None),
        ({"model_type": "lfm2", "layer_types": 3}, "config", None),
        ({"model_type": "kimi_linear", "mlp_layer_types": ["dense"]}, "config", None),
    ],
)
def test_a_config_that_we_cannot_express_is_refused(config, field, got):
    with pytest.raises(ConfigError) as error:
        read_arch(config)
    assert (error.value.field, error.value.got) == (field, got)
    assert error.value.allowed is not None or field in ("quantization_config", "config")


def test_settings_under_former_names_are_read():
    new = read_arch({"model_type": "nemotron_h", "layers_block_type": ["linear_attention", "mlp", "full_attention"]})
    assert read_arch({"model_type": "nemotron_h", "hybrid_override_pattern": "M-*"}).fingerprint() == new.fingerprint()
    old = {"model_type": "qwen3_next", "rope_theta": 1e7, "partial_rotary_factor": 0.5, "full_attention_interval": 2}
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5}
    types = ["linear_attention", "full_attention"] * 24
    new = read_arch({"model_type": "qwen3_next", "rope_parameters": rope, "layer_types": types})
    assert read_arch(old).fingerprint() == new.fingerprint()
    limits = {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    plain = read_arch({"model_type": "mamba2", "time_step_limit": [0.0, math.inf]})
    assert read_arch({"model_type": "mamba2", **limits}).fingerprint() == plain.fingerprint()


@pytest.fixture
def folder(tmp_path):
    theirs_of("lfm2_moe").save_pretrained(tmp_path)
    return tmp_path


def rewritten(folder, change):
    """Apply a change to the tensors of a folder."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


EXPERT = "model.layers.1.feed_forward.experts.2.w1.weight"
CONV = "model.layers.0.conv.conv.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda tensors: tensors.pop(CONV), CONV),
        (lambda tensors: tensors.pop(EXPERT), "model.layers.1.feed_forward.experts.2"),
        (lambda tensors: tensors.update({CONV: torch.zeros(D, 1, 4)}), CONV),
        (lambda tensors: tensors.update({CONV: torch.tensor(0.0)}), CONV),
        (lambda tensors: tensors.update({EXPERT: torch.zeros(5, 7)}), EXPERT.replace("2.w1.weight", "gate_up_proj")),
        (lambda tensors: tensors.update({QUERY: torch.zeros(8, D)}), QUERY),
        (lambda tensors: tensors.update({QUERY: torch.zeros(D + 8, D)}), QUERY),
        (lambda tensors: tensors.update({QUERY: torch.zeros(D, D, dtype=torch.int8)}), QUERY),
        (lambda tensors: tensors.update({"model.layers.0.conv.extra": torch.zeros(1)}), "model.layers.0.conv.extra"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.zeros(V, D)}), "tie_word_embeddings"),
    ],
)
def test_weights_of_another_model_are_refused(folder, change, field):
    rewritten(folder, change)
    with pytest.raises(ExportError) as error:
        read(folder)
    assert error.value.field == field


@pytest.mark.parametrize("layers", [-1, 0, 10**9])
def test_a_number_of_layers_that_no_model_has_is_refused_by_its_name(folder, layers):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    with pytest.raises(ConfigError) as error:
        read(folder)
    assert (error.value.field, error.value.got) == ("num_hidden_layers", layers)


def test_a_folder_without_usable_weights_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ExportError) as error:
        read(folder)
    assert error.value.field == "model.safetensors"
    path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ExportError) as error:
        read(folder)
    assert (error.value.field, "never loaded" in str(error.value)) == ("model.safetensors", True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))
    with pytest.raises(ExportError) as error:
        read(folder)
    assert error.value.got == "../other.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": [1]}}))
    with pytest.raises(ExportError) as error:
        read(folder)
    assert error.value.got == "[1]"
    (folder / "config.json").unlink()
    with pytest.raises(ExportError) as error:
        read(folder)
    assert error.value.field == "config.json"


def test_shards_are_read_and_dtypes_kept(tmp_path):
    theirs = theirs_of("lfm2_moe")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(read(tmp_path).embedding.weight, theirs.get_input_embeddings().weight)
    rewritten_dtype = {name: t.bfloat16() for name, t in theirs.state_dict().items()}
    half = transformers.Lfm2MoeForCausalLM(theirs.config)
    half.load_state_dict(rewritten_dtype)
    ours = read(half.bfloat16())
    assert ours.embedding.weight.dtype == torch.bfloat16
    assert ours.layers[3].branches[0][0].routed.router.weight.dtype == torch.float32
