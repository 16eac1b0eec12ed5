"""The paper's models: exact counts, the printed figures, the rules by which they scale, and their recipes."""

import subprocess
import sys

import pytest
import torch

from hybridnas.arch.model import HybridLM
from hybridnas.arch.presets import PRESETS, list_presets, preset, preset_arguments, recipe
from hybridnas.errors import ConfigError

EXACT = {  # parameters and active parameters without embeddings, derived by hand from the paper's tables
    "transformer": (25_202_688, 25_202_688),
    "transformer_moe": (545_406_976, 25_313_280),
    "mamba": (27_131_904, 27_131_904),
    "mamba_mlp": (26_173_440, 26_173_440),
    "moe_mamba": (416_358_400, 26_288_128),
    "moe_mamba_42e": (542_228_480, 26_329_088),
    "mamba_100m": (120_717_312, 120_717_312),
    "transformer_moe_100m": (2_454_110_208, 113_688_576),
    "moe_mamba_100m": (2_439_069_696, 117_522_432),
}
FINGERPRINTS = {  # as of version 0.1: an architecture keeps its fingerprint, on which studies and tables depend
    "transformer": "ad15c7d3d67ea8bb46f1605a941decdce321461e5688d93ccb1a916135575ff0",
    "transformer_moe": "ba5b557b09d2f531f4b4109f80d548c908c912ee8a72ee12ec29ac4766919bb2",
    "mamba": "89e0c397598d3f56fafc2713b6937c51d984f888921a623d5888804e9c2a75b4",
    "mamba_mlp": "97c1a43375075ae8f1f51c0d82c637ad204db53158b8e25e74e9aa8f81c674e9",
    "moe_mamba": "da02070340b78f443b7e240c26ecb0b3d2c42333f256ac0a0eef781ff86436e2",
    "moe_mamba_42e": "efae4d50f193515c32b18c9aa815df7bd32b7185fb22c684c16b478563af61e5",
    "mamba_100m": "5a899ad958fd53c156f7d6947fe3e1cd8a790fa4021a11ee50abf21f90a84a6c",
    "transformer_moe_100m": "fb72dab8ca4b9cd27e0dd9a7da77754e870037d8ec4b7999e924957018d4d99a",
    "moe_mamba_100m": "e5bfa3508de1d4ee1175406d0697ed81a921d48e56ba0a7358d3751afe580cea",
}
MISPRINTED = ("moe_mamba_100m", 2, "active")  # the paper prints 117M


def test_the_presets_with_rows_of_the_paper_are_its_nine_models():
    assert sorted(EXACT) == [name for name in list_presets() if PRESETS.get(name).paper]


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_fingerprints_are_those_of_version_0_1(name):
    assert preset(name).fingerprint() == FINGERPRINTS[name]


@pytest.mark.parametrize("name", EXACT)
def test_declared_counts_are_the_papers_to_the_integer(name):
    cost = preset(name).cost()
    assert (cost.params, cost.active_params) == EXACT[name]


@pytest.mark.parametrize("name", EXACT)
def test_the_built_module_has_exactly_the_declared_parameters(name):
    arch = preset(name)
    model = HybridLM(arch, device="meta")
    cost = arch.cost()
    assert sum(p.numel() for p in model.parameters()) == cost.params + cost.embedding_params
    assert cost.embedding_params == 2 * 50257 * arch.d_model


def test_every_count_rounds_to_the_papers_print_except_one_cell():
    wrong = []
    for name, (params, active) in EXACT.items():
        for row in PRESETS.get(name).paper:
            wrong += [(name, row.version, "params")] * (f"{round(params / 1e6)}M" != row.params)
            wrong += [(name, row.version, "active")] * (f"{round(active / 1e6)}M" != row.active_params)
    assert wrong == [MISPRINTED]


@pytest.mark.parametrize(("experts", "params"), [(1, 26_161_152), (4, 63_922_176), (8, 114_270_208), (16, 214_966_272)])
def test_the_expert_ablation_has_the_papers_counts(experts, params):
    assert preset("moe_mamba", n_experts=experts).cost().params == params


@pytest.mark.parametrize("name", ["moe_mamba", "mamba_mlp", "transformer", "transformer_moe"])
def test_scaling_rederives_widths_by_the_papers_rules(name):
    arch = preset(name, d_model=128, n_blocks=4)
    beside = 3 if "M" in arch.pattern.letters else 4
    widths = [getattr(n.config, "d_ff", None) or getattr(n.config, "d_expert", None) for n in arch.nodes]
    assert len(arch.pattern) == 8
    assert set(widths) - {None} == {beside * 128}


