"""Compare: the speed-up by hand-computed curves, what it reads from a real MLflow database, and its files."""

import csv
import re

import pytest

from hybridnas.cli.compare import run as command
from hybridnas.errors import StudyError
from hybridnas.report.compare import CompareConfig, compare, write_comparison
from hybridnas.study.records import TrialRecord
from hybridnas.tracking.mlflow import open_tracker


def record(number, factor, *, state="COMPLETE", preset=None, pattern="Mx4", end=16):
    """A run whose loss is ``factor / t`` at t = 1, 2, 4, ... end thousand tokens."""
    times = [t for t in (1, 2, 4, 8, 16) if t <= end]
    curve = [{"tokens": 1000 * t, "valid_loss": factor / t} for t in times]
    cost = {"params": 5_000_000, "active_params": 1_000_000, "state_bytes": 4096 * (number + 1)}
    return TrialRecord(number=number, state=state, preset=preset, pattern=pattern, fingerprint=f"{number:064x}",
                       cost=cost, curve=curve, tokens=1000 * end, valid_loss=factor / end)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    records = [
        record(0, 2, preset="mamba", pattern="Mx4"),  # 2/16 = 0.125 at 16,000 tokens
        record(1, 1, preset="moe_mamba", pattern="(ME)x2"),  # 1/8 = 0.125 at 8,000 tokens: twice as fast
        record(2, 4, pattern="(AF)x2"),  # ends at 0.25: never there
        record(3, 1, pattern="[M,E]x4", state="PRUNED", end=4),
        record(4, 2, pattern="Mx4", state="DUPLICATE"),
    ]
    with open_tracker(None, folder / "first", "first", {}) as tracker:
        tracker.sync(records)
    with open_tracker(None, folder / "second", "second", {}) as tracker:
        tracker.sync([record(0, 1.5, pattern="(MF)x2")])
    return folder


def test_the_speed_up_of_one_over_t_is_two(runs):
    found = compare(CompareConfig(runs=str(runs), study="first"))
    assert [run.name for run in found.runs] == ["moe_mamba", "mamba", "(AF)x2", "[M,E]x4"]
    words = {run.name: found.reaches[run.run_id].words() for run in found.runs}
    assert words == {"moe_mamba": "2.00x", "mamba": "1.00x", "(AF)x2": "not reached", "[M,E]x4": "not reached"}
    first = found.reaches[found.runs[0].run_id]
    assert (first.tokens, first.baseline.points[-1]) == (8000, (16000, 0.125))


def test_any_run_may_be_the_baseline(runs):
    found = compare(CompareConfig(runs=str(runs), study="first", baseline="2"))  # (AF)x2 ends at 0.25
    words = {run.name: found.reaches[run.run_id].words() for run in found.runs}
    assert words == {"moe_mamba": "4.00x", "mamba": "2.00x", "(AF)x2": "1.00x", "[M,E]x4": "4.00x"}


def test_a_study_without_the_baseline_borrows_it(runs):
    found = compare(CompareConfig(runs=str(runs)))
    other = next(run for run in found.runs if run.study == "second")
    reach = found.reaches[other.run_id]
    # 1.5/t falls from 0.1875 at 8,000 to 0.09375 at 16,000: 0.125 lies two thirds of the way
    assert reach.baseline.title == "mamba (first/0)"
    assert reach.tokens == pytest.approx(8000 + 8000 * 2 / 3)


def test_runs_are_kept_by_number_preset_or_pattern_beside_the_baseline(runs):
    found = compare(CompareConfig(runs=str(runs), study="first", run="[M,E]x4,1"))
    assert sorted(run.trial for run in found.runs) == [0, 1, 3]


def test_html_and_csv_hold_the_comparison_and_fetch_nothing(runs, tmp_path):
    page, sheet = write_comparison(compare(CompareConfig(runs=str(runs))), tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    assert "reaches mamba&#39;s final loss 2.00x sooner" in text
    assert "not reached" in text
    assert re.findall(r"https?://", text) == []
    assert "var(--c1)" in text
    lines = list(csv.DictReader(sheet.read_text(encoding="utf-8").splitlines()))
    assert len(lines) == 5
    best = lines[0]
    assert (best["preset"], float(best["speed_up"]), float(best["tokens_to_baseline_loss"])) == ("moe_mamba", 2.0, 8000)
    assert {line["tokens_to_baseline_loss"] for line in lines if line["trial"] == "2"} == {"not reached"}


def test_the_command_prints_lines_that_a_pipe_can_read(runs, tmp_path, capsys):
    assert command({"runs": str(runs), "study": "first", "run": 1, "out": str(tmp_path / "out")}) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:3] == ["run", "study", "trial"]
    assert lines[1][0] == "moe_mamba"
    assert lines[1][lines[0].index("speed-up")] == "2.00x"
    assert (tmp_path / "out" / "compare.html").is_file()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"study": "frist"}, "no study 'frist' among the runs; did you mean 'first'"),
        ({"baseline": "momba"}, "no run is baseline 'momba'; did you mean 'mamba'"),
        ({"baseline": "[M,E]x4"}, r"baseline '\[M,E\]x4' did not train to its end"),
        ({"run": "77"}, r"no run '77'; allowed: .*moe_mamba"),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(runs, settings, words):
    with pytest.raises(StudyError, match=words):
        compare(CompareConfig(runs=str(runs), **settings))


def test_without_runs_it_says_where_it_looked_and_what_to_run_first(tmp_path):
    with pytest.raises(StudyError, match=r"no runs in .*/mlflow\.db; run 'python -m hybridnas\.search"):
        compare(CompareConfig(runs=str(tmp_path)))


def test_a_server_that_cannot_be_read_is_named_without_its_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(StudyError, match=r"MLflow at http://\*\*\*@127\.0\.0\.1:9 cannot be read") as caught:
        compare(CompareConfig(uri="http://me:hunter2@127.0.0.1:9"))
    assert "hunter2" not in str(caught.value)
