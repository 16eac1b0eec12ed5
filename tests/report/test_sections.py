"""The report's sections: which there are, what their tables hold."""

import dataclasses
import random

import pytest

from hybridnas.analysis.ranking import rows
from hybridnas.analysis.verdict import verdict
from hybridnas.report.leaderboard import footnotes
from hybridnas.report.plots import Axis, Series, scatter
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
    assert [trace["meta"] for trace in section.charts[0].data if "meta" in trace] == [0, 1, 2]
    assert "2 of 3 completed trials are beaten by no other in all of val_loss, state_bytes" in section.intro


def confirmed(number, values, further=(), **fields):
    given = {str(seed): value for seed, value in enumerate(values, 1)}
    more = {str(seed): value for seed, value in enumerate(further, 1001)}
    return record(number, "MEME" if number else "MMMM", 1.0 + number, confirmed=given, verdict=more, **fields)


PAPER = confirmed(0, [1.30, 1.31, 1.32], [1.31, 1.30, 1.32, 1.31], preset="moe_mamba")
CLEAR = confirmed(1, [1.10, 1.12, 1.11], [1.11, 1.12, 1.10, 1.12])
NEAR = confirmed(2, [1.20, 1.40, 1.31], [1.20, 1.40, 1.31, 1.34])


def said(records, reference="moe_mamba"):
    return headline(records, reference, verdict(records, reference))


def test_the_confirmation_separates_noise_from_differences():
    other = ReferenceStudy(
        "demo-random", record(7, "AAAA", 1.0), 500, [[100.0, 2.0], [400.0, 1.5]], {"1": 1.0, "2": 1.3, "3": 1.1},
        verdict={"1001": 1.0, "1002": 1.3, "1003": 1.1, "1004": 1.2},
    )  # fmt: skip
    section = titles([PAPER, CLEAR, NEAR], reference_study=other)["Confirmation"]
    assert [row["trial"] for row in section.table["rows"]] == [1, 2, 0]
    assert section.table["rows"][0]["style"] == "first"
    gaps = [row["cells"][4] for row in section.table["rows"]]
    assert [gap["style"] for gap in gaps] == ["good", "quiet", ""]
    assert gaps[2]["text"] == ""  # moe_mamba against itself
    how, reference, second, random = section.notes
    assert "by 4 further seeds that chose nothing; p-values are adjusted for 3 comparisons" in how
    assert second.startswith("MEME is better than MEME: -0.2000 ± ")
    assert reference.startswith("MEME is better than moe_mamba: -0.1975 ± ")
    assert random.startswith("The difference between MEME and the best of demo-random is inside the noise: ")
    assert said([PAPER, CLEAR, NEAR]).startswith("MEME, the best of 2 drawn, beats moe_mamba by 0.1975 ± ")
    assert said([PAPER, NEAR]).startswith("MEME and moe_mamba are inside the noise of each other: +0.0025 ± ")
    for records, style in (([PAPER, CLEAR], "good"), ([PAPER, NEAR], "")):
        page = render_report("nowhere", records, StudyMeta(name="demo"))
        assert f'<span class="pill {style}">confirmed: 3 fresh seeds</span>' in page
    fall = titles([PAPER, CLEAR], reference_study=other)["Best loss over training tokens"]
    assert "demo-random" in fall.charts[0].json


def test_seeds_that_chose_the_winner_do_not_say_by_how_much():
    records = [dataclasses.replace(one, verdict={}) for one in (PAPER, CLEAR)]
    assert said(records) == "MEME is best over 3 fresh seeds; they chose it, so they do not say by how much"
    assert titles(records)["Confirmation"].notes[0].startswith("No difference is stated")
    lost = dataclasses.replace(CLEAR, verdict={seed: value + 0.4 for seed, value in CLEAR.verdict.items()})
    assert said([PAPER, lost]).startswith("MEME was chosen on other seeds, but moe_mamba beats it by 0.2025 ± ")


def test_a_baseline_that_wins_is_a_finding():
    behind = confirmed(3, [1.35, 1.37, 1.36], [1.36, 1.35, 1.37, 1.36])
    assert said([PAPER, behind]).startswith("Nothing drawn beat moe_mamba: the best, MEME, is behind it, by 0.0500 ± ")
    close = confirmed(3, [1.35, 1.37, 1.36], [1.20, 1.40, 1.31, 1.34])
    assert said([PAPER, close]).startswith("Nothing drawn beat moe_mamba: the best, MEME, is inside the noise of it, ")
    ahead = confirmed(3, [1.35, 1.37, 1.36], [1.11, 1.12, 1.10, 1.12])
    assert said([PAPER, ahead]).startswith("MEME beats moe_mamba, which other seeds chose, by 0.1975 ± ")


def test_a_claim_names_how_many_were_drawn_and_the_next_best_of_them():
    drawn = [dataclasses.replace(one, tokens=500) for one in (CLEAR, NEAR)]
    text = said([PAPER, *drawn])
    assert text.startswith("MEME, the best of 2 drawn, beats moe_mamba by 0.1975 ± ")
    assert "; it beats the next best drawn, MEME, too (-0.2000 ± " in text
    behind = [
        dataclasses.replace(one, tokens=500, confirmed={s: v + 1 for s, v in one.confirmed.items()}) for one in drawn
    ]
    assert said([PAPER, *behind]).startswith("MEME beats moe_mamba, which other seeds chose, by ")
    last = [dataclasses.replace(one, verdict={s: v + 1 for s, v in one.verdict.items()}) for one in behind]
    assert said([PAPER, *last]).startswith(
        "None of the 2 drawn beat moe_mamba: the best, MEME, is behind it, by 0.8025 ± "
    )


