"""Released models as presets: integers against transformers' classes, counting traps, and how the recipes scale."""

import itertools

import pytest
import torch
from released import RELEASED, transformers_model

import hybridnas
from hybridnas.arch import scaling
from hybridnas.arch.model import HybridLM
from hybridnas.arch.presets import PRESETS, Release, families, layered, preset, preset_arguments, register_family
from hybridnas.cli.describe import active_counts, conventions_of
from hybridnas.errors import ConfigError
from hybridnas.search_spaces.space import Scale, Space, load_space

RELEASES = {name: PRESETS.get(name).release for name in PRESETS if PRESETS.get(name).release is not None}
SMALL = {"d_model": 32, "n_blocks": 4, "vocab_size": 64}


def small(name):
    experts = {"n_experts": 4} if "n_experts" in preset_arguments(name) else {}
    return preset(name, **SMALL, **experts)


def total(arch):
    cost = arch.cost()
    return cost.params + cost.embedding_params


def places(arch, letter):
    return [index for index, found in enumerate(arch.pattern.letters) if found == letter]


@pytest.mark.parametrize("name", [name for name, release in RELEASES.items() if not release.lacks])
def test_a_release_has_exactly_its_number_of_parameters(name):
    assert total(preset(name)) == RELEASES[name].total


@pytest.mark.parametrize(("name", "mlps"), [("openmoe_base", 12 + 3 * 16), ("openmoe_8b", 24 + 4 * 32)])
def test_openmoe_lacks_one_matrix_of_every_mlp_and_expert(name, mlps):
    arch = preset(name)
    assert RELEASES[name].total - total(arch) == mlps * arch.d_model * RELEASES[name].d_ff
    assert {name for name, release in RELEASES.items() if release.lacks} == {"openmoe_base", "openmoe_8b"}


@pytest.mark.parametrize("name", RELEASED)
def test_transformers_counts_the_same_from_the_released_configuration(name):
    assert sum(p.numel() for p in transformers_model(name).parameters()) == RELEASES[name].total


def test_only_models_without_a_class_of_transformers_are_counted_by_a_formula():
    without = {name for name, release in RELEASES.items() if not release.counted.startswith("transformers ")}
    assert (
        without
        == set(RELEASES) - set(RELEASED)
        == {"openmoe_base", "openmoe_8b", "samba_421m", "samba_1_3b", "stripedhyena_7b"}
        | {name for name in RELEASES if name.startswith("rwkv7")}
    )


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_names_its_source_and_how_it_was_counted(name):
    release = RELEASES[name]
    assert release.source
    assert release.counted
    assert release.params


@pytest.mark.parametrize(
    ("name", "conventions"),
    [
        ("mixtral", ["both"]),
        ("minimax_text_01", ["neither"]),
        ("nemotron_3_nano", ["one"]),
        ("qwen3_next", ["neither"]),
        ("granite_h_small", ["both"]),
        ("jamba", ["neither", "both", "one"]),  # 11.6, 11.8 and 12.1 are all 12B
        ("lfm2_8b_a1b", []),  # 1.4B or 1.6B, printed as 1.5B
    ],
)
def test_the_makers_active_figure_tells_by_which_convention_it_counts(name, conventions):
    assert conventions_of(RELEASES[name].active_params, active_counts(preset(name))) == conventions


def test_active_parameters_have_three_conventions():
    assert active_counts(preset("nemotron_3_nano")) == {
        "neither": 2_875_430_336,
        "one": 3_227_751_872,
        "both": 3_580_073_408,
    }
    tied = active_counts(preset("granite_h_small"))
    assert tied == {"neither": 8_392_079_872, "both": 8_392_079_872 + 100352 * 4096}


@pytest.mark.parametrize(("name", "count"), [("nemotron_3_nano", 23 * 128), ("lfm2_8b_a1b", 22 * 32)])
def test_correction_biases_of_routers_are_buffers_and_not_counted(name, count):
    theirs, ours = transformers_model(name), HybridLM(preset(name), device="meta")
    for model in (theirs, ours):
        biases = [b for key, b in model.named_buffers() if key.endswith(("correction_bias", "expert_bias"))]
        assert sum(bias.numel() for bias in biases) == count
        assert sum(p.numel() for p in model.parameters()) == RELEASES[name].total


def test_defaults_of_a_class_are_not_the_release():
    default = transformers_model("kimi_linear", layer_types=None)
    assert sum(p.numel() for p in default.parameters()) != RELEASES["kimi_linear"].total
    assert default.config.layer_types[4] == "full_attention"
    assert places(preset("kimi_linear"), "A") == [2 * (layer - 1) for layer in (4, 8, 12, 16, 20, 24, 27)]


@pytest.mark.parametrize(("name", "config", "built"), [("lfm2_350m", 6656, 4608), ("lfm2_1_2b", 12288, 8192)])
def test_lfm2_builds_a_narrower_mlp_than_its_configuration_names(name, config, built):
    model = transformers_model(name)
    assert model.config.intermediate_size == config
    assert model.model.layers[0].feed_forward.w1.out_features == built
    assert {node.config.d_ff for node in preset(name).nodes if node.slot.letter == "F"} == {built}


