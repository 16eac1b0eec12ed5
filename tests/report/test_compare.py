"""Compare: the speed-up by hand-computed curves, what it reads from records and from MLflow, and its files."""

import csv
import dataclasses
import json
import re

import pytest
from scipy import stats

import hybridnas
from hybridnas.cli.compare import Settings
from hybridnas.cli.compare import run as command
from hybridnas.errors import StudyError
from hybridnas.report.compare import CompareConfig, compare, draw_curves, write_comparison
from hybridnas.report.plots import library
from hybridnas.study.folder import FORMAT
from hybridnas.study.records import TrialRecord, trial_folder, write_record
from hybridnas.tracking.mlflow import open_tracker


def record(number, factor, *, state="COMPLETE", preset=None, pattern="Mx4", end=16):
    """A run whose loss is ``factor / t`` at t = 1, 2, 4, ... end thousand tokens."""
    times = [t for t in (1, 2, 4, 8, 16) if t <= end]
    curve = [{"tokens": 1000 * t, "valid_loss": factor / t} for t in times]
    cost = {"params": 5_000_000, "active_params": 1_000_000, "state_bytes": 4096 * (number + 1)}
    return TrialRecord(number=number, state=state, preset=preset, pattern=pattern, fingerprint=f"{number:064x}",
                       cost=cost, curve=curve, tokens=1000 * end, valid_loss=factor / end)  # fmt: skip


RECORDS = [
    record(0, 2, preset="mamba", pattern="Mx4"),  # 2/16 = 0.125 at 16,000 tokens
    record(1, 1, preset="moe_mamba", pattern="(ME)x2"),  # 1/8 = 0.125 at 8,000 tokens: twice as fast
    record(2, 4, pattern="(AF)x2"),  # ends at 0.25: never there
    record(3, 1, pattern="[M,E]x4", state="PRUNED", end=4),
    record(4, 2, pattern="Mx4", state="DUPLICATE"),
    record(5, 2, pattern="(MA)x2", state="INFEASIBLE", end=1),
]
OTHERS = [record(0, 1.5, pattern="(MF)x2")]


def write_study(folder, records, reference="mamba", data="aaaa"):
    folder.mkdir(parents=True)
    study = {"format": FORMAT, "study": folder.name, "identity": {"space": {"reference": reference}},
             "data_fingerprint": data}  # fmt: skip
    (folder / "study.json").write_text(json.dumps(study))
    for one in records:
        write_record(trial_folder(folder, one.number), one)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_study(folder / "first", RECORDS)
    write_study(folder / "second", OTHERS)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The same two studies in one MLflow database."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    for name, records in (("first", RECORDS), ("second", OTHERS)):
        with open_tracker(uri, folder / name, name, {}) as tracker:
            assert tracker.ready(timeout=600)  # importing mlflow and making its database take long on a busy machine
            tracker.annotate({}, {"reference": "mamba"})
            tracker.sync(records)
        assert not tracker.off
    return uri


def test_records_and_mlflow_give_the_same_table(runs, server):
    by_records = compare(CompareConfig(runs=str(runs), study="first"))
    by_mlflow = compare(CompareConfig(uri=server, study="first"))
    assert by_records.table(by_records.groups[0]) == by_mlflow.table(by_mlflow.groups[0])
    assert by_records.baseline == "mamba"


def test_the_speed_up_of_one_over_t_is_two(runs):
    found = compare(CompareConfig(runs=str(runs), study="first"))
    assert [run.name for run in found.runs] == ["moe_mamba", "mamba", "(AF)x2", "[M,E]x4"]
    texts = {run.name: found.reaches[run.run_id].text() for run in found.runs}
    assert texts == {"moe_mamba": "2.00x", "mamba": "1.00x", "(AF)x2": "not reached", "[M,E]x4": "not reached"}
    first = found.reaches[found.runs[0].run_id]
    assert (first.tokens, first.baseline.points[-1]) == (8000, (16000, 0.125))


def test_any_run_may_be_the_baseline(runs):
    found = compare(CompareConfig(runs=str(runs), study="first", baseline="2"))  # (AF)x2 ends at 0.25
    texts = {run.name: found.reaches[run.run_id].text() for run in found.runs}
    assert texts == {"moe_mamba": "4.00x", "mamba": "2.00x", "(AF)x2": "1.00x", "[M,E]x4": "4.00x"}


