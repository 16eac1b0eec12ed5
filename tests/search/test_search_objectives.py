"""Several objectives: fronts, ranks and directions; limits that are checked without training; measured figures."""

import csv
import itertools
import json
import random

import optuna
import pytest

from hybridnas.analysis import pareto
from hybridnas.analysis.ranking import front
from hybridnas.arch import decode
from hybridnas.arch.arch import Arch
from hybridnas.arch.decode import Decoder
from hybridnas.arch.model import HybridLM
from hybridnas.cli.compose import compose
from hybridnas.cli.search import search_config
from hybridnas.errors import ConfigError, StudyError
from hybridnas.files import locked
from hybridnas.report.callbacks import ConsoleLines
from hybridnas.search import latency as measure
from hybridnas.studies import Study
from hybridnas.study.records import TrialRecord


def run(folder, settings, news=None):
    config = compose("search", ["budget=smoke", f"runs={folder}", "study=demo", *settings])
    return Study.of(search_config(config)).run([ConsoleLines(news)] if news else [])


def dashboard(folder):
    """Open the journal that optuna-dashboard reads."""
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "journal.log"))
    return optuna.load_study(study_name="demo", storage=optuna.storages.JournalStorage(backend))


def record(number, state="COMPLETE", **values):
    return TrialRecord(number=number, state=state, objectives=values, valid_loss=values.get("val_loss"))


def test_fronts_agree_with_the_definition_on_random_points():
    chance = random.Random(3)
    for _ in range(50):
        width = chance.choice((1, 2, 3))
        points = {n: tuple(chance.randrange(5) for _ in range(width)) for n in range(12)}
        left = set(points)
        for found in pareto.fronts(points):
            slow = {
                a
                for a in left
                if not any(
                    all(x <= y for x, y in zip(points[b], points[a], strict=True)) and points[b] != points[a]
                    for b in left
                )
            }
            assert set(found) == slow
            left -= slow
        assert not left


def test_scores_order_by_front_then_by_crowding_distance():
    points = {1: (0.0, 3.0), 2: (1.0, 1.0), 3: (1.1, 0.9), 4: (3.0, 0.0), 5: (4.0, 4.0)}
    scores = pareto.scores(points)
    assert [int(scores[n]) for n in points] == [0, 0, 0, 0, 1]
    assert max(scores[1], scores[4]) < min(scores[2], scores[3])
    assert len(set(scores.values())) == 5
    assert pareto.crowding({}) == {}


def test_crowding_is_the_sum_of_the_gaps_around_a_point():
    gaps = pareto.crowding({"a": (0.0, 4.0), "b": (1.0, 2.0), "c": (4.0, 0.0)})
    assert gaps == {"a": float("inf"), "b": 2.0, "c": float("inf")}


@pytest.mark.parametrize(
    ("settings", "field", "got"),
    [
        (["objectives=[val_los]"], "objectives", "val_los"),
        (["objectives=[val_loss,val_loss]"], "objectives", "val_loss"),
        (["objectives=[params]"], "objectives", ("params",)),
        (["objectives=[]"], "objectives", ()),
        (["max_params=many"], "max_params", "many"),
        (["max_state_bytes=0"], "max_state_bytes", 0),
        (["max_latency_ms=-1"], "max_latency_ms", -1),
        (["state_length=0"], "state_length", 0),
        (["confirm_seeds=0"], "confirm_seeds", 0),
        (["confirm_seeds=1"], "confirm_seeds", 1),
        (["confirm_top=0"], "confirm_top", 0),
        (["verdict_seeds=3"], "verdict_seeds", 3),
        (["alpha=0"], "alpha", 0),
        (["alpha=0.6"], "alpha", 0.6),
        (["confirm=maybe"], "confirm", "maybe"),
        (["objectives=[val_loss,params]", "pruner=hyperband"], "pruner", "hyperband"),
        (["objectives=[val_loss,params]", "pruner=halving", "sampler=evolution"], "sampler", "evolution"),
    ],
)
def test_nonsense_is_refused_before_a_folder_is_made(tmp_path, tiny, settings, field, got):
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, [*tiny, *settings])
    assert str(caught.value.field).endswith(field)
    assert caught.value.got == got
    assert caught.value.allowed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "kept"), [("on", "on"), ("off", "off"), ("true", "on"), ("false", "off")])
def test_confirm_may_be_said_as_yaml_says_it(tiny, given, kept):
    config = compose("search", ["budget=smoke", *tiny, f"confirm={given}", "objectives=val_loss"])
    found = search_config(config)
    assert found.budget.confirm == kept
    assert found.objectives == ("val_loss",)


