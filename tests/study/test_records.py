"""Trial records: whole on disk, read back equal, and one damaged file costs only itself."""

import json
import math

import pytest

from hybridnas.errors import StudyError
from hybridnas.study.records import TrialRecord, clean_points, load_records, read_record, trial_folder, write_record


def record(number, **fields):
    return TrialRecord(
        number=number, state="COMPLETE", pattern="(ME)x2", fingerprint="f" * 64, valid_loss=1.25, **fields
    )


def test_what_was_written_is_read_back(tmp_path):
    first = record(7, cost={"params": 12}, choices={"split": 0.5}, rungs=[[10, 2.5]], curve=[{"tokens": 10}], tokens=20)
    write_record(trial_folder(tmp_path, 7), first)
    assert trial_folder(tmp_path, 7).name == "0007"
    assert read_record(tmp_path / "trials" / "0007") == first
    assert load_records(tmp_path) == ([first], [])
    assert [path.name for path in (tmp_path / "trials" / "0007").iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ('{"number": 1, "sta', "not whole JSON"),
        ("", "not whole JSON"),
        ("[]", "cannot be read"),
        ('{"number": 1, "state": "DONE"}', "state 'DONE'; allowed: COMPLETE"),
        ('{"state": "COMPLETE"}', "needs an integer 'number'"),
        ('{"number": 1, "state": "COMPLETE", "cost": 3}', "mapping for 'cost', got int"),
        ('{"number": 1, "state": "COMPLETE", "valid_loss": "low"}', "number for 'valid_loss', got str"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_damaged_record_is_skipped_with_one_sentence_and_the_others_stay(tmp_path, damage, words):
    for number in (0, 1, 2):
        write_record(trial_folder(tmp_path, number), record(number))
    broken = trial_folder(tmp_path, 1) / "result.json"
    broken.write_bytes(damage.encode() if isinstance(damage, str) else damage)
    records, warnings = load_records(tmp_path)
    assert [item.number for item in records] == [0, 2]
    assert len(warnings) == 1
    assert words in warnings[0]
    assert "0001" in warnings[0]
    with pytest.raises(StudyError, match="put back a copy of it"):
        read_record(broken.parent)


def test_a_number_that_appears_twice_is_reported(tmp_path):
    write_record(tmp_path / "trials" / "0001", record(1))
    write_record(tmp_path / "trials" / "copy", record(1))
    records, warnings = load_records(tmp_path)
    assert len(records) == 1
    assert "repeats the number 1" in warnings[0]


def test_a_study_without_trials_has_no_records(tmp_path):
    assert load_records(tmp_path / "absent") == ([], [])


def test_the_curve_comes_from_the_metrics_file_without_its_torn_end(tmp_path):
    folder = trial_folder(tmp_path, 0)
    write_record(folder, record(0))
    (folder / "metrics.jsonl").write_text('{"tokens": 5, "valid_loss": 3.0}\n{"tokens": 9, "valid_loss": 2.0}\n{"tok')
    assert read_record(folder).points() == [(5.0, 3.0), (9.0, 2.0)]


def test_points_are_finite_rising_and_the_last_of_each():
    assert clean_points([(2, 1.0), (1, 3.0), (2, 0.5), (3, math.nan), (4, None), (5,)]) == [(1.0, 3.0), (2.0, 0.5)]
    assert record(0, rungs=[[1, 2.0], [3, 1.0]]).points() == [(1.0, 2.0), (3.0, 1.0)]


def test_numbers_that_json_has_not_are_written_as_null(tmp_path):
    path = write_record(tmp_path, record(0, bits_per_byte=math.inf, curve=[{"tokens": 1, "valid_loss": math.nan}]))
    values = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert values["bits_per_byte"] is None
    assert values["curve"] == [{"tokens": 1, "valid_loss": None}]


def test_a_record_of_a_newer_version_is_read_for_what_is_known():
    assert TrialRecord.from_dict({"number": 1, "state": "FAIL", "invented_later": 3}).number == 1


def test_a_disk_that_refuses_is_said_in_one_sentence(tmp_path):
    (tmp_path / "trials").write_text("a file where a folder should be")
    with pytest.raises(StudyError, match=r"result\.json cannot be written .*; free space or change permissions"):
        write_record(trial_folder(tmp_path, 0), record(0))
