"""Several objectives: fronts, ranks and directions; limits that are checked without training; measured figures."""

import csv
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
from hybridnas.search_spaces.space import Space
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
        (["max_state_bytes=1e5"], "state_length", None),
        (["min_decode_tokens_per_second=10"], "state_length", None),
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


@pytest.mark.parametrize("which", ["within", "all", "none"])
def test_counted_limits_are_decided_before_a_trial_exists(tmp_path, tiny, which):
    config = search_config(compose("search", ["budget=smoke", *tiny]))
    target = Space.from_mapping(config.space).target(config.budget.scale(256))
    limit = 1.1 * target  # several experts have more
    lines = []
    settings = ["sampler=random", f"max_params={limit}", f"budget.train_baselines={which}", "space.split=null"]
    presets = "space.baselines=[mamba,moe_mamba]"
    summary = run(tmp_path, [*tiny, *settings, presets, "n_trials=3"], lines.append)
    drawn = [one for one in summary.records if one.preset is None]
    assert drawn
    assert all(one.state in ("COMPLETE", "PRUNED", "DUPLICATE") and one.cost["params"] <= limit for one in drawn)
    assert any("random architectures keep" in line for line in lines)
    states = {one.preset: (one.state, bool(one.violation)) for one in summary.records if one.preset is not None}
    mixture = ("COMPLETE", True) if which == "all" else ("INFEASIBLE", True)
    assert states == ({} if which == "none" else {"mamba": ("COMPLETE", False), "moe_mamba": mixture})
    for one in summary.records:
        assert (summary.folder / f"trials/{one.number:04d}/metrics.jsonl").exists() == (one.state != "INFEASIBLE")
        if one.violation:
            assert one.violation == f"params={one.cost['params']:,.6g} is above max_params={limit:,.6g}"
            assert dashboard(summary.folder).trials[one.number].constraints["max_params"] > 0
    assert summary.best.violation is None


def test_a_limit_that_nothing_keeps_is_refused_with_what_is_reached(tmp_path, tiny):
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, [*tiny, "max_state_bytes=10", "state_length=4096"])
    least, most = caught.value.allowed
    assert (caught.value.field, caught.value.got) == ("max_state_bytes", 10)
    assert 10 < least <= most
    assert not (tmp_path / "demo").exists()  # there is no such study


def test_a_limit_below_the_size_that_all_candidates_have_contradicts_it(tmp_path, tiny):
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, [*tiny, "max_active_params=100"])
    assert (caught.value.field, caught.value.got) == ("max_active_params", 100)


def test_accuracy_alone_is_maximised_in_the_whole_search(tmp_path, tiny):
    summary = run(tmp_path, [*tiny, "pruner=halving", "objectives=[accuracy]", "n_trials=8"])
    done = [one for one in summary.records if one.state == "COMPLETE"]
    assert summary.best.accuracy == max(one.accuracy for one in done)
    frozen = dashboard(summary.folder)
    assert frozen.best_trial.value == summary.best.accuracy


@pytest.fixture
def meter(monkeypatch):
    """Replace the process that measures: each figure is its ``value``, known to a tenth; ``asked`` has the settings."""

    class Fake:
        value, asked = 7.0, []

        def ask(self, arch, setting):
            self.asked.append((arch.fingerprint(), setting))
            return {name: measure.Figure(self.value, 0.9 * self.value, 1.1 * self.value) for name in setting.figures}

    fake = Fake()
    fake.asked = []
    monkeypatch.setattr(measure.Meter, "start", lambda self: None)
    monkeypatch.setattr(measure.Meter, "ask", lambda self, arch, setting: fake.ask(arch, setting))
    return fake


def test_hardware_is_measured_alone_once_for_each_architecture(tmp_path, tiny, meter):
    settings = ["pruner=halving", "objectives=[val_loss,train_tokens_per_second]", "n_trials=6"]
    summary = run(tmp_path, [*tiny, *settings])
    kept = sorted(path for path in (summary.folder / "measured").iterdir() if path.name != "predictor.json")
    assert len(kept) == len(meter.asked) == len({one.fingerprint for one in summary.records if one.fingerprint})
    stored = json.loads(kept[0].read_text())
    assert stored["isolated"] is True
    assert {"figures", "machine", "fingerprint", "setting"} <= set(stored)
    done = [one for one in summary.records if one.state == "COMPLETE"]
    assert all(one.objectives["train_tokens_per_second"] == 7.0 for one in done)
    assert all(one.spread["train_tokens_per_second"] == pytest.approx([6.3, 7.7]) for one in done)
    fingerprint, setting = meter.asked[0]
    arch = Arch.from_dict(json.loads((summary.folder / "trials/0000/arch.json").read_text()))
    asked = len(meter.asked)
    known = measure.measure(summary.folder, arch, setting, measure.Meter())
    assert known["train_tokens_per_second"].value == 7.0
    assert (arch.fingerprint(), len(meter.asked)) == (fingerprint, asked)  # from memory


