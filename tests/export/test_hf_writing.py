"""Our models in the layout of transformers' classes: every tensor, logits, what fits, and what is refused."""

import json

import pytest
import torch

import hybridnas
from hybridnas.errors import ConfigError, ExportError
from hybridnas.export.hf import read, reload
from hybridnas.export.hf.fitting import chosen, exportable, fit, formats
from hybridnas.export.hf.weights import as_in_class
from hybridnas.export.hf.writing import compared, export_native
from hybridnas.export.layout import probe_ids
from tests.export.test_hf_families import MODELS, theirs_of

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file

V = 37
# What a class has and our attention, MLPs and experts have not by default.
RMS = {"norm": "rmsnorm", "final_norm": True, "d_model": 32, "vocab_size": V, "norm_eps": 1e-5}
SWIGLU = {"activation": "silu", "gated": True, "bias": False}
HEADS = {"n_heads": 4, "n_kv_heads": 2}
DROPLESS = {"n_experts": 4, "d_expert": 12, "capacity_factor": None}
TOP2 = {**DROPLESS, "router": "top_k", "top_k": 2}
MIXED = {**TOP2, "renormalize": True, "activation": "silu", "gated": True}
DEEPSEEK = {**MIXED, "scores": "sigmoid", "correction_bias": True, "d_shared": 12}
DELTA = {"n_heads": 2, "head_dim": 8, "value_head_dim": 16, "norm_eps": 1e-5}
QK = {**HEADS, "qk_norm": "head", "norm_eps": 1e-5, "gate": "elementwise", "rotary_fraction": 0.5}
LATENT = {"n_heads": 4, "kv_rank": 8, "rope_dim": 4}
# format -> a pattern in an order of its own, and the options that the class has
OURS = {
    "llama": ("AFAF", {"A": HEADS, "F": SWIGLU}),
    "mistral": ("SFSF", {"S": {**HEADS, "window": 9}, "F": SWIGLU}),
    "mixtral": ("AEAE", {"A": HEADS, "E": MIXED}),
    "mamba": ("MMM", {}),
    "falcon_mamba": ("MM", {"M": {"selective_norm": "unscaled"}}),
    "mamba2": ("NNN", {"N": {"head_dim": 16}}),
    "nemotron_h": (
        "NENAFFAE",
        {
            "A": {**HEADS, "positions": "none"},
            "F": {"activation": "relu2", "bias": False},
            "E": {**TOP2, "activation": "relu2", "scores": "sigmoid"},
        },
    ),
    "granitemoehybrid": ("AENENE", {"A": {**HEADS, "positions": "none"}, "E": MIXED}),
    "jamba": (
        "MFAEMFAE",
        {
            "M": {"selective_norm": "scaled", "selective_norm_eps": 1e-5},
            "A": {"positions": "none"},
            "F": {**SWIGLU, "d_ff": 12},
            "E": {**TOP2, "activation": "silu", "gated": True},
        },
    ),
    "bamba": ("NFAFAF", {"A": {**HEADS, "rotary_fraction": 0.5}, "F": SWIGLU}),
    "falcon_h1": ("[A,N]F[N,A]F", {"A": HEADS, "F": SWIGLU}),
    "qwen3_next": ("GEAFGE", {"G": DELTA, "A": QK, "F": SWIGLU, "E": MIXED}),
    "qwen3_5_text": ("GFAF", {"G": DELTA, "A": QK, "F": SWIGLU}),
    "qwen3_5_moe_text": ("AEGE", {"G": DELTA, "A": QK, "E": {**MIXED, "d_shared": 20, "shared_gate": True}}),
    "olmo_hybrid": (
        "GFA{norm_position=post}F{norm_position=post}",
        {"G": DELTA, "A": {**HEADS, "qk_norm": "all", "norm_eps": 1e-5}, "F": SWIGLU},
    ),
    "kimi_linear": (
        "KFAEKE",
        {
            "K": {"n_heads": 4, "head_dim": 8, "decay_rank": 8, "gate_rank": 8, "norm_eps": 1e-5},
            "A": {**LATENT, "positions": "none"},
            "F": SWIGLU,
            "E": DEEPSEEK,
        },
    ),
    "minimax": (
        "L{decay_factor=1.00001}EAE",
        {
            "norm_position": "stream",
            "L": {"kind": "lightning", "n_heads": 4, "head_dim": 8, "value_head_dim": 8, "norm_eps": 1e-6},
            "A": HEADS,
            "E": MIXED,
        },
    ),
    "lfm2": ("AFCFCF", {"A": {**HEADS, "qk_norm": "head", "norm_eps": 1e-5}, "F": SWIGLU}),
    "lfm2_moe": (
        "CFCFAE",
        {
            "A": {**HEADS, "qk_norm": "head", "norm_eps": 1e-5},
            "F": SWIGLU,
            "E": {**MIXED, "scores": "sigmoid", "renormalize_eps": 1e-6},
        },
    ),
    "deepseek_v3": ("AFAEAE", {"A": LATENT, "F": SWIGLU, "E": DEEPSEEK}),
}
every_format = pytest.mark.parametrize("name", formats())


