"""Experiments: lists of trainings that resume, stop in time, and survive a bad cell."""

import time

import pytest
import torch
from counting import Counting, CrashError, arch_of, crash_at, ctrl_c_at, numbers, settings
from torch import nn

from hybridnas.errors import CheckpointError, ConfigError, TrainingError
from hybridnas.train import Cell, Experiment, run_cell
from hybridnas.train.callbacks import Action, OnEval
from hybridnas.train.experiment import ERROR

pytestmark = pytest.mark.usefixtures("one_thread")


def cell(folder, key="a", **fields):
    given = {"model": arch_of("MF"), "source": Counting(), "config": settings(), "device": "cpu"}
    return Cell(key=key, folder=None if folder is None else folder / key, **{**given, **fields})


def refuse(step):
    raise AssertionError("trained again")


def test_cells_run_in_order_and_finished_ones_are_read_back(tmp_path):
    keys = ("a", "b", "c")
    experiment = Experiment([cell(tmp_path, key, config=settings(seed=n)) for n, key in enumerate(keys)])
    results = experiment.run()
    assert experiment.complete
    assert [(one.cell.key, one.result.status) for one in results] == [(key, "completed") for key in keys]
    assert len({one.result.valid_loss for one in results}) == 3
    again = Experiment(
        [cell(tmp_path, key, config=settings(seed=n), source=Counting(refuse)) for n, key in enumerate(keys)]
    )
    assert [numbers(one.result) for one in again.run()] == [numbers(one.result) for one in results]


def test_an_iterator_may_choose_the_next_cell_by_the_results_before(tmp_path):
    def halving():
        for seed in range(3):
            yield cell(tmp_path, f"seed{seed}", config=settings(seed=seed))
        best = min(experiment.results, key=lambda one: one.result.valid_loss)
        yield cell(tmp_path, "longer", config=settings(seed=best.cell.config.seed, tokens=1024))

    experiment = Experiment(halving())
    results = experiment.run()
    assert [one.cell.key for one in results] == ["seed0", "seed1", "seed2", "longer"]
    best = min(results[:3], key=lambda one: one.result.valid_loss)
    assert results[-1].cell.config.seed == best.cell.config.seed


def test_a_cells_own_callbacks_come_before_the_experiments():
    seen = []
    own = OnEval(lambda value: seen.append("cell"))
    shared = OnEval(lambda value: seen.append("experiment"))
    Experiment([cell(None, callbacks=(own,))], callbacks=[shared]).run()
    assert seen[:4] == ["cell", "experiment"] * 2


def test_a_paused_cell_is_a_result_and_the_next_call_goes_on(tmp_path):
    pause = OnEval(lambda value: Action.PAUSE if value.step == 4 else None)
    (first,) = Experiment([cell(tmp_path)], callbacks=[pause]).run()
    assert (first.result.status, first.result.final) == ("paused", False)
    (second,) = Experiment([cell(tmp_path)]).run()
    assert second.result.status == "completed"
    assert numbers(second.result) == numbers(run_cell(cell(None)))


def test_minutes_end_inside_a_cell_which_then_goes_on_to_the_bit(tmp_path):
    slow = Counting(lambda step: time.sleep(0.05))
    experiment = Experiment([cell(tmp_path, "a", source=slow), cell(tmp_path, "b")], minutes=0.2 / 60)
    assert experiment.run() == []
    assert not experiment.complete
    assert experiment.seconds_left == 0.0
    assert (tmp_path / "a" / "checkpoint.safetensors").exists()
    assert not (tmp_path / "b").exists()
    results = Experiment([cell(tmp_path, "a"), cell(tmp_path, "b")]).run()
    assert numbers(results[0].result) == numbers(results[1].result)


def test_whole_cells_are_not_begun_when_they_would_end_late(tmp_path):
    slow = Counting(lambda step: time.sleep(0.02))
    cells = [cell(tmp_path, key, source=slow) for key in ("a", "b", "c")]
    experiment = Experiment(cells, minutes=0.35 / 60, whole_cells=True)
    done = [one.cell.key for one in experiment.run()]
    assert not experiment.complete
    assert 1 <= len(done) < 3
    assert sorted(path.name for path in tmp_path.iterdir()) == done  # the next one has not left a folder


def test_ctrl_c_saves_the_cell_and_keeps_the_results_before(tmp_path):
    kept = []
    cells = [cell(tmp_path, "a"), cell(tmp_path, "b", source=Counting(ctrl_c_at(5)))]
    experiment = Experiment(cells, on_result=lambda one: kept.append(one.cell.key))
    with pytest.raises(KeyboardInterrupt):
        experiment.run()
    assert [one.cell.key for one in experiment.results] == kept == ["a"]
    again = Experiment([cell(tmp_path, "a", source=Counting(refuse)), cell(tmp_path, "b")]).run()
    assert numbers(again[0].result) == numbers(again[1].result)


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, ids):
        raise ValueError("no such\nthing")


def test_a_cell_whose_model_fails_is_recorded_and_the_rest_go_on(tmp_path):
    bad, good = Experiment([cell(tmp_path, "bad", model=Broken), cell(tmp_path, "good")]).run()
    assert (bad.result.status, bad.result.final) == ("failed", False)
    assert bad.result.reason.startswith("ValueError: no such thing (see ")
    assert "Traceback" in (tmp_path / "bad" / ERROR).read_text()
    assert good.result.status == "completed"


def test_what_every_cell_would_meet_ends_the_experiment(tmp_path):
    run_cell(cell(tmp_path))
    with pytest.raises(CheckpointError):
        Experiment([cell(tmp_path, config=settings(lr=0.5)), cell(tmp_path, "b")]).run()
    assert not (tmp_path / "b").exists()
    own = TrainingError("the disk is full")

    def full(step):
        raise own

    with pytest.raises(TrainingError) as caught:
        run_cell(cell(tmp_path, "c", source=Counting(full)))
    assert caught.value is own


def test_an_error_of_the_source_is_the_cells_own(tmp_path):
    result = run_cell(cell(tmp_path, source=Counting(crash_at(3))))
    assert result.status == "failed"
    assert CrashError.__name__ in result.reason
    assert run_cell(cell(tmp_path)).status == "completed"


def test_two_cells_of_one_key_are_refused():
    with pytest.raises(ConfigError) as caught:
        Experiment([cell(None), cell(None)]).run()
    assert caught.value.field == "key"


def test_a_function_builds_the_model_from_the_cells_seed():
    def build():
        return nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))

    before = torch.get_rng_state()
    one, same, other = (
        run_cell(cell(None, model=build, config=settings(seed=seed, data_seed=0))) for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert numbers(one) == numbers(same) != numbers(other)
