"""Searches of several seeds: which of their claims contradict each other."""

import pytest

from hybridnas.bench.suites.verdicts import Row, _read, _write, contradictions, tables


def row(seed, winner, beaten="", compared=2, ahead=""):
    return Row(
        seed=seed, winner=winner, pattern=winner, fingerprint=winner, beaten=beaten, compared=compared, ahead=ahead,
        words=f"{winner} won", drawn=3, best_drawn="ME", seconds=1.5, ended="completed",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "contradict"),
    [
        (("mamba", "a b"), ("moe_mamba", "a b"), True),  # both beat all they were compared with
        (("mamba", "moe_mamba"), ("moe_mamba", "mamba"), True),  # each beats the other
        (("mamba", "moe_mamba"), ("moe_mamba", "a"), False),
        (("mamba", "a b"), ("mamba", "a b"), False),
        (("mamba", ""), ("moe_mamba", ""), False),
    ],
)
def test_two_searches_contradict_each_other_where_both_claims_cannot_be_right(one, other, contradict):
    assert bool(contradictions([row(0, *one), row(1, *other)])) == contradict


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [row(0, "mamba", "a b"), row(1, "moe_mamba")]
    _write(tmp_path / "rows.csv", rows)
    assert _read(tmp_path / "rows.csv") == rows
    assert [line[:3] for line in tables(rows)[1].rows] == [["mamba", 1, 1], ["moe_mamba", 1, 0]]
    assert _read(tmp_path / "none.csv") == []