def ours_of(name):
    pattern, fields = OURS[name]
    model = hybridnas.build(hybridnas.Arch.from_pattern(pattern, **RMS, **fields))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


# Where transformers' own writer does not give the released names: it names the norms of layers of attention, or the
# MLP of the first layer, by those of other layers, and cuts the convolutions into equal thirds.
OWN_NAMES = {"olmo_hybrid", "kimi_linear"}


@pytest.mark.parametrize("name", [name for name in MODELS if name.partition(",")[0] in formats()])
def test_what_was_read_is_written_as_transformers_writes_it_and_read_again(name, tmp_path):
    theirs_of(name).save_pretrained(tmp_path / "theirs")
    ours = read(theirs_of(name))
    format = name.partition(",")[0]
    export_native(ours, tmp_path / "ours", format=format, check=False)
    again = read(tmp_path / "ours")
    assert again.arch.fingerprint() == ours.arch.fingerprint()
    expected = ours.state_dict()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    got, wanted = (load_file(tmp_path / where / "model.safetensors") for where in ("ours", "theirs"))
    if format in OWN_NAMES:
        renames = fit(ours.arch, format).family.renames
        got, wanted = (
            {key: get() for key, get in as_in_class({n: lambda t=t: t for n, t in x.items()}, renames).items()}
            for x in (got, wanted)
        )
    derived = {key for key in wanted if key.rpartition(".")[2].endswith(("slope_rate", "_decay"))}  # from the config
    assert set(got) == set(wanted) - derived
    assert {key: tensor.shape for key, tensor in got.items()} == {key: wanted[key].shape for key in got}
    if name == "falcon_h1" or "no query latent" in name:
        return  # multipliers have become part of the matrix; the release's order of rotary channels: test below
    for key, tensor in got.items():
        assert torch.equal(tensor, wanted[key]), key


@every_format
def test_a_pattern_of_ours_gives_the_logits_of_transformers(name, tmp_path):
    """In this process, whatever the number of formats; one test starts a fresh one, as every export does."""
    model = ours_of(name)
    written = export_native(model, tmp_path / "out", format=name, check=False)
    assert written.format == name
    save_file({"ids": probe_ids(V)}, tmp_path / "ids")
    paths = (tmp_path / "out", tmp_path / "ids", tmp_path / "logits")
    facts = reload.write_logits(*map(str, paths))
    family = fit(model.arch, name).family
    found = compared(model, facts, load_file(tmp_path / "logits"), family.unused)
    assert found.class_name == family.class_name
    assert max(found.prefill, found.chunked or 0, found.decoded) < 1e-5


@pytest.mark.slow
def test_an_export_is_checked_in_a_fresh_process_and_replaced_by_the_next(tmp_path):
    out = tmp_path / "out"
    first = export_native(ours_of("mixtral"), out, format="auto", shard_bytes=20_000)
    assert (first.format, first.reloaded.class_name) == ("mixtral", "MixtralForCausalLM")
    assert max(first.reloaded.prefill, first.reloaded.chunked, first.reloaded.decoded) < 1e-5
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = {path.name for path in out.glob("model-*.safetensors")}
    assert len(stored) > 1
    assert stored == set(index["weight_map"].values())
    assert read(out).arch.pattern.letters == json.loads((out / "config.json").read_text())["hybridnas"]["pattern"]
    ours_of("mamba").save_pretrained(out)
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]
    assert hybridnas.load(out).arch.pattern.letters == "MMM"


def test_logits_that_differ_export_nothing(tmp_path):
    model = ours_of("llama")
    export_native(model, tmp_path / "out", format="llama", check=False)
    facts = reload.write_logits(*map(str, _with_ids(tmp_path)))
    with torch.no_grad():
        model.embedding.weight += 1
    with pytest.raises(ExportError) as error:
        compared(model, facts, load_file(tmp_path / "logits"))
    assert (error.value.field, error.value.allowed) == ("prefill", 1e-4)
    with pytest.raises(ExportError) as error:
        compared(model, {**facts, "missing_keys": ["model.norm.weight"]}, {})
    assert (error.value.field, error.value.got) == ("missing_keys", ("model.norm.weight",))
    with pytest.raises(ExportError) as error:
        compared(model, {"error": "OSError: no weights"}, {})
    assert error.value.got == "OSError: no weights"


