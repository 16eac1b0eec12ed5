"""Schedule wsd: what is scored at a point is a finished model, and training goes on as if it had not been."""

import pytest
from counting import STEPS, Counting, CrashError, arch_of, crash_at, run, same_bits, settings

from hybridnas.errors import CheckpointError, ConfigError
from hybridnas.train import checkpoint
from hybridnas.train.callbacks import Action, OnEval
from hybridnas.train.config import TrainConfig
from hybridnas.train.optim import learning_rate
from hybridnas.train.records import read_evals, read_run

pytestmark = pytest.mark.usefixtures("one_thread")

STEP = 64
POINTS = (3 * STEP, 6 * STEP)
WSD = {"schedule": "wsd", "anneal_at": POINTS, "decay_fraction": 0.4, "eval_at": (STEP,), "warmup_fraction": 0.1}


def wsd(**fields):
    return settings(**{**WSD, **fields})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed") / "run", wsd())


def test_the_rate_is_constant_and_falls_in_a_decay():
    config = TrainConfig(
        tokens=100_000, batch_size=10, seq_len=100, lr=1.0, schedule="wsd", anneal_at=(50_000,), decay_fraction=0.2
    )
    first, last = config.decays()
    assert (first, last) == ((40, 50), (80, 100))
    assert learning_rate(config, 500) == pytest.approx(0.5)  # warm-up over a hundredth
    assert [learning_rate(config, tokens) for tokens in (1_000, 45_000, 100_000)] == [1.0, 1.0, 1.0]  # no decay yet
    assert learning_rate(config, 40_000, first) == pytest.approx(1.0)
    assert learning_rate(config, 45_000, first) == pytest.approx(0.55)  # half way down to a tenth
    assert learning_rate(config, 50_000, first) == pytest.approx(0.1)
    assert learning_rate(config, 90_000, last) == pytest.approx(0.55)


@pytest.mark.parametrize("tokens", POINTS)
def test_a_score_is_that_of_a_run_which_ends_there(undisturbed, tokens):
    warmup = WSD["warmup_fraction"] * STEPS * STEP / tokens
    alone = run(None, wsd(tokens=tokens, anneal_at=(), eval_at=(), warmup_fraction=warmup))
    assert {v.tokens: v.valid_loss for v in undisturbed.evals}[tokens] == alone.valid_loss


def test_training_goes_on_as_if_no_branch_had_been(undisturbed):
    same = run(None, wsd(anneal_at=()))
    assert same.valid_loss == undisturbed.valid_loss
    for a, b in zip(same.model.state_dict().values(), undisturbed.model.state_dict().values(), strict=True):
        assert a.equal(b)


def test_nothing_is_measured_within_a_decay_and_cost_counts_branches(undisturbed):
    config = wsd(eval_at=tuple(STEP * n for n in range(1, STEPS)))
    assert config.decays() == ((2, 3), (4, 6), (7, 12))
    assert config.eval_steps() == (1, 2, 3, 4, 6, 7, 12)
    assert [v.step for v in run(None, config).evals] == [1, 2, 3, 4, 6, 7, 12]
    assert [v.aux["annealed"] for v in undisturbed.evals] == [0, 1, 1, 1]
    assert [v.aux["trained_tokens"] / STEP for v in undisturbed.evals] == [1, 3, 7, 15]
    assert config.trained_steps() == 15
    assert settings().trained_steps() == STEPS


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["every-step", "at-measurements"])
@pytest.mark.parametrize("steps", [(0, 2), (2, 4), (5, 8), (3, 11)], ids=str)
def test_crashes_in_and_after_branches_cost_no_bit(tmp_path, undisturbed, steps, seconds):
    source = Counting(crash_at(*steps))
    config = wsd(checkpoint_seconds=seconds)
    for _ in steps:
        with pytest.raises(CrashError):
            run(tmp_path, config, source=source)
    same_bits(run(tmp_path, config, source=source), undisturbed)


def test_a_run_paused_at_every_score_goes_on_to_the_bit(tmp_path, undisturbed):
    for tokens in POINTS:
        pause = OnEval(lambda value, at=tokens: Action.PAUSE if value.tokens == at else None)
        part = run(tmp_path, wsd(), callbacks=[pause])
        assert (part.status, part.evals[-1].tokens) == ("paused", tokens)
    same_bits(run(tmp_path, wsd()), undisturbed)