@pytest.mark.parametrize(("d_model", "heads"), [(512, 8), (768, 12), (128, 2), (64, 1), (32, 1)])
def test_heads_are_64_channels_wide_and_at_least_one(d_model, heads):
    arch = preset("transformer", d_model=d_model)
    assert next(arch.nodes).config.heads == heads


def test_own_sizes_and_fields_of_the_architecture_can_be_overridden():
    arch = preset("moe_mamba", d_model=64, n_blocks=2, d_expert=40, vocab_size=256, final_norm=True, E={"n_experts": 4})
    assert (arch.d_model, len(arch.pattern), arch.vocab_size, arch.model.final_norm) == (64, 4, 256, True)
    moe = list(arch.nodes)[1].config
    assert (moe.n_experts, moe.d_expert) == (4, 40)
    assert preset("mamba", pattern="Mx4", d_model=64).pattern.letters == "MMMM"
    assert preset("mamba", expand=3.0).cost().params > preset("mamba").cost().params


def test_arguments_and_their_defaults_are_data():
    assert preset_arguments("moe_mamba_100m") == {
        "d_model": 768,
        "n_blocks": 16,
        "n_experts": 42,
        "d_expert": None,
        "vocab_size": 50257,
    }


def test_an_unknown_override_names_the_nearest_and_everything_allowed():
    with pytest.raises(ConfigError, match=r"no argument 'n_expert'; did you mean 'n_experts'\?; allowed: d_model, n_b"):
        preset("moe_mamba", n_expert=8)
    with pytest.raises(ConfigError, match="'transformer' has no argument 'd_state'"):
        preset("transformer", d_state=8)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "64"])
def test_a_size_must_be_a_positive_whole_number(value):
    with pytest.raises(ConfigError, match=r"d_model=.* must be a whole number of at least 1"):
        preset("mamba", d_model=value)


def test_an_unknown_preset_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown preset 'moemamba'; did you mean 'moe_mamba'\?"):
        preset("moemamba")


def test_version_1_recipes_are_the_papers_figures():
    for name in ("transformer", "transformer_moe", "mamba", "mamba_mlp", "moe_mamba"):
        first = recipe(name)
        assert (first.steps, first.seq_len, first.batch_size, first.lr) == (100_000, 256, 256, 1e-3)
        assert (first.warmup_fraction, first.grad_clip) == (0.01, 0.5)
        assert first.tokens == 6_553_600_000
        assert first.source == "v1, Table 3"


@pytest.mark.parametrize(
    ("name", "steps", "batch", "lr"),
    [
        ("transformer", 150_000, 64, 5e-4),
        ("mamba", 150_000, 64, 1e-3),
        ("transformer_moe", 150_000, 64, 5e-4),
        ("moe_mamba_42e", 150_000, 64, 5e-4),
        ("mamba_100m", 30_000, 1024, 1e-3),
        ("transformer_moe_100m", 30_000, 1024, 2.5e-4),
        ("moe_mamba_100m", 30_000, 1024, 5e-4),
    ],
)
def test_version_2_recipes_are_the_papers_figures(name, steps, batch, lr):
    second = recipe(name, version=2)
    assert (second.steps, second.batch_size, second.seq_len, second.lr) == (steps, batch, 1024, lr)
    assert (second.schedule, second.final_lr_fraction, second.weight_decay) == ("cosine", 0.1, 0.1)
    assert (second.grad_clip, second.decay_all, second.beta1, second.beta2) == (0.5, True, 0.9, 0.999)


def test_a_recipe_of_a_version_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="'mamba_mlp' has no recipe of version 2 of the paper; it has: 1"):
        recipe("mamba_mlp", version=2)


def test_losses_of_the_papers_headline_rows():
    losses = {(n, row.version): row.loss for n in PRESETS for row in PRESETS.get(n).paper}
    assert losses["moe_mamba", 1] == 3.41
    assert losses["mamba", 1] == 3.51
    assert losses["moe_mamba_42e", 2] == 3.19
    assert losses["moe_mamba_100m", 2] == 2.81


def test_listing_presets_imports_no_torch():
    code = (
        "import sys; from hybridnas.arch.presets import list_presets; list_presets(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_recurrent_baselines_have_the_weights_of_torchs_modules(kind):
    arch = preset(f"{kind}_mlp", d_model=48, n_blocks=3, vocab_size=16)
    rnn, out, ff = getattr(torch.nn, kind.upper())(48, 48), torch.nn.Linear(48, 48), torch.nn.Linear(48, 192)
    one = sum(p.numel() for module in (rnn, out, ff) for p in module.parameters()) + 192 * 48 + 48 + 4 * 48
    assert (arch.pattern.letters, arch.cost().params) == ("UF" * 3, 3 * one)
    assert preset("s4d_mlp", d_model=48, n_blocks=3, vocab_size=16).pattern.letters == "DF" * 3