def _with_ids(folder):
    save_file({"ids": probe_ids(V)}, folder / "ids")
    return folder / "out", folder / "ids", folder / "logits"


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    theirs_of("llama").save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ExportError) as error:
        export_native(ours_of("llama"), tmp_path, format="llama", check=False)
    assert error.value.field == "model_type" or "not ours" in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == before


def arch_of(pattern, **changes):
    name = changes.pop("like")
    _, fields = OURS[name]
    letters = set(pattern)
    fields = {key: value for key, value in fields.items() if len(key) > 1 or key in letters}
    return hybridnas.Arch.from_pattern(pattern, **RMS, **fields).replace(**changes)


@pytest.mark.parametrize(
    ("arch", "format", "field", "got"),
    [
        (arch_of("NANF", like="nemotron_h", A={"positions": "rope"}), "nemotron_h", "positions", "rope"),
        (arch_of("NANF", like="nemotron_h", A={"window": 8}), "nemotron_h", "window", 8),
        (arch_of("NANF", like="nemotron_h", F={"bias": True}).replace(N={"bias": True}), "bamba", "pattern", "A"),
        (arch_of("NAF", like="nemotron_h", norm="layernorm"), "nemotron_h", "norm", "layernorm"),
        (arch_of("NAF", like="nemotron_h", final_norm=False), "nemotron_h", "final_norm", False),
        (arch_of("NAE", like="nemotron_h", E={"scores": "softmax"}), "nemotron_h", "scores", "softmax"),
        (arch_of("NFNE", like="nemotron_h"), "nemotron_h", "pattern", "NFNE"),  # its cache counts tokens in attention
        (arch_of("CF", like="lfm2"), "lfm2", "pattern", "CF"),
        (arch_of("MAF", like="nemotron_h"), "nemotron_h", "pattern", "M"),
        (arch_of("M", like="mamba", M={"d_inner": 40}), "mamba", "d_inner", 40),
        (arch_of("NAFF{d_ff=8}", like="nemotron_h"), "nemotron_h", "d_ff", 8),
        (arch_of("MFMEAEMF", like="jamba"), "jamba", "pattern", (1, 2)),
        (arch_of("AF N@s F N@s F", like="bamba"), "bamba", "pattern", "N@s"),
        (arch_of("AFA", like="llama"), "llama", "pattern", "A"),
        (arch_of("AF", like="llama", A={"kv_rank": 4, "n_kv_heads": None}), "llama", "kv_rank", 4),
        (arch_of("AE", like="deepseek_v3", E={"d_shared": 5}), "deepseek_v3", "d_shared", 5),
        (arch_of("AF", like="llama", n_meta_tokens=2), "llama", "n_meta_tokens", 2),
    ],
)  # fmt: skip
def test_what_a_class_cannot_express_is_refused_with_the_formats_that_can(arch, format, field, got):
    with pytest.raises(ConfigError) as error:
        chosen(arch, format)
    assert (error.value.field, error.value.got) == (field, got)
    fitting = [name for name, reason in exportable(arch).items() if not reason]
    assert format not in fitting
    for name in [*fitting, "hybridnas"]:
        assert f"format={name}" in str(error.value)


def test_auto_takes_the_class_with_the_least_beside_what_is_needed():
    for name in OURS:
        assert not exportable(ours_of(name).arch)[name]
    assert chosen(arch_of("AF", like="llama"), "auto").name == "llama"
    assert chosen(arch_of("NFAF", like="bamba"), "auto").name == "bamba"
    with pytest.raises(ConfigError) as error:
        chosen(hybridnas.preset("moe_mamba"), "auto")
    assert (error.value.field, error.value.allowed) == ("format", ("hybridnas",))
    with pytest.raises(ConfigError) as error:
        chosen(hybridnas.preset("mamba_130m"), "bert")
    assert error.value.got == "bert"


def test_norms_with_weights_around_one_become_weights_around_zero_and_back():
    found = fit(ours_of("qwen3_next").arch, "qwen3_next")
    assert found.arch.model.norm == "rmsnorm_zero"
    assert fit(hybridnas.Arch.from_pattern("AFAF", **{**RMS, "norm": "rmsnorm_zero"}, A=HEADS, F=SWIGLU), "llama")


def test_every_format_has_a_pattern_and_a_model_here():
    assert set(OURS) == set(formats())
    assert {name.partition(",")[0] for name in MODELS} == {
        *formats(),
        "recurrent_gemma",
        "xlstm",
        "zamba2",
    }  # that are read alone


def test_code_of_a_model_that_is_not_known_is_never_run(tmp_path):
    config = {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as error:
        read(tmp_path)
    assert (error.value.field, error.value.got) == ("auto_map", config["auto_map"])
    assert "nemotron_h" in error.value.allowed