@pytest.mark.parametrize(
    ("limit", "met"),
    [
        ("max_latency_ms=5", False),
        ("max_latency_ms=6.5", True),
        ("min_decode_tokens_per_second=7.5", True),
        ("min_decode_tokens_per_second=8", False),
    ],
)
def test_a_measured_limit_is_decided_before_training_and_met_within_the_spread(tmp_path, tiny, meter, limit, met):
    summary = run(tmp_path, [*tiny, limit, "state_length=64", "n_trials=2", "space.baselines=[mamba,moe_mamba]"])
    name = limit.partition("=")[0]
    presets = [one for one in summary.records if one.preset is not None]
    assert len(presets) == 2
    if met:
        assert all(one.state == "COMPLETE" and list(one.within_spread) == [name] for one in presets)
        assert summary.best is not None
    else:
        assert all(one.state == "INFEASIBLE" and name in one.violation for one in presets)
        assert summary.best is None
        assert not list(summary.folder.glob("trials/*/metrics.jsonl"))


@pytest.mark.parametrize(("limit", "ends"), [("max_latency_ms=1", True), ("max_latency_ms=5", False)])
def test_a_search_whose_measured_limit_is_far_out_of_reach_ends_early(tmp_path, tiny, meter, monkeypatch, limit, ends):
    monkeypatch.setattr("hybridnas.search.loop.MEASURED_ENOUGH", 4)
    monkeypatch.setattr("hybridnas.search.loop.MAX_DRAWS_PER_TRIAL", 3)
    said = []
    summary = run(
        tmp_path, [*tiny, limit, "state_length=64", "n_trials=3", "space.baselines=[mamba,moe_mamba]"], said.append
    )
    drawn = [one for one in summary.records if one.preset is None and one.spread]
    assert (summary.ended, summary.best) == ("exhausted", None)
    assert (len(drawn) == 4) == ends == any("4 candidates that were measured" in line for line in said)


def test_a_real_measurement_in_a_process_of_its_own():
    arch = Arch.from_pattern("MF", d_model=16, vocab_size=32)
    meter = measure.Meter()
    try:
        found = meter.ask(arch, setting(measure_all=True))
        assert set(found) == set(setting(measure_all=True).figures)
        assert all(0 < figure.low <= figure.value <= figure.high for figure in found.values())
        with pytest.raises(StudyError, match="MF could not be measured on this machine: "):
            meter.ask(arch, setting(device="nowhere"))
    finally:
        meter.close()


def setting(*, measure_all=False, **changes):
    figures = (
        ("train_tokens_per_second", "prefill_tokens_per_second", "decode_tokens_per_second", "ms_per_token")
        if measure_all
        else ("ms_per_token",)
    )
    shapes = {"length": 16, "prefill_batch": 2, "decode_batch": 3, "train_batch": 2, "train_length": 8}
    return measure.Setting(**{**shapes, "figures": figures, "device": "cpu", "seconds": 0.0, **changes})


def test_the_interval_of_a_median_is_that_of_order_statistics():
    times = [float(n) for n in range(1, 21)]
    found = measure.interval(times)
    assert (found.value, found.low, found.high) == (10.5, 6.0, 15.0)  # scipy.stats.binom(20, 0.5).ppf(0.025) is 6
    assert measure.interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


def test_the_name_of_a_figure_holds_architecture_machine_and_settings(monkeypatch):
    arch, other = (Arch.from_pattern(p, d_model=16, vocab_size=32) for p in ("MF", "MA"))
    names = {measure.key(arch, setting()), measure.key(other, setting()), measure.key(arch, setting(length=32))}
    monkeypatch.setattr(measure, "describe_machine", lambda: "another machine")
    names.add(measure.key(arch, setting()))
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
    model = HybridLM(Arch.from_pattern("A", d_model=16, vocab_size=32), seed=0).eval()
    whole_model_calls = []
    model.register_forward_hook(lambda *_: whole_model_calls.append(1))
    assert measure.speeds(model, setting(length=300))["ms_per_token"].value > 0
    assert len(made) == measure._SOME + 1  # one that is not counted
    assert len(steps) == len(made) * (1 + measure._WRITTEN)
    assert all(any(300 in shape for shape in shapes) for shapes in made)  # after a full context
    assert len(whole_model_calls) == 1  # the prompt, once


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
