"""Learning rates and drawn weights by width (muP), Muon, the embedding's rate and the z-loss."""

import pytest
import torch
import torch.nn.functional as F
from counting import VOCAB, Counting, CrashError, arch_of, crash_at, run, same_bits, settings
from torch import nn

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.bench.suites.coordinates import Sizes, measured, slope
from hybridnas.errors import ConfigError
from hybridnas.registry import BLOCKS
from hybridnas.train.config import ADDED, TrainConfig
from hybridnas.train.objective import Objective
from hybridnas.train.optim import Optimizers, make_optimizer, named_parameters, no_decay_names
from hybridnas.train.scaling import scale_weights, width_rules

pytestmark = pytest.mark.usefixtures("one_thread")
MUP = {"rate_scaling": "mup", "base_width": 8}  # the models of these tests are 16 wide
WIDTHS = (32, 128)


CONSTANT = (  # parameters of several dimensions whose fan-in does not grow: tables, and those of each channel
    *("embedding.weight", ".A_log", ".log_A_real", ".A_imag", ".C", ".poles", ".residues", "_gate_bias"),
)


def letters():
    return [letter for letter in BLOCKS if not BLOCKS.get(letter).same_as]


def model_of(pattern, d_model=16, **fields):
    given = {"n_experts": 4} if "E" in pattern else {}
    return HybridLM(Arch.from_pattern(pattern, d_model=d_model, vocab_size=VOCAB, final_norm=True, **given, **fields))


def factors(model, **fields):
    """Name -> the learning rate of a parameter, in units of lr."""
    optimizer = make_optimizer(model, TrainConfig(lr=2.0, **fields))
    rates = {id(p): group["lr"] / 2 for group in optimizer.param_groups for p in group["params"]}
    return {name: rates[id(p)] for name, p in named_parameters(model).items()}


def test_options_at_their_defaults_leave_the_identity_of_a_run_as_it_was():
    assert not set(ADDED) & set(TrainConfig().identity())
    assert TrainConfig(optimizer="muon").identity()["optimizer"] == "muon"


@pytest.mark.parametrize("letter", letters())
def test_at_the_base_width_training_is_the_same_to_the_bit(letter):
    config = {"tokens": 3 * 64, "valid_tokens": 32}
    plain = run(None, settings(**config), arch_of(letter * 2))
    scaled = run(None, settings(**config, rate_scaling="mup", base_width=16), arch_of(letter * 2))
    same_bits(plain, scaled)


@pytest.mark.parametrize("letter", letters())
def test_what_steps_change_is_of_one_size_at_all_widths(letter):
    """The coordinate check of 2203.03466, appendix D.1."""
    powers = {}
    for scaling in ("none", "mup"):
        sizes = [measured(letter, width, scaling) for width in WIDTHS]
        powers[scaling] = Sizes(*(slope(WIDTHS, one) for one in zip(*sizes, strict=True)))
    none, mup = powers["none"], powers["mup"]
    assert abs(mup.blocks_change) < 0.3 and abs(mup.blocks_before) < 0.3
    assert abs(mup.logits_change) < 0.45
    assert none.logits_change > 0.3 > mup.logits_before + 0.7  # drawn at 1 / sqrt(width) beside the usual
    assert none.blocks_change > mup.blocks_change + 0.1
    if BLOCKS.get(letter).role != "mixer":
        assert none.blocks_change > 0.6  # plain matrices, no gates that saturate


@pytest.mark.parametrize("letter", letters())
def test_matrices_have_the_rate_of_their_fan_in_and_all_else_that_of_the_base(letter):
    found = factors(model_of(letter), **MUP)
    for name, p in named_parameters(model_of(letter)).items():
        if p.ndim < 2 or "conv" in name or name.endswith(CONSTANT):
            assert found[name] == 1, name
        elif not name.endswith("dt_proj.weight"):  # whose fan-in is a rank of 1 at both widths
            assert found[name] == 0.5, name


def test_a_rank_that_does_not_grow_keeps_its_rate():
    grown = factors(model_of("M", 64), rate_scaling="mup", base_width=16)
    given = factors(model_of("M", 64, M={"dt_rank": 3}), rate_scaling="mup", base_width=16)
    name = "layers.0.branches.0.0.dt_proj.weight"
    assert (grown[name], given[name]) == (0.25, 1.0)
    gla = factors(model_of("L", 64, L={"kind": "gla"}), rate_scaling="mup", base_width=16)
    assert gla["layers.0.branches.0.0.decay_proj.weight"] == 1.0
    kimi = factors(model_of("K", 64, K={"gate_rank": 3}), rate_scaling="mup", base_width=16)
    assert kimi["layers.0.branches.0.0.gate_proj.weight"] == 1.0
    assert kimi["layers.0.branches.0.0.decay_proj.weight"] == 0.25


def test_the_decay_of_a_step_is_the_same_for_all_matrices():
    groups = make_optimizer(model_of("MF"), TrainConfig(weight_decay=0.1, **MUP)).param_groups
    assert {round(group["lr"] * group["weight_decay"] / TrainConfig().lr, 12) for group in groups} == {0.1, 0.0}