def test_a_study_without_the_baseline_borrows_it(runs):
    found = compare(CompareConfig(runs=str(runs)))
    other = next(run for run in found.runs if run.study == "second")
    reach = found.reaches[other.run_id]
    # 1.5/t falls from 0.1875 at 8,000 to 0.09375 at 16,000: 0.125 lies two thirds of the way
    assert reach.baseline.title == "mamba (first/0)"
    assert reach.tokens == pytest.approx(8000 + 8000 * 2 / 3)


def test_runs_of_other_data_are_never_ranked_together_nor_lend_a_baseline(tmp_path, capsys):
    write_study(tmp_path / "text", RECORDS[:3])
    write_study(tmp_path / "recall", OTHERS, data="bbbb")
    found = compare(CompareConfig(runs=str(tmp_path)))
    assert [[run.study for run in group.runs] for group in found.groups] == [["text"] * 3, ["recall"]]
    assert [group.baseline for group in found.groups] == ["mamba", "recall/0"]
    reach = found.reaches["recall/0"]
    assert reach.baseline.run_id == "recall/0"
    named = compare(CompareConfig(runs=str(tmp_path), baseline="mamba"))
    assert named.reaches["recall/0"] is None
    page, sheet = write_comparison(named, tmp_path / "out")
    assert "2 groups of the same data and settings" in page.read_text(encoding="utf-8")
    assert len({line["group"] for line in csv.DictReader(sheet.read_text(encoding="utf-8").splitlines())}) == 2


def test_seeds_of_one_architecture_are_pooled_with_their_interval(tmp_path):
    losses = {0: 2.0, 1: 2.2, 2: 2.7}
    for seed, loss in losses.items():
        one = dataclasses.replace(record(0, 16 * loss, pattern="MFMF"), seed=seed)
        write_study(tmp_path / f"seed{seed}", [one], reference=None)
    [group] = compare(CompareConfig(runs=str(tmp_path))).groups
    [pool] = group.pools()
    assert (pool.name, pool.seeds) == ("MFMF", 3)
    low, high = stats.t.interval(0.95, 2, loc=2.3, scale=stats.sem(list(losses.values())))
    assert (pool.mean, pool.half) == pytest.approx((2.3, (high - low) / 2))


def test_the_curves_are_exported_as_pictures(runs, tmp_path):
    files = draw_curves(compare(CompareConfig(runs=str(runs))), tmp_path / "new" / "curves")
    assert [path.suffix for path in files] == [".svg", ".png"]
    assert b"<svg" in files[0].read_bytes()
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_runs_are_kept_by_number_preset_or_pattern_beside_the_baseline(runs):
    found = compare(CompareConfig(runs=str(runs), study="first", run="[M,E]x4,1"))
    assert sorted(run.trial for run in found.runs) == [0, 1, 3]


def test_html_and_csv_hold_the_comparison_and_fetch_nothing(runs, tmp_path):
    page, sheet = write_comparison(compare(CompareConfig(runs=str(runs))), tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    assert "reaches mamba&#39;s final loss 2.00x sooner" in text
    assert "not reached" in text
    assert re.findall(r"https?://", text.replace(library(), "")) == []
    assert "var(--moe_mamba)" in text
    lines = list(csv.DictReader(sheet.read_text(encoding="utf-8").splitlines()))
    assert len(lines) == 5
    best = lines[0]
    assert (best["preset"], float(best["speed_up"]), float(best["tokens_to_baseline_loss"])) == ("moe_mamba", 2.0, 8000)
    assert {line["tokens_to_baseline_loss"] for line in lines if line["trial"] == "2"} == {"not reached"}


def test_the_command_prints_lines_that_a_pipe_can_read(runs, tmp_path, capsys):
    assert command(Settings(runs=runs, study="first", run="1", out=tmp_path / "out")).code == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:3] == ["run", "study", "trial"]
    assert lines[1][0] == "moe_mamba"
    assert f"{tmp_path}/out/compare.html" in lines[-1][0]
    assert lines[1][lines[0].index("speed-up")] == "2.00x"
    assert (tmp_path / "out" / "compare.html").is_file()


