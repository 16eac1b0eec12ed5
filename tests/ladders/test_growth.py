"""Architectures grown to a size: active parameters met, width and depth as asked, laws of rate and batch."""

from __future__ import annotations

import dataclasses
import math

import pytest

from hybridnas.arch.arch import Arch
from hybridnas.data import open_source
from hybridnas.data.source import source_config
from hybridnas.errors import ConfigError, MatchError, StudyError
from hybridnas.ladders.config import LadderConfig
from hybridnas.ladders.entrants import Entrant, base_of, entrants, grown
from hybridnas.ladders.ladder import Ladder
from hybridnas.ladders.plan import make_plan
from hybridnas.ladders.rates import at_an_end, best_rates, tuning_runs
from hybridnas.ladders.rows import ended
from hybridnas.search.config import Budget
from hybridnas.train.records import Eval, append_eval, write_run

BUDGET = {"name": "tiny", "d_model": 32, "depth": 4, "n_experts": 4, "multiple": 2, "seq_len": 64, "batch_size": 4}


def one(pattern, **fields):
    return Entrant(pattern, Arch.from_pattern(pattern, d_model=32, vocab_size=256, **fields))


@pytest.mark.parametrize(
    "entrant",
    [
        one("MEME", n_experts=4, d_expert=32),
        one("GFAF", d_ff=48),
        one("F{d_ff=64}AF{d_ff=16}A"),
        one("[M,E]A", n_experts=4, d_expert=16),
        Entrant("mamba", Arch.from_pattern("Mx4", d_model=32, vocab_size=256), "mamba"),
    ],
    ids=lambda entrant: entrant.name,
)
@pytest.mark.parametrize("factor", [0.5, 2.0, 8.0])
def test_a_grown_architecture_meets_its_target_and_keeps_its_pattern(entrant, factor):
    config, budget = LadderConfig(patterns=["M"]), Budget.from_dict(BUDGET)
    target = round(entrant.active_params * factor)
    arch = grown(entrant, factor, config, budget, target)
    assert arch.cost().active_params == pytest.approx(target, rel=0.02)
    assert arch.d_model == pytest.approx(32 * factor**0.5, rel=0.2)
    assert [slot.letter for slot in arch.pattern.slots] == [slot.letter for slot in entrant.arch.pattern.slots]


def test_widths_of_single_slots_keep_their_proportion():
    entrant = one("F{d_ff=64}AF{d_ff=16}A")
    arch = grown(entrant, 4.0, LadderConfig(patterns=["M"]), Budget.from_dict(BUDGET), 4 * entrant.active_params)
    wide, narrow = (int(dict(slot.args)["d_ff"]) for slot in arch.pattern.slots if slot.letter == "F")
    assert wide / narrow == pytest.approx(4, rel=0.1)


