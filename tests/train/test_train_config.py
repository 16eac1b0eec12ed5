"""Settings of a run: values, the learning rate, which weights decay."""

import json
import math
import subprocess
import sys

import pytest
import torch

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.arch.presets import recipe
from hybridnas.config import MAX_SEED
from hybridnas.errors import ConfigError
from hybridnas.registry import BLOCKS
from hybridnas.train.config import TrainConfig
from hybridnas.train.fit import fit
from hybridnas.train.optim import learning_rate, make_optimizer, named_parameters, no_decay_names


def test_importing_the_package_and_its_settings_loads_no_torch():
    code = "import sys; from hybridnas.train import TrainConfig; TrainConfig(); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_settings_survive_json():
    config = TrainConfig(tokens=50_000, eval_at=(10_000, 50_000), lr=1e-3, data_seed=7)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens": 100}, r"tokens=100 is less than one step of 4096 tokens \(batch_size=16 \* seq_len=256"),
        ({"eval_at": (5000, 2_000_000)}, r"eval_at has 2000000, it must hold whole numbers from 1 to tokens=1000000"),
        ({"eval_at": (5000, 5000)}, r"eval_at=\[5000, 5000\] must rise"),
        ({"eval_at": (0,)}, "eval_at has 0"),
        ({"lr": 0.0}, r"train lr=0.0 must be > 0"),
        ({"schedule": "linear"}, "train schedule='linear' must be one of cosine, constant"),
        ({"precision": "fp8"}, "must be one of auto, float32, bfloat16"),
        ({"learning_rate": 1e-3}, "train has no field 'learning_rate'"),
        ({"batchsize": 4}, "did you mean 'batch_size'"),
        ({"batch_size": True}, "batch_size=True must be an integer"),
        ({"divergence_factor": 1.0}, "divergence_factor=1.0 must be > 1"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_settings_that_cannot_be_say_what_is_allowed(fields, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig.from_dict(fields)


def test_a_run_is_measured_at_the_steps_that_reach_the_asked_counts_and_at_its_end():
    config = TrainConfig(tokens=1000, batch_size=2, seq_len=32, eval_at=(100, 128, 500))
    assert config.steps == 16  # 1024 tokens: the first whole number of steps that holds 1000
    assert config.eval_steps() == (2, 8, 16)  # 100 and 128 fall into one step


def test_without_points_a_run_is_measured_six_times():
    config = TrainConfig(tokens=6 * 64 * 10, batch_size=2, seq_len=32)
    assert config.eval_steps() == (10, 20, 30, 40, 50, 60)
    assert TrainConfig(tokens=64, batch_size=2, seq_len=32).eval_steps() == (1,)


def test_the_papers_recipe_becomes_settings():
    config = TrainConfig.from_recipe(recipe("moe_mamba"), seed=3)
    assert config.tokens == 100_000 * 256 * 256
    assert (config.lr, config.weight_decay, config.grad_clip, config.decay_all) == (1e-3, 0.1, 0.5, True)
    assert (config.warmup_fraction, config.final_lr_fraction, config.beta2, config.seed) == (0.01, 0.1, 0.999, 3)


def test_the_rate_rises_linearly_then_falls_as_a_cosine_to_a_tenth():
    config = TrainConfig(tokens=100_000, lr=1.0, warmup_fraction=0.1)
    assert learning_rate(config, 5_000) == pytest.approx(0.5)
    assert learning_rate(config, 10_000) == pytest.approx(1.0)
    assert learning_rate(config, 55_000) == pytest.approx(0.55)  # half way down, between 1.0 and 0.1
    assert learning_rate(config, 32_500) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(config, 100_000) == pytest.approx(0.1)
    assert learning_rate(config, 200_000) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_warm_up_over_all_tokens_ends_at_the_highest_rate(schedule):
    config = TrainConfig(tokens=1000, batch_size=3, seq_len=100, lr=1.0, warmup_fraction=1.0, schedule=schedule)
    rates = [learning_rate(config, (step + 1) * config.step_tokens) for step in range(config.steps)]
    assert rates == pytest.approx([0.3, 0.6, 0.9, 1.0])


@pytest.mark.parametrize("name", ["seed", "data_seed"])
@pytest.mark.parametrize("seed", [2**63, 2**64, 2**128, 99999999999999999999])
def test_a_seed_beyond_64_bits_is_refused_before_anything_starts(name, seed):
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict({name: seed})
    assert caught.value.field.endswith(name)
    assert caught.value.got == seed
    assert str(MAX_SEED) in str(caught.value.allowed)


def test_the_greatest_seed_trains_on_text_and_on_a_task(corpus):
    model = torch.nn.Sequential(torch.nn.Embedding(257, 4), torch.nn.Linear(4, 257))
    text = {"kind": "text", "path": str(corpus), "split_seed": MAX_SEED}
    for data in (text, {"kind": "parity", "task_seed": MAX_SEED}):
        given = {"seed": MAX_SEED, "data_seed": MAX_SEED, "valid_tokens": 64, "batch_size": 2, "device": "cpu"}
        assert fit(model, data, tokens=1024, **given).status == "completed"


def test_a_constant_rate_stays_after_warm_up():
    config = TrainConfig(tokens=100_000, lr=0.3, warmup_fraction=0.0, schedule="constant")
    assert {learning_rate(config, tokens) for tokens in (1, 50_000, 100_000)} == {0.3}


def test_weight_decay_spares_vectors_embeddings_and_what_blocks_name():
    arch = Arch.from_pattern("MEAF", d_model=16, vocab_size=32, n_experts=2, d_expert=8, n_heads=2, final_norm=True)
    model = HybridLM(arch)
    spared = no_decay_names(model)
    assert "embedding.weight" in spared
    assert "final_norm.weight" in spared
    for name, parameter in named_parameters(model).items():
        if name.endswith((".A_log", ".D")) or parameter.ndim < 2:
            assert name in spared, name
    decayed = set(named_parameters(model)) - spared
    assert "head.weight" in decayed
    assert sum(".A_log" in name for name in spared) == 1
    assert any("router" in name for name in decayed)
    groups = make_optimizer(model, TrainConfig(weight_decay=0.2)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(named_parameters(model))


@pytest.mark.parametrize(
    ("pattern", "fields", "end"),
    [
        ("E", {"n_experts": 2, "E": {"bias": True}}, "up_proj_bias"),
        ("E", {"n_experts": 2, "E": {"bias": True, "gated": True}}, "gate_up_proj_bias"),
        ("E", {"n_experts": 2, "E": {"bias": True}}, "down_proj_bias"),
        ("F", {"F": {"bias": True}}, "up_proj.bias"),
    ],
)
def test_a_bias_does_not_decay_whether_or_not_it_is_stacked_into_a_matrix(pattern, fields, end):
    model = HybridLM(Arch.from_pattern(pattern, d_model=16, vocab_size=32, **fields))
    (bias,) = [p for name, p in model.named_parameters() if name.endswith(end)]
    with torch.no_grad():
        bias.fill_(1.0)
    optimizer = make_optimizer(model, TrainConfig(lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(bias, torch.ones_like(bias))


def test_no_parameter_named_bias_decays_in_any_block():
    for letter in BLOCKS:
        config = BLOCKS.get(letter).Config
        biased = {name: True for name in config.field_names() if "bias" in name and config.type_of(name) is bool}
        sizes = {name: size for name, size in {"n_experts": 2, "d_conv": 4}.items() if name in config.field_names()}
        model = HybridLM(Arch.from_pattern(letter, d_model=32, vocab_size=16, **{letter: {**biased, **sizes}}))
        spared = no_decay_names(model)
        assert {name for name in named_parameters(model) if "bias" in name.rpartition(".")[2]} <= spared, letter


def test_any_module_may_declare_what_is_not_decayed():
    class Stacked(torch.nn.Module):
        no_decay = ("offsets", "inner.scale", "absent")

        def __init__(self):
            super().__init__()
            self.offsets = torch.nn.Parameter(torch.zeros(2, 3))
            self.matrix = torch.nn.Parameter(torch.zeros(2, 3))
            self.inner = torch.nn.ParameterDict({"scale": torch.nn.Parameter(torch.zeros(2, 2))})

    assert no_decay_names(Stacked()) == {"offsets", "inner.scale"}


def test_the_papers_way_decays_everything_in_one_group():
    model = HybridLM(Arch.from_pattern("MF", d_model=16, vocab_size=32))
    groups = make_optimizer(model, TrainConfig(decay_all=True)).param_groups
    assert len(groups) == 1
    assert len(groups[0]["params"]) == len(list(model.parameters()))


def test_a_tied_or_shared_weight_is_optimised_once():
    model = HybridLM(Arch.from_pattern("F@s M F@s", d_model=16, vocab_size=32, tie_embeddings=True))
    parameters = [p for group in make_optimizer(model, TrainConfig()).param_groups for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(model.parameters()))
    assert torch.is_tensor(parameters[0])
