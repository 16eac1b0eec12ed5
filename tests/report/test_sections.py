"""The report's sections: which there are, what their tables hold."""

import dataclasses
import random
import re

import pytest

from hybridnas.report.plots import Axis, Series, scatter_svg
from hybridnas.report.report import headline, render_report
from hybridnas.report.sections import UNITS, ReportInput, sections
from hybridnas.study.records import StudyMeta, TrialRecord
from hybridnas.study.reference import ReferenceStudy

TOKENS = (10, 30, 90)


def record(number, pattern, loss, **fields):
    curve = [{"tokens": t, "valid_loss": loss + 1.0 / t, "accuracy": 0.3} for t in TOKENS]
    given = {
        "state": "COMPLETE", "pattern": pattern, "fingerprint": f"{number:064x}", "valid_loss": curve[-1]["valid_loss"],
        "curve": curve, "rungs": [[entry["tokens"], entry["valid_loss"]] for entry in curve], "tokens": 90,
        "objectives": {"val_loss": curve[-1]["valid_loss"]}, "legs": [[float(number), 90]],
        "choices": {"slot0": pattern[0], "n_experts": 4},
    }  # fmt: skip
    return TrialRecord(number=number, **{**given, **fields})


@pytest.fixture(scope="module")
def study():
    """Forty architectures in which an M at the first place is worth half a nat, and nothing else matters."""
    chance = random.Random(1)
    patterns = ["".join(chance.choice("MAF") for _ in range(4)) for _ in range(40)]
    return [record(n, p, 2.0 - 0.5 * (p[0] == "M") + 0.05 * chance.random()) for n, p in enumerate(patterns)]


def titles(records, **more):
    return {section.title: section for section in sections(ReportInput(records, StudyMeta(name="demo"), **more))}


def test_a_section_without_enough_records_is_absent(study):
    assert titles([]) == {}
    few = titles(study[:3])
    assert "Effect of each letter and position" not in few
    assert "Pareto front" not in few
    assert "Confirmation" not in few


def test_the_rungs_have_counts_correlations_and_what_resuming_saved(study):
    resumed = dataclasses.replace(study[0], legs=[[0.5, 30], [50.0, 60]])
    stopped = dataclasses.replace(study[1], state="PRUNED", rungs=study[1].rungs[:1], tokens=10, legs=[[1.0, 10]])
    section = titles([resumed, stopped, *study[2:]])["Rungs"]
    counts = [row["cells"][1]["sort"] for row in section.table["rows"]]
    assert counts == [40, 39, 39]
    assert section.table["rows"][0]["cells"][3]["sort"] == pytest.approx(1.0)
    text = " ".join(section.notes)
    assert "1 candidate was paused at a rung" in text
    assert "would have cost 30 tokens more" in text


def test_the_front_is_listed_drawn_and_presets_beside_it_are_named():
    found = [
        record(0, "MEME", 1.0, preset="moe_mamba", objectives={"val_loss": 1.0, "state_bytes": 4096.0}),
        record(1, "MFMF", 1.2, objectives={"val_loss": 1.2, "state_bytes": 1024.0}),
        record(2, "AFAF", 1.3, preset="transformer", objectives={"val_loss": 1.3, "state_bytes": 9000.0}),
    ]
    section = titles(found)["Pareto front"]
    assert [row["trial"] for row in section.table["rows"]] == [0, 1]
    assert section.notes == ["Presets that are not on the front: transformer."]
    assert section.svg.count('class="trial"') == 3
    assert "2 of 3 completed trials are beaten by no other in all of val_loss, state_bytes" in section.intro


def confirmed(number, values, **fields):
    given = {str(seed): value for seed, value in enumerate(values, 1)}
    return record(number, "MEME" if number else "MMMM", 1.0 + number, confirmed=given, **fields)


def test_the_confirmation_separates_noise_from_differences():
    paper = confirmed(0, [1.30, 1.31, 1.32], preset="moe_mamba")
    clear = confirmed(1, [1.10, 1.12, 1.11])
    near = confirmed(2, [1.20, 1.40, 1.31])
    other = ReferenceStudy(
        "demo-random", record(7, "AAAA", 1.0), 500, [[100.0, 2.0], [400.0, 1.5]], {"1": 1.0, "2": 1.3, "3": 1.1}
    )
    section = titles([paper, clear, near], reference_study=other)["Confirmation"]
    assert [row["trial"] for row in section.table["rows"]] == [1, 2, 0]
    assert section.table["rows"][0]["style"] == "first"
    assert section.notes[0].startswith("MEME is better than moe_mamba: -0.2000 ± ")
    assert "inside the noise" in section.notes[1]
    assert headline([paper, clear, near], "moe_mamba").endswith("nats per token over 3 fresh seeds")
    assert (
        headline([paper, near], "moe_mamba")
        == "MEME is best on average, but its lead over moe_mamba is inside the noise"
    )
    assert "confirmed: 3 fresh seeds" in render_report("nowhere", [paper, clear], StudyMeta(name="demo"))
    fall = titles([paper, clear], reference_study=other)["Best loss over training tokens"]
    assert "demo-random" in fall.svg


def on_test(records, shifts):
    """Give every fresh seed of each trial a result on the test part: its validation result and a shift."""
    return [
        dataclasses.replace(one, confirmed_test={seed: value + shift for seed, value in one.confirmed.items()})
        for one, shift in zip(records, shifts, strict=True)
    ]


def test_fresh_seeds_choose_on_validation_and_are_compared_on_the_test_part():
    both = [confirmed(0, [1.30, 1.31, 1.32], preset="moe_mamba"), confirmed(1, [1.10, 1.12, 1.11])]
    sure = on_test(both, (0.0, 0.1))
    assert headline(sure, "moe_mamba") == headline(both, "moe_mamba").replace("0.2000", "0.1000").replace(
        "nats per token", "nats per token on the test part"
    )
    section = titles(sure)["Confirmation"]
    assert [column["name"] for column in section.table["columns"]][-2:] == ["test mean", "vs moe_mamba"]
    best = section.table["rows"][0]
    assert [one["sort"] for one in best["cells"][2:]] == pytest.approx([1.11, best["cells"][3]["sort"], 1.21, -0.1])
    assert section.notes[0].startswith("MEME is better than moe_mamba: -0.1000 ± ")
    lost = on_test(both, (0.0, 0.4))
    assert titles(lost)["Confirmation"].table["rows"][0]["trial"] == 1  # validation alone chooses
    assert "was chosen on validation data, but loses to moe_mamba by 0.2000 ± " in headline(lost, "moe_mamba")
    partly = [sure[0], dataclasses.replace(sure[1], confirmed_test={"1": 1.2})]
    assert headline(partly, "moe_mamba") == headline(both, "moe_mamba")


def test_the_units_of_the_sections_are_those_of_the_objectives():
    assert set(UNITS) == {"val_loss", "accuracy"}


def test_a_model_without_state_stands_on_the_same_axis_as_one_of_megabytes():
    points = [(0.0, 2.4), (7296.0, 1.7), (24928.0, 1.5), (1_600_000.0, 1.49)]
    drawn = [Series(i, f"model {i}", "c5", f"model {i}", [point]) for i, point in enumerate(points)]
    svg = scatter_svg([(Axis("state", in_bytes=True), drawn)], "state")
    assert {"0 B", "7.12 KiB", "28.5 KiB", "114 KiB"} <= set(re.findall(r">([^<>]+)</text>", svg))
    nothing = scatter_svg([(Axis("state", in_bytes=True), drawn[:1])], "state")
    assert "0 B" in nothing