def test_depth_grows_by_whole_motifs_where_it_is_asked_for():
    entrant = one("MEME", n_experts=4)
    for power, depth in ((0.0, 4), (0.5, 8), (1.0, 16)):
        config = LadderConfig(patterns=["M"], depth_power=power)
        arch = grown(entrant, 4.0, config, Budget.from_dict(BUDGET), 4 * entrant.active_params)
        assert arch.pattern.letters == "ME" * (depth // 2)
        assert arch.d_model == pytest.approx(32 * 2 ** (1 - power), rel=0.2)


def test_size_one_is_the_architecture_itself():
    entrant = one("MEME", n_experts=4, d_expert=32)
    config, budget = LadderConfig(patterns=["M"]), Budget.from_dict(BUDGET)
    assert grown(entrant, 1.0, config, budget, entrant.active_params) is entrant.arch


def test_a_size_that_no_width_meets_is_refused():
    entrant, target = one("MFMF"), 12  # fewer active parameters than any width leaves
    with pytest.raises(MatchError) as caught:
        grown(entrant, 0.001, LadderConfig(patterns=["M"]), Budget.from_dict(BUDGET), target)
    assert (caught.value.field, caught.value.got) == ("ladder.sizes", 0.001)


@pytest.fixture(scope="module")
def plan(corpus):
    config = LadderConfig(
        presets=["mamba"], patterns=["MFMF", "MFMF"], sizes=[1, 8], seeds=2, tokens=[2, 4, 8], rates=[1, 2],
        budget=BUDGET | {"lr": 0.016}, data={"kind": "text", "path": str(corpus)},
    )  # fmt: skip
    base = base_of(config)
    return make_plan(config, base, open_source(source_config(base.data)))


def test_rate_and_batch_follow_their_laws(plan):
    small, large = plan.train_config("MFMF", 1, 0, 1.0), plan.train_config("MFMF", 8, 0, 1.0)
    assert (small.lr, small.batch_size) == (0.016, 4)
    assert large.lr == pytest.approx(0.008)
    assert large.batch_size == 16
    assert large.tokens == pytest.approx(8 * small.tokens, rel=0.02)
    assert small.warmup_tokens == pytest.approx(plan.target)
    assert (large.schedule, large.final_lr_fraction) == ("wsd", 0.0)
    assert len(large.anneal_at) == 3


def test_every_run_is_listed_once_and_architectures_of_one_size_get_the_same_tokens(plan):
    assert list(plan.archs) == ["mamba", "MFMF"]  # the same pattern twice is one
    runs = list(plan.runs(dict.fromkeys(plan.archs, 1.0)))
    assert len(runs) == len({run.key for run in runs}) == 2 * 2 * 2
    for factor in plan.config.sizes:
        assert len({(r.config.tokens, r.config.batch_size) for r in runs if r.factor == factor}) == 1
    tuning = tuning_runs(plan)
    assert {run.rate for run in tuning} == {1.0, 2.0}
    assert {run.config.seed for run in tuning}.isdisjoint(run.config.seed for run in runs)


def ends(run, loss):
    """Write what a run leaves that has ended with a loss; None: one that failed."""
    run.folder.mkdir(parents=True)
    status = "failed" if loss is None else "completed"
    write_run(run.folder, {"format": 1, "status": status, "final": True, "reason": ""})
    if loss is not None:
        append_eval(run.folder, Eval(run.config.tokens, 1, loss, loss, None, 0.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("optimum", "failing", "tried", "best", "at_end"),
    [
        (1.4, 99, [1, 2, 0.5], 1, False),  # of two multiples the best is always an end
        (4, 99, [1, 2, 4, 8], 4, False),
        (64, 99, [1, 2, 4, 8], 8, True),  # two beyond, no more
        (0.01, 99, [1, 2, 0.5, 0.25], 0.25, True),
        (64, 4, [1, 2, 4], 2, False),  # a rate that fails is the worst
    ],
)
def test_while_the_best_rate_is_an_end_the_next_one_is_tried(plan, tmp_path, optimum, failing, tried, best, at_end):
    plan = dataclasses.replace(plan, folder=tmp_path)
    while missing := [run for run in tuning_runs(plan) if not ended(run)]:
        for run in missing:
            ends(run, None if run.rate >= failing else 2 + abs(math.log(run.rate / optimum)))
    runs = tuning_runs(plan)
    assert [run.rate for run in runs if run.entrant == "mamba"] == tried
    rates = best_rates(plan, runs)
    assert rates == {"mamba": best, "MFMF": best}
    assert at_an_end(runs, rates) == (["mamba", "MFMF"] if at_end else [])


def test_an_architecture_whose_study_found_a_rate_for_it_starts_there(plan):
    lr = {"mamba": 0.05, "MFMF": 0.002}
    plan = dataclasses.replace(plan, anchors=lr)
    for name in lr:
        assert plan.train_config(name, 1, 0, 1.0).lr == lr[name]
        assert plan.train_config(name, 8, 0, 3.0).lr == pytest.approx(1.5 * lr[name])


def test_a_ladder_without_architectures_is_refused():
    with pytest.raises(ConfigError) as caught:
        base_of(LadderConfig())
    assert caught.value.field == "ladder.study"


def test_a_study_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(StudyError):
        Ladder(LadderConfig(study="none", runs=tmp_path))


def test_a_preset_that_does_not_exist_is_refused():
    config = LadderConfig(presets=["mambo"], budget=BUDGET)
    with pytest.raises(Exception, match="mamba"):
        entrants(config, base_of(config), 256)