def test_the_identity_holds_what_makes_a_study_and_no_limit_of_a_call(tiny):
    plain = search_config(compose("search", ["budget=smoke", *tiny])).identity()
    assert not {"against", "workers", "device", "runs", "tracking"} & set(plain)
    assert not {"confirm", "confirm_top", "max_tokens", "n_trials", "minutes"} & set(plain["budget"])
    asked = search_config(compose("search", ["budget=smoke", *tiny, "objectives=[accuracy]", "max_params=1e6"]))
    assert asked.identity()["objectives"] == ("accuracy",)
    assert asked.identity()["max_params"] == 1e6
    assert {key for key in plain if plain[key] != asked.identity()[key]} == {"objectives", "max_params"}


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("runs")
    settings = ["pruner=halving", "objectives=[val_loss,state_bytes]", "state_length=4096", "sampler=random"]
    return run(folder, [*tiny, *settings, "space=hybrid", "n_trials=12"])


def test_two_objectives_are_searched_and_pruned_together(study):
    assert study.ended == "completed"
    frozen = dashboard(study.folder)
    assert [direction.name for direction in frozen.directions] == ["MINIMIZE", "MINIMIZE"]
    for one in study.records:
        if one.state in ("COMPLETE", "PRUNED"):
            assert list(one.objectives) == ["val_loss", "state_bytes"]
            arch = Arch.from_dict(json.loads((study.folder / f"trials/{one.number:04d}/arch.json").read_text()))
            assert one.objectives["state_bytes"] == arch.cost(4096).state_bytes >= one.cost["state_bytes"]
            assert one.objectives["val_loss"] == one.valid_loss
    assert frozen.metric_names == ["val_loss", "state_bytes"]
    done = {one.number: list(one.objectives.values()) for one in study.records if one.state == "COMPLETE"}
    assert {one.number: one.values for one in frozen.trials if one.state.name == "COMPLETE"} == done


def test_the_leaderboard_marks_the_front(study):
    with (study.folder / "leaderboard.csv").open() as file:
        marked = {int(row["trial"]) for row in csv.DictReader(file) if row["front"] == "1"}
    assert marked == {one.number for one in front(study.records)}
    assert study.best.number in marked


def test_limits_are_checked_without_training(tmp_path, tiny):
    loose = run(tmp_path / "a", [*tiny, "sampler=random", "n_trials=8"])
    limit = min(one.cost["params"] for one in loose.records if one.state == "COMPLETE") + 0.5
    lines = []
    tight = run(tmp_path / "b", [*tiny, "sampler=random", "n_trials=6", f"max_params={limit}"], lines.append)
    out = [one for one in tight.records if one.state == "INFEASIBLE" and one.reason and "max_params" in one.reason]
    assert out
    for one in out:
        assert one.reason == f"params={one.cost['params']:,.6g} is above max_params={limit:,.6g}"
        assert not (tight.folder / f"trials/{one.number:04d}/metrics.jsonl").exists()
    yardsticks = [one for one in tight.records if one.preset is not None and one.cost["params"] > limit]
    assert yardsticks
    assert all(one.state == "COMPLETE" and one.violation for one in yardsticks)
    assert tight.best is None or tight.best.violation is None
    frozen = dashboard(tight.folder)
    assert all(frozen.trials[one.number].constraints["max_params"] > 0 for one in out)


def test_accuracy_alone_is_maximised_in_the_whole_search(tmp_path, tiny):
    summary = run(tmp_path, [*tiny, "pruner=halving", "objectives=[accuracy]", "n_trials=8"])
    done = [one for one in summary.records if one.state == "COMPLETE"]
    assert summary.best.accuracy == max(one.accuracy for one in done)
    frozen = dashboard(summary.folder)
    assert frozen.best_trial.value == summary.best.accuracy