def test_the_best_baseline_is_named_where_the_reference_is_another_one():
    better = confirmed(2, [1.20, 1.21, 1.22], [1.21, 1.20, 1.22, 1.21], preset="mamba")
    text = said([PAPER, CLEAR, better])
    assert text.startswith("MEME beats moe_mamba by 0.1975 ± ")
    assert "; it beats the best baseline, mamba, too (-0.0975 ± " in text
    near = confirmed(2, [1.12, 1.13, 1.14], [1.05, 1.20, 1.10, 1.13], preset="mamba")
    assert "; the best baseline, mamba, is inside the noise of it (-0.0075 ± " in said([PAPER, CLEAR, near])
    assert ";" not in said([PAPER, CLEAR])
    ahead = confirmed(2, [1.12, 1.13, 1.14], [1.01, 1.02, 1.00, 1.02], preset="mamba")
    assert said([PAPER, CLEAR, ahead]).startswith("MEME was chosen on other seeds, but mamba beats it by 0.1000 ± ")


def test_claims_depend_on_the_level_that_was_asked_for(tmp_path):
    strict = StudyMeta(name="demo", alpha=1e-7)
    assert "are inside the noise of each other" in render_report(tmp_path, [PAPER, CLEAR], strict)
    assert "99.9% interval" in render_report(tmp_path, [PAPER, CLEAR], StudyMeta(name="demo", alpha=0.001))
    assert "beats moe_mamba by" in render_report(tmp_path, [PAPER, CLEAR], StudyMeta(name="demo", alpha=0.01))


def test_after_confirmation_nothing_in_the_report_contradicts_the_winner():
    lucky = confirmed(1, [1.60, 1.61, 1.59], [1.60, 1.61, 1.59, 1.60], cost={"active_params": 10})
    lucky = dataclasses.replace(lucky, valid_loss=1.40, objectives={"val_loss": 1.40})
    solid = confirmed(2, [1.50, 1.51, 1.52], [1.52, 1.51, 1.50, 1.51], cost={"active_params": 10})
    paper = dataclasses.replace(PAPER, confirmed={"1": 1.55, "2": 1.56, "3": 1.57}, cost={"active_params": 10})
    lines = rows([lucky, solid, paper], "moe_mamba")
    assert [(row.rank, row.record.number) for row in lines] == [(1, 2), (2, 0), (3, 1)]
    notes = " ".join(footnotes(lines))
    assert "unconfirmed" not in notes
    assert "first, by their mean over 3 seeds" in notes
    assert "9.0 per active parameter; confirmed by 3 seeds" in notes
    page = render_report("nowhere", [lucky, solid, paper], StudyMeta(name="demo"))
    assert "lowest validation loss" not in page
    assert "1.5100</b><span>validation loss, trial 2, mean of 4 further seeds" in page
    alone = render_report("nowhere", [dataclasses.replace(solid, confirmed={}, verdict={})], StudyMeta(name="demo"))
    assert "lowest validation loss, trial 2" in alone


def on_test(records, shifts):
    """Give every fresh seed of each trial a result on the test part: its validation result and a shift."""
    return [
        dataclasses.replace(
            one,
            confirmed_test={seed: value + shift for seed, value in one.confirmed.items()},
            verdict_test={seed: value + shift for seed, value in one.verdict.items()},
        )
        for one, shift in zip(records, shifts, strict=True)
    ]


def test_fresh_seeds_choose_on_validation_and_are_compared_on_the_test_part():
    sure = on_test([PAPER, CLEAR], (0.0, 0.1))
    assert said(sure).startswith("MEME beats moe_mamba by 0.0975 ± ")
    assert " nats per token on the test part over 4 seeds (adjusted p " in said(sure)
    section = titles(sure)["Confirmation"]
    assert [column["name"] for column in section.table["columns"]][-2:] == ["test mean", "vs moe_mamba"]
    best = section.table["rows"][0]
    assert [one["sort"] for one in best["cells"][2:]] == pytest.approx([1.11, best["cells"][3]["sort"], 1.21, -0.1])
    lost = on_test([PAPER, CLEAR], (0.0, 0.4))
    assert titles(lost)["Confirmation"].table["rows"][0]["trial"] == 1  # validation alone chooses
    partly = [sure[0], dataclasses.replace(sure[1], verdict_test={"1001": 1.2})]
    assert said(partly) == said([PAPER, CLEAR])


def test_the_units_of_the_sections_are_those_of_the_objectives():
    assert set(UNITS) == {"val_loss", "accuracy"}


def test_a_model_without_state_stands_on_the_same_axis_as_one_of_megabytes():
    points = [(0.0, 2.4), (7296.0, 1.7), (24928.0, 1.5), (1_600_000.0, 1.49)]
    drawn = [Series(i, f"model {i}", "c5", f"model {i}", [point]) for i, point in enumerate(points)]
    [chart] = scatter([(Axis("state", in_bytes=True), drawn)])
    assert chart.layout["xaxis"]["ticktext"][0] == "0 B"
    places = [trace["x"][0] for trace in chart.data]
    assert places == sorted(places)
    assert min(places) > 0  # the axis is logarithmic
    [nothing] = scatter([(Axis("state", in_bytes=True), drawn[:1])])
    assert nothing.data[0]["x"] == [0.0]


def test_the_course_of_a_search_is_drawn_to_its_end(study):
    better = dataclasses.replace(study[0], objectives={"val_loss": 0.1}, valid_loss=0.1)
    [chart] = titles([better, *study[1:]])["Best loss over training tokens"].charts
    line = chart.data[-1]
    assert line["x"] == (90.0, 40 * 90.0)
    assert line["y"] == (0.1, 0.1)
    assert sum(trace["mode"] == "markers" for trace in chart.data) == 40