@pytest.mark.parametrize(
    ("settings", "field", "allowed"),
    [
        ({"study": "frist"}, "study", ["first", "second"]),
        ({"baseline": "momba"}, "baseline", ["(AF)x2", "(MF)x2", "[M,E]x4", "mamba", "moe_mamba"]),
        ({"baseline": "[M,E]x4"}, "baseline", ["(AF)x2", "(MF)x2", "mamba", "moe_mamba"]),
        ({"run": "77"}, "run", ["(AF)x2", "(MF)x2", "[M,E]x4", "mamba", "moe_mamba"]),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(runs, settings, field, allowed):
    with pytest.raises(StudyError) as caught:
        compare(CompareConfig(runs=str(runs), **settings))
    [given] = settings.values()
    assert (caught.value.field, caught.value.got, sorted(caught.value.allowed)) == (field, given, allowed)


def test_the_default_baseline_is_the_reference_that_was_trained_else_the_best(tmp_path):
    write_study(tmp_path / "a", RECORDS[:3], reference="moe_mamba")
    assert compare(CompareConfig(runs=str(tmp_path))).baseline == "moe_mamba"
    write_study(tmp_path / "b" / "s", RECORDS[1:3], reference=None)
    assert compare(CompareConfig(runs=str(tmp_path / "b"))).baseline == "moe_mamba"  # the best run
    write_study(tmp_path / "c" / "s", RECORDS[2:4], reference=None)
    found = compare(CompareConfig(runs=str(tmp_path / "c")))
    assert (found.baseline, found.runs[0].title) == ("s/2", "(AF)x2 (s/2)")
    write_study(tmp_path / "d" / "s", RECORDS[3:4])
    with pytest.raises(StudyError, match="none of 1 runs trained to its end"):
        compare(CompareConfig(runs=str(tmp_path / "d")))


@pytest.mark.slow
def test_trainings_that_stand_alone_are_compared_by_their_own_files(tmp_path, corpus):
    arch = hybridnas.Arch.from_pattern("MF", d_model=16, vocab_size=256)
    data = {"kind": "text", "path": str(corpus)}
    losses = {}
    for name, seed in (("g", 0), ("suite/m/t", 1)):
        result = hybridnas.fit(arch, data=data, tokens=256, folder=tmp_path / name, seed=seed, batch_size=2, seq_len=32,
                               valid_tokens=64, labels={"preset": "mine"})  # fmt: skip
        losses[name.partition("/")[0]] = result.valid_loss
    (tmp_path / "suite" / "numbers.json").write_text('{"m/t": 3}')
    damaged = tmp_path / "torn" / "run.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    found = compare(CompareConfig(runs=str(tmp_path)))
    assert {run.study: run.points[-1][1] for run in found.runs} == losses
    assert {(run.study, run.trial, run.preset, run.pattern, run.status) for run in found.runs} == {
        ("g", None, "mine", "MF", "complete"),
        ("suite", 3, "mine", "MF", "complete"),
    }
    assert {run.costs["params"] for run in found.runs} == {arch.cost(32).params}


def test_without_runs_the_error_names_the_folder(tmp_path):
    with pytest.raises(StudyError) as caught:
        compare(CompareConfig(runs=str(tmp_path / "absent")))
    assert (caught.value.field, caught.value.got) == ("runs", tmp_path / "absent")


def test_a_server_that_cannot_be_read_is_named_without_its_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(StudyError) as caught:
        compare(CompareConfig(uri="http://me:hunter2@127.0.0.1:9"))
    assert (caught.value.field, caught.value.got) == ("uri", "http://***@127.0.0.1:9")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "this is not sqlite" * 99])
def test_a_database_that_is_none_is_refused_and_not_made(tmp_path, content):
    path = tmp_path / "mlflow.db"
    if content:
        path.write_text(content)
    with pytest.raises(StudyError) as caught:
        compare(CompareConfig(uri=f"sqlite:///{path}"))
    assert caught.value.field == "uri"
    assert path.exists() == bool(content)


def test_a_fault_of_our_own_is_not_blamed_on_mlflow(server, monkeypatch):
    monkeypatch.setattr("hybridnas.tracking.mlflow._recorded", lambda *given: given[99])
    with pytest.raises(IndexError):
        compare(CompareConfig(uri=server))