def test_heads_for_several_tokens_are_outside_the_totals():
    model = transformers_model("qwen3_next", num_hidden_layers=4)
    assert not [name for name, _ in model.named_parameters() if "mtp" in name]
    assert "^mtp.*" in model._keys_to_ignore_on_load_unexpected  # the checkpoint has them


def test_openmoe_has_an_extra_mlp_after_its_experts():
    assert preset("openmoe_base").pattern.letters == "AFAFAFAEF" * 3
    assert preset("openmoe_8b").pattern.letters == ("AF" * 5 + "AEF") * 4


SMALLEST = {names[0] for names in families().values()}  # of each family: the fast loop trains these
TRAINED = [pytest.param(name, marks=[] if name in SMALLEST else [pytest.mark.slow]) for name in RELEASES]


@pytest.mark.parametrize("name", TRAINED)
def test_a_scaled_release_trains_and_generates(name):
    torch.manual_seed(0)
    arch = small(name)
    model = HybridLM(arch)
    assert sum(p.numel() for p in model.parameters()) == total(arch)
    ids = torch.randint(64, (2, 24))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert model.eval().generate(ids[:, :5], max_new_tokens=3).shape == (2, 8)


@pytest.mark.parametrize("name", RELEASES)
def test_every_release_has_an_architecture_of_any_width_and_depth(name):
    whole = preset(name)
    layers = len(whole.pattern) / RELEASES[name].n_blocks
    for n_blocks, d_model in itertools.product([1, 2, 3, 5, 8, 13], [24, 64, 200]):
        arch = preset(name, n_blocks=n_blocks, d_model=d_model)
        assert arch.d_model == d_model
        assert abs(len(arch.pattern) - layers * n_blocks) <= 1
        assert n_blocks < 2 or ("A" in arch.pattern.letters) == ("A" in whole.pattern.letters)


