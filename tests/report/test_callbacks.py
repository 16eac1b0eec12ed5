"""Callbacks that write the report and the console's lines while a search runs."""

import csv
import dataclasses

from hybridnas.report.callbacks import FIRST, SHARE, ConsoleLines, ReportFiles, trial_line
from hybridnas.study.callbacks import StudyEnded, StudyStarted, TrialEnded
from hybridnas.study.records import StudyMeta, TrialRecord

META = StudyMeta(name="demo", reference="mamba")


def record(number, loss, state="COMPLETE", **fields):
    return TrialRecord(number=number, state=state, pattern="M" * (number + 1), valid_loss=loss, **fields)


def ended(folder, *records):
    return TrialEnded(record=records[-1], records={one.number: one for one in records}, folder=folder)


def test_reports_take_a_bounded_share_of_the_time_and_the_leaderboard_is_always_new(tmp_path, monkeypatch):
    now, written = [0.0], []

    def slow(folder, records, meta):
        written.append(([one.number for one in records], meta.status, meta.seconds))
        now[0] += 1.5

    def leaders():
        return [line["trial"] for line in csv.DictReader((tmp_path / "leaderboard.csv").read_text().splitlines())]

    monkeypatch.setattr("hybridnas.report.callbacks.write_report", slow)
    files, records = ReportFiles(clock=lambda: now[0]), [record(2, 1.0), record(0, 3.0), record(1, 2.0)]
    files.on_study_start(StudyStarted(folder=tmp_path, meta=META, identity={}))
    files.on_trial_end(ended(tmp_path, *records[:1]))
    assert (leaders(), written) == (["2"], [])
    now[0] = FIRST + 5
    files.on_trial_end(ended(tmp_path, *records[:2]))
    assert (leaders(), written) == (["2", "0"], [([0, 2], "running", FIRST + 5)])
    files.on_trial_end(ended(tmp_path, *records))  # too soon
    now[0] += 1.5 / SHARE + 1
    files.on_trial_end(ended(tmp_path, *records[:2]))  # the records that the report shows already
    assert (leaders(), len(written)) == (["2", "0"], 1)
    files.on_trial_end(ended(tmp_path, *records))
    assert written[1][:2] == ([0, 1, 2], "running")
    for last in (False, True):
        files.on_study_end(StudyEnded(folder=tmp_path, meta=META, records=records, ended="completed", last=last))
        assert len(written) == 2 + last


def test_a_trial_has_one_line_with_its_distance_to_the_reference(tmp_path):
    lines = []
    console = ConsoleLines(lines.append)
    console.on_study_start(StudyStarted(folder=tmp_path, meta=META, identity={}))
    first = record(0, 2.0, preset="mamba", seconds=3.0, tokens_per_second=1234.0)
    for one in (
        first,
        record(1, 1.75, seconds=4.0),
        record(2, 2.5, "PRUNED", tokens=1000),
        record(3, None, "FAIL", reason="out of memory"),
    ):
        console.on_trial_end(ended(tmp_path, first, one))
    console.on_note("resuming")
    assert [line.split("  ") for line in lines] == [
        ["trial 0", "1", "mamba M", "loss 2.0000", "3 s", "1,234 tokens/s", "best so far"],
        ["trial 1", "2", "MM", "loss 1.7500", "-0.2500 to mamba", "4 s", "best so far"],
        ["trial 2", "2", "MMM", "loss 2.5000", "pruned at 1,000 tokens", "0 s", "best 2.0000 mamba"],
        ["trial 3", "2", "MMMM", "failed: out of memory"],
        ["resuming"],
    ]


def test_in_a_terminal_a_trial_is_one_line_of_its_width_with_all_that_was_asked():
    meta = dataclasses.replace(META, n_trials=40)
    first = record(0, 2.0, preset="mamba", seconds=3.0, tokens_per_second=1234.0)
    long = dataclasses.replace(record(12, 1.75, seconds=14.2), pattern="M[E,M]" * 20)
    failed = record(13, None, "FAIL", reason="loss is not finite " * 9)
    for one in (first, long, failed):
        line = trial_line(one, {r.number: r for r in (first, long, failed)}, meta, width=80)
        assert len(line) <= 80
        assert line.split()[:2] == ["3/40", f"#{one.number}"]
    shown = trial_line(long, {0: first, 12: long}, meta, width=80).split()
    assert shown[-7:] == ["1.7500", "-0.2500", "14", "s", "best", "so", "far"]