def test_a_wider_head_is_drawn_smaller_and_a_tied_one_as_before():
    for tied, factor in ((False, 2**-0.5), (True, 1.0)):
        drawn, plain = model_of("F", tie_embeddings=tied), model_of("F", tie_embeddings=tied)
        scale_weights(drawn, TrainConfig(**MUP))
        assert torch.equal(drawn.head.weight, plain.head.weight * factor)
        assert factors(drawn, **MUP)["embedding.weight"] == (0.5 if tied else 1)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "qkv_proj.weight"),
        ({"kv_rank": 6}, "latent.down_proj.weight"),
        ({"kv_rank": 6, "q_rank": 4}, "latent.q_up_proj.weight"),
    ],
)
def test_queries_of_heads_that_grow_are_drawn_and_moved_less(fields, name):
    config = TrainConfig(lr=0.1, weight_decay=0.0, **MUP)
    model, plain = model_of("A", A=fields), model_of("A", A=fields)
    scale_weights(model, config)
    where = f"layers.0.branches.0.0.{name}"
    weight, drawn = model.get_parameter(where), plain.get_parameter(where)
    rows = 16 if not fields else model.layers[0].branches[0][0].latent.shape.query
    assert torch.equal(weight[:rows], drawn[:rows] * 2**-0.5) and torch.equal(weight[rows:], drawn[rows:])
    optimizer, before = make_optimizer(model, config), weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = before - weight.detach()  # Adam's first step is the rate
    assert torch.allclose(moved[:rows], torch.tensor(0.05 * 2**-0.5), rtol=1e-4)
    assert torch.allclose(moved[rows:], torch.tensor(0.05), rtol=1e-4)


def test_heads_of_one_width_and_normed_queries_are_left_alone():
    for fields in ({"head_dim": 4}, {"qk_norm": "head"}):
        rules = width_rules(model_of("A", A=fields), TrainConfig(**MUP))
        assert all(rule.row_factor == 1 for rule in rules.values())


def test_weights_that_were_given_are_not_scaled():
    model = model_of("F")
    head = model.head.weight.detach().clone()
    run(None, settings(**MUP, tokens=64, lr=1e-30), model)
    assert torch.equal(model.head.weight, head)


def test_the_embedding_has_a_rate_of_its_own():
    found = factors(model_of("MF"), embedding_lr=3.0)
    assert {name for name, factor in found.items() if factor != 1} == {"embedding.weight"}
    assert found["embedding.weight"] == 3


def test_muon_moves_the_matrices_of_blocks_and_adamw_the_rest_as_torch_does():
    ours, theirs = model_of("MAE"), model_of("MAE")
    config = TrainConfig(lr=0.01, optimizer="muon", weight_decay=0.1)
    optimizer, spared = make_optimizer(ours, config), no_decay_names(ours)
    named = named_parameters(theirs)
    inside = {n for n, p in named.items() if p.ndim == 2 and n.startswith("layers.") and not n.endswith("A_log")}
    assert len(inside) == 7  # in, x, dt, out; qkv, out; router
    rest = [n for n in named if n not in inside]
    groups = [
        {"params": [named[n] for n in rest if (n in spared) == spare], "weight_decay": 0.0 if spare else 0.1}
        for spare in (True, False)
    ]
    parts = [
        torch.optim.Muon([named[n] for n in inside], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.999), fused=True),
    ]
    for _ in range(2):
        for name, p in named.items():
            p.grad = torch.randn_like(p)
            ours.get_parameter(name).grad = p.grad.clone()
        for one in (optimizer, *parts):
            one.step()
    for name, p in named.items():
        assert torch.equal(ours.get_parameter(name), p), name


@pytest.mark.parametrize("fields", [{"optimizer": "muon"}, MUP, {"optimizer": "muon", **MUP}])
def test_a_crashed_run_ends_in_the_same_bits(fields, tmp_path):
    config, arch = settings(**fields, checkpoint_seconds=0, z_loss=1e-3), arch_of("MEA")
    whole = run(tmp_path / "whole", config, arch)
    with pytest.raises(CrashError):
        run(tmp_path / "cut", config, arch, Counting(crash_at(7)))
    same_bits(whole, run(tmp_path / "cut", config, arch))


@pytest.mark.parametrize("fields", [{"optimizer": "muon"}, {"rate_scaling": "mup"}])
def test_a_module_without_blocks_is_refused(fields):
    with pytest.raises(ConfigError) as caught:
        make_optimizer(nn.Linear(3, 3), TrainConfig(**fields))
    (name,) = fields
    assert (caught.value.field, caught.value.got) == (f"train.{name}", fields[name])


def test_optimizers_know_whose_a_parameter_is():
    one, two = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    parts = [torch.optim.Muon([one]), torch.optim.AdamW([two])]
    assert [Optimizers(parts).of(p) for p in (one, two)] == parts


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_z_loss_is_part_of_what_is_trained_and_not_of_what_is_measured(softcap):
    model, batch = model_of("F", final_softcap=softcap), Counting().train_batch(0, 4, 16, 0)
    logits = model(batch.inputs_BL).logits
    plain = F.cross_entropy(logits.flatten(0, 1), batch.targets_BL.flatten(), reduction="sum")
    squares = logits.logsumexp(-1).square().sum()
    objective = Objective(model, z_loss=0.1)
    assert torch.allclose(objective(batch).total, plain + 0.1 * squares)
    assert torch.allclose(objective.scores(batch).loss.sum(), plain)
