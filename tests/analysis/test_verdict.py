"""The verdict: who is compared, by which seeds and documents, and what is claimed."""

import dataclasses

import numpy as np
import pytest

from hybridnas.analysis.bootstrap import difference, holm
from hybridnas.analysis.verdict import contenders, over_documents, verdict
from hybridnas.study.documents import DocumentSums
from hybridnas.study.records import TrialRecord
from hybridnas.study.reference import ReferenceStudy


def record(number, confirmed, further=(), preset=None, loss=1.0, **fields):
    return TrialRecord(
        number=number, state="COMPLETE", pattern="M" * (number + 1), fingerprint=str(number), preset=preset,
        valid_loss=loss, objectives=fields.pop("objectives", {"val_loss": loss}),
        confirmed={str(seed): value for seed, value in enumerate(confirmed, 1)},
        verdict={str(seed): value for seed, value in enumerate(further, 1001)}, **fields,
    )  # fmt: skip


PAPER = record(0, (1.5, 1.52), (1.5, 1.52, 1.51, 1.5), preset="moe_mamba")
MAMBA = record(1, (1.4, 1.42), (1.41, 1.42, 1.4, 1.41), preset="mamba")
BEST = record(2, (1.3, 1.31), (1.35, 1.36, 1.34, 1.355))
SECOND = record(3, (1.31, 1.32), (1.34, 1.37, 1.35, 1.345))
STUDY = [PAPER, MAMBA, BEST, SECOND]


def test_the_winner_meets_the_reference_the_best_baseline_the_best_drawn_and_the_runner_up():
    assert [one.number for one in contenders(STUDY, "moe_mamba")] == [2, 0, 1, 3]
    assert [one.number for one in contenders(STUDY, "mamba")] == [2, 1, 3]
    assert [one.number for one in contenders([PAPER, MAMBA, BEST], "moe_mamba")] == [2, 0, 1]
    assert [one.number for one in contenders([PAPER, MAMBA, SECOND], "moe_mamba")] == [3, 0, 1]
    worse = record(4, (1.6, 1.6))
    assert [one.number for one in contenders([PAPER, MAMBA, worse], "moe_mamba")] == [1, 0, 4]
    assert contenders([record(5, (1.0,))], None) == []


def test_differences_are_of_the_seeds_that_chose_nothing():
    found = verdict(STUDY, "moe_mamba")
    assert (found.best.number, found.part) == (2, "valid")
    reference, mamba, second = found.others
    assert (reference.name, mamba.name, second.record) == ("moe_mamba", "mamba", SECOND)
    assert reference.gap == difference(BEST.verdict, PAPER.verdict)
    assert mamba.gap.mean == pytest.approx(1.35125 - 1.41)
    assert [one.adjusted for one in found.others] == holm([one.gap.p for one in found.others])
    assert reference.claimed(0.05)
    assert not reference.claimed(1e-9)
    assert not second.claimed(0.05)
    unasked = verdict([dataclasses.replace(one, verdict={}) for one in STUDY], "moe_mamba")
    assert not unasked.stated
    assert verdict([record(0, (1.0,))], None) is None


def test_the_best_of_the_reference_study_is_one_more_comparison():
    theirs = ReferenceStudy("s-random", record(7, ()), 5, [], verdict={"1001": 1.4, "1002": 1.4, "1003": 1.5})
    found = verdict(STUDY, "moe_mamba", against=theirs)
    assert [one.name for one in found.others] == ["moe_mamba", "mamba", SECOND.name, "the best of s-random"]
    assert found.others[-1].gap.seeds == 3
    assert found.others[0].adjusted >= verdict(STUDY, "moe_mamba").others[0].adjusted


def test_documents_are_used_where_all_figures_are_of_the_test_part():
    tested = [dataclasses.replace(one, verdict_test=one.verdict) for one in STUDY]

    def documents(study, number, seed):
        own = np.random.default_rng([number, int(seed)]).normal(0, 1.0, 12)
        return DocumentSums(tuple(range(12)), tuple(own), (100,) * 12, (100,) * 12)

    found = verdict(tested, "moe_mamba", documents=documents)
    assert (found.part, found.others[0].gap.documents) == ("test", 12)
    assert verdict(STUDY, "moe_mamba", documents=documents).others[0].gap.documents == 0
    missing = verdict(tested, "moe_mamba", documents=lambda *where: None)
    assert (missing.part, missing.others[0].gap.documents) == ("test", 0)


def test_one_seed_has_an_interval_over_documents_alone():
    def documents(study, number, seed):
        assert (study, seed) == (None, None)
        own = np.arange(12.0) + (number == 0) * np.linspace(1, 3, 12)
        return DocumentSums(tuple(range(12)), tuple(own), (100,) * 12, (100,) * 12)

    ours = record(2, (), test_loss=0.055)
    theirs = record(0, (), preset="moe_mamba", loss=1.1, test_loss=0.075)
    found = over_documents([ours, theirs], "moe_mamba", documents)
    assert (found.seeds, found.documents, found.mean) == (1, 12, pytest.approx(-0.02))
    assert found.clear
    assert over_documents([ours, theirs], "moe_mamba", lambda *where: None) is None
    assert over_documents([theirs], "moe_mamba", documents) is None


def test_accuracy_is_compared_in_its_own_direction():
    better = record(1, (0.6, 0.7), (0.6, 0.62, 0.61, 0.6), objectives={"accuracy": 0.5})
    worse = record(2, (0.5, 0.6), (0.5, 0.53, 0.51, 0.5), objectives={"accuracy": 0.6}, preset="moe_mamba")
    (only,) = verdict([better, worse], "moe_mamba").others
    assert only.gap.mean == pytest.approx(-0.0975)
    assert only.claimed(0.05)