def test_hardware_is_measured_alone_once_for_each_architecture(tmp_path, tiny, monkeypatch):
    calls = itertools.count()

    def figures(arch, setting):
        return {"tokens_per_second": 1000.0 - next(calls), "ms_per_token": 1.0}

    monkeypatch.setattr(measure, "_in_a_process", figures)
    settings = ["pruner=halving", "objectives=[val_loss,tokens_per_second]", "n_trials=6"]
    summary = run(tmp_path, [*tiny, *settings])
    kept = sorted((summary.folder / "measured").iterdir())
    asked = next(calls)
    assert len(kept) == asked == len({one.fingerprint for one in summary.records if one.fingerprint})
    stored = json.loads(kept[0].read_text())
    assert stored["isolated"] is True
    assert {"figures", "machine", "fingerprint", "setting"} <= set(stored)
    assert all(one.objectives["tokens_per_second"] for one in summary.records if one.state == "COMPLETE")
    config = search_config(compose("search", ["budget=smoke", *tiny]))
    arch = Arch.from_dict(json.loads((summary.folder / "trials/0000/arch.json").read_text()))
    assert measure.measure(summary.folder, arch, config)["ms_per_token"] == 1.0
    assert next(calls) == asked + 1  # from memory


def test_a_latency_limit_measures_before_training(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(measure, "_in_a_process", lambda *_: {"tokens_per_second": 1.0, "ms_per_token": 7.0})
    summary = run(tmp_path, [*tiny, "max_latency_ms=5", "n_trials=5"])
    assert all(one.violation == "ms_per_token=7 is above max_latency_ms=5" for one in summary.records)
    assert summary.best is None


def test_a_real_measurement_in_a_process_of_its_own(tmp_path):
    arch = Arch.from_pattern("MF", d_model=16, vocab_size=32)
    found = measure._in_a_process(arch, measure.Setting(16, 2, "cpu"))
    assert found["tokens_per_second"] > 0
    assert found["ms_per_token"] > 0
    with pytest.raises(StudyError, match="MF could not be measured on this machine: "):
        measure._in_a_process(arch, measure.Setting(16, 2, "nowhere"))


def test_the_name_of_a_figure_holds_architecture_machine_and_settings(monkeypatch):
    arch, other = (Arch.from_pattern(p, d_model=16, vocab_size=32) for p in ("MF", "MA"))
    setting = measure.Setting(16, 2, "cpu")
    names = {measure.key(arch, setting), measure.key(other, setting), measure.key(arch, measure.Setting(32, 2, "cpu"))}
    monkeypatch.setattr(measure, "describe_machine", lambda: "another machine")
    names.add(measure.key(arch, setting))
    assert len(names) == 4


def test_nothing_trains_while_it_is_measured(tmp_path):
    busy = tmp_path / ".leases" / "measure"
    with measure.training(tmp_path), locked(busy, wait=False) as taken:
        assert taken is False
    with measure.alone(tmp_path) as isolated:
        assert isolated is True
        with locked(busy, wait=False, shared=True) as taken:
            assert taken is False
    measure_patience, measure.PATIENCE = measure.PATIENCE, 0.0
    try:
        with measure.training(tmp_path), measure.alone(tmp_path) as isolated:
            assert isolated is False
    finally:
        measure.PATIENCE = measure_patience


def test_writing_is_measured_with_the_decoder_of_generate(monkeypatch):
    """What copies the whole cache of attention for every token would count the context, not the step."""
    made, steps = [], []

    class Spy(Decoder):
        def __init__(self, model, state):
            made.append([part.shape for one in state for part in one])
            super().__init__(model, state)

        def __call__(self, ids_B):
            steps.append(len(ids_B))
            return super().__call__(ids_B)

    monkeypatch.setattr(decode, "Decoder", Spy)
    monkeypatch.setattr(measure, "_SECONDS", 0.0)
    monkeypatch.setattr(measure, "_WARM_SECONDS", 0.0)
    model = HybridLM(Arch.from_pattern("A", d_model=16, vocab_size=32), seed=0).eval()
    whole_model_calls = []
    model.register_forward_hook(lambda *_: whole_model_calls.append(1))
    assert measure.speeds(model, measure.Setting(300, 2, "cpu"))["ms_per_token"] > 0
    assert len(steps) == measure._LEAST * (1 + measure._WRITTEN)
    assert len(made) == measure._LEAST
    assert all(any(300 in shape for shape in shapes) for shapes in made)  # after a full context
    assert len(whole_model_calls) == measure._LEAST + 1


@pytest.mark.parametrize(
    ("given", "drawn"),
    [
        ([], "evolution"),
        (["objectives=[val_loss,params]", "pruner=halving"], "tpe"),
        (["objectives=[val_loss,params]", "pruner=halving", "sampler=nsga2"], "nsga2"),
    ],
)
def test_the_sampler_that_is_not_named_is_one_that_can_do_what_is_asked(tiny, given, drawn):
    assert search_config(compose("search", ["budget=smoke", *tiny, *given])).sampler == drawn