@pytest.mark.parametrize("name", RELEASES)
def test_half_the_width_is_about_a_quarter_of_the_weights(name):
    whole = preset(name)
    half = preset(name, d_model=whole.d_model // 2)
    assert 0.2 < half.cost().params / whole.cost().params < 0.36
    assert 0.2 < half.cost().active_params / whole.cost().active_params < 0.36


@pytest.mark.parametrize(
    ("name", "n_blocks", "letter", "expected"),
    [
        ("granite_h_tiny", 40, "A", [10, 30, 50, 70]),
        ("granite_h_tiny", 20, "A", [10, 30]),
        ("bamba", 16, "A", [10, 24]),
        ("samba_421m", 6, "A", [2, 6, 10]),
        ("nemotron_h", 26, "A", [7, 18]),
        ("openmoe_8b", 3, "E", [5]),
    ],
)
def test_few_layers_keep_their_share_and_their_places(name, n_blocks, letter, expected):
    assert places(preset(name, n_blocks=n_blocks), letter) == expected


@pytest.mark.parametrize("scale", [(32, 4, 2, 4), (48, 4, 2, 8), (128, 8, 8, 16)])  # of budgets smoke to workstation
@pytest.mark.parametrize("name", RELEASES)
def test_every_release_is_a_baseline_of_the_same_size(name, scale):
    d_model, depth, multiple, n_experts = scale
    sizes = Scale(d_model=d_model, depth=depth, multiple=multiple, n_experts=n_experts)
    space = load_space("hybrid")
    arch = space.baseline(name, sizes)
    assert abs(arch.cost().active_params / space.target(sizes) - 1) <= 0.02
    assert abs(len(arch.pattern) - depth) <= 1


def test_published_recipes_are_what_a_study_is_compared_with():
    names = ["jamba", "nemotron_h", "qwen3_next"]
    study = hybridnas.create_study("hybrid", "smoke", baselines=names, reference="jamba")
    space = Space.from_mapping(study.config.space)
    assert (space.baselines, space.reference) == (tuple(names), "jamba")
    scale = Scale(d_model=32, depth=4, multiple=2, n_experts=4)
    assert space.target(scale) == preset("jamba", d_model=32, n_blocks=2, n_experts=4).cost().active_params
    with pytest.raises(ConfigError) as caught:
        hybridnas.create_study("hybrid", baselines=["jambo"])
    assert (caught.value.field, caught.value.got) == ("space.baselines", "jambo")


def test_a_family_of_ones_own_is_a_table_and_a_function():
    table = [
        Release(name=f"own_{d}", title=f"Own-{d}", source="here", total=0, counted="by hand", d_model=d, n_blocks=2,
                vocab_size=32, n_experts=e)
        for d, e in ((16, 0), (32, 4))
    ]  # fmt: skip

    def own(release, *, d_model, n_blocks, n_experts, vocab_size):
        """MLP or experts."""
        letters = ["E" if release.n_experts else "F"] * n_blocks
        return layered(letters, d_model=d_model, vocab_size=vocab_size, E={"n_experts": n_experts}, F={"d_ff": 8})

    try:
        register_family(*table)(own)
        assert preset_arguments("own_16") == {"d_model": 16, "n_blocks": 2, "vocab_size": 32}
        assert preset_arguments("own_32") == {"d_model": 32, "n_blocks": 2, "n_experts": 4, "vocab_size": 32}
        assert str(preset("own_32", n_blocks=3, n_experts=2).pattern) == "EEE"
        assert PRESETS.get("own_16").summary == "Own-16: MLP or experts."
        with pytest.raises(ConfigError) as caught:
            register_family(table[0])(own)
        assert (caught.value.field, caught.value.got) == ("preset", "own_16")
    finally:
        for release in table:
            PRESETS.remove(release.name)


def test_none_leaves_a_size_as_released_and_other_fields_are_those_of_the_architecture():
    assert preset("jamba", d_model=None, n_experts=None).fingerprint() == preset("jamba").fingerprint()
    changed = preset("jamba", d_model=64, n_blocks=8, A={"window": 16}, d_ff=40)
    assert {node.config.window for node in changed.nodes if node.slot.letter == "A"} == {16}
    assert {node.config.d_ff for node in changed.nodes if node.slot.letter == "F"} == {40}
    with pytest.raises(ConfigError) as caught:
        preset("nemotron_h", n_experts=8)  # has none
    assert caught.value.field == "preset.n_experts"


def test_attention_follows_a_mixer_in_a_nemotron_of_any_depth():
    for n_blocks in range(3, 60):
        letters = preset("nemotron_h", n_blocks=n_blocks).pattern.letters
        assert len(letters) == n_blocks
        assert all(letters[index - 1] == "N" for index, letter in enumerate(letters) if letter == "A")


def test_fewer_experts_are_as_wide_together():
    whole, few = (list(preset("granite_h_small", n_experts=n).nodes)[1].config for n in (72, 16))
    assert (whole.top_k, few.top_k) == (10, 4)
    assert whole.top_k * whole.d_expert == few.top_k * few.d_expert == 7680
    assert scaling.routing(2, 64, 1, 1.0)["top_k"] == 1


def test_heads_keep_their_width_and_their_queries_per_key():
    assert scaling.attention_heads(32, 8, 128, 1) == {"n_heads": 32, "n_kv_heads": 8, "head_dim": 128}
    assert scaling.attention_heads(32, 8, 128, 0.25) == {"n_heads": 8, "n_kv_heads": 2, "head_dim": 128}
    assert scaling.attention_heads(16, 2, 256, 1 / 32) == {"n_heads": 8, "n_kv_heads": 1, "head_dim": 16}
    assert scaling.recurrent_heads(128, 64, 0.25, groups=8) == (32, 64, 2)
    assert scaling.recurrent_heads(24, 128, 1 / 48, groups=1) == (1, 64, 1)
    assert [scaling.state_size(128, d) for d in (32, 64, 256, 768)] == [16, 16, 64, 128]


@pytest.mark.parametrize(("smaller", "larger"), [("mamba2_130m", "mamba2_1_3b"), ("mamba_130m", "mamba_790m")])
def test_a_family_of_one_rule_gives_one_release_from_another(smaller, larger):
    sizes = {"d_model": RELEASES[smaller].d_model, "n_blocks": RELEASES[smaller].n_blocks}
    assert preset(larger, **sizes).fingerprint() == preset(smaller).fingerprint()


def test_families_list_every_preset_once_smaller_releases_first():
    found = families()
    assert sorted(name for group in found.values() for name in group) == sorted(PRESETS)
    assert found["granite"][0] == "granite_h_350m"
    assert found["granite"][-1] == "granite_h_small"


@pytest.mark.parametrize(
    ("name", "n_in", "n_out", "a_out", "f_out", "logits"),
    [
        ("falcon_h1_0_5b", 1.25, 0.23570226039551587, 0.9375, 0.5859375, 0.0390625),
        ("falcon_h1_7b", 0.416667, 0.117851, 0.104167, 0.0325521, 0.0130208),
    ],
)
def test_falcon_h1_has_its_published_multipliers(name, n_in, n_out, a_out, f_out, logits):
    arch = preset(name)
    found = {node.slot.letter: node.config for node in arch.nodes}
    n, a, f = (found[letter] for letter in "NAF")
    assert (n.in_multiplier, n.out_multiplier) == pytest.approx((n_in, n_out), rel=1e-5)
    assert (a.in_multiplier, a.out_multiplier, f.out_multiplier) == pytest.approx((1.0, a_out, f_out), rel=1e-5)
    model = arch.model
    assert (model.logits_multiplier, model.embedding_multiplier) == pytest.approx((logits, 5.656854249492381), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "residual", "logits_scaling"),
    [("granite_h_350m", 0.246, 3), ("granite_h_micro", 0.22, 8), ("granite_h_small", 0.22, 16)],
)
def test_granite_has_its_published_multipliers(name, residual, logits_scaling):
    arch = preset(name)
    assert {node.config.out_multiplier for node in arch.nodes} == {residual}
    assert (arch.model.embedding_multiplier, 1 / arch.model.logits_multiplier) == (12.0, logits_scaling)