def test_a_branch_from_the_first_step_forgets_its_moments():
    config = wsd(anneal_at=(STEP,), decay_fraction=0.9, warmup_fraction=0.0, eval_at=())
    assert config.decays()[0] == (0, 1)
    plain = run(None, config.replace(anneal_at=()))
    assert run(None, config).valid_loss == plain.valid_loss


def test_experts_that_learn_without_gradients_go_back_too(tmp_path):
    arch = arch_of("ME", router="top_k", scores="sigmoid", correction_bias=True, bias_update_rate=0.01, top_k=2)
    plain = run(None, wsd(anneal_at=()), arch=arch)
    assert run(tmp_path, wsd(), arch=arch).valid_loss == plain.valid_loss


def test_a_damaged_stable_state_is_named(tmp_path):
    pause = OnEval(lambda value: Action.PAUSE if value.tokens == POINTS[0] else None)
    run(tmp_path, wsd(), callbacks=[pause])
    (tmp_path / checkpoint.STABLE).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError) as caught:
        run(tmp_path, wsd())
    assert caught.value.got == str(tmp_path / checkpoint.STABLE)


def finished(folder, **fields):
    """A run that ended at half the tokens, with as many tokens of warm-up as one of all."""
    warmup = 2 * WSD["warmup_fraction"]
    config = wsd(tokens=6 * STEP, anneal_at=POINTS[:1], warmup_fraction=warmup, **fields)
    assert run(folder, config).status == "completed"
    return config.replace(tokens=STEPS * STEP)


def test_a_finished_run_goes_on_with_more_tokens_as_if_it_had_been_one(tmp_path, undisturbed):
    more = finished(tmp_path)
    before = read_evals(tmp_path)
    source = Counting(crash_at(6, 9))  # before and after the first checkpoint of the longer run
    for _ in range(2):
        with pytest.raises(CrashError):
            run(tmp_path, more, source=source)
    longer = run(tmp_path, more, source=source)
    assert longer.evals[: len(before)] == before
    same_scores = [(v.tokens, v.valid_loss, v.aux["trained_tokens"]) for v in undisturbed.evals]
    assert [(v.tokens, v.valid_loss, v.aux["trained_tokens"]) for v in longer.evals] == same_scores
    for (name, a), b in zip(longer.model.state_dict().items(), undisturbed.model.state_dict().values(), strict=True):
        assert a.equal(b), name
    for config in (more, wsd()):  # read back, as asked for and as it is
        assert run(tmp_path, config, source=Counting(crash_at(*range(STEPS)))).valid_loss == longer.valid_loss
    with pytest.raises(CheckpointError):
        run(tmp_path, more.replace(lr=0.5))


def test_a_run_is_given_more_tokens_twice(tmp_path, undisturbed):
    more = finished(tmp_path)
    run(tmp_path, more.replace(tokens=9 * STEP))
    twice = run(tmp_path, more)
    assert twice.valid_loss == undisturbed.valid_loss
    assert twice.evals[-1].aux["trained_tokens"] == undisturbed.evals[-1].aux["trained_tokens"] + 4 * STEP


def test_without_its_stable_state_a_finished_run_stays_as_it_is(tmp_path):
    more = finished(tmp_path)
    (tmp_path / checkpoint.STABLE).unlink()
    about = read_run(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        run(tmp_path, more)
    assert caught.value.got == str(tmp_path / checkpoint.STABLE)
    assert read_run(tmp_path) == about


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_more_tokens_after_another_schedule_are_a_restart(tmp_path, schedule):
    config = settings(tokens=2 * STEP, schedule=schedule)
    run(tmp_path, config)
    with pytest.raises(CheckpointError) as caught:
        run(tmp_path, config.replace(tokens=4 * STEP))
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("train.tokens", 4 * STEP, 2 * STEP)
    assert f"model={tmp_path}" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "got"),
    [({"schedule": "cosine"}, "cosine"), ({"warmup_fraction": 0.5}, POINTS[0])],
    ids=["cosine", "in-warm-up"],
)
def test_points_without_a_constant_rate_are_refused(fields, got):
    with pytest.raises(ConfigError) as caught:
        wsd(**fields)
    assert (caught.value.field, caught.value.got) == ("train.anneal_at", got)
