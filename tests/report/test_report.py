"""The report and the leaderboard on made-up records: their values, their order, and that a page is whole."""

import csv
import dataclasses
import io
import json
import math
import random
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from hybridnas.analysis.ranking import rows
from hybridnas.errors import StudyError
from hybridnas.report import leaderboard
from hybridnas.report.colors import LIGHT, css
from hybridnas.report.leaderboard import render_leaderboard, write_leaderboard
from hybridnas.report.plots import library
from hybridnas.report.report import headline, render_report, write_report
from hybridnas.study.documents import DocumentSums, read_documents, write_documents
from hybridnas.study.records import StudyMeta, TrialRecord, trial_folder
from hybridnas.units import duration, human, human_bytes, percent, several

PRESETS = {
    "transformer": ("(AF)x4", 1.62), "transformer_moe": ("(AE)x4", 1.585), "mamba": ("Mx8", 1.571),
    "mamba_mlp": ("(MF)x4", 1.583), "moe_mamba": ("(ME)x4", 1.548),
}  # fmt: skip
TOKENS = 24_000_000


def record(number, loss, *, state="COMPLETE", preset=None, pattern="(ME)x4", tokens=TOKENS, **fields):
    curve = [
        {"tokens": step, "valid_loss": (loss or 2) + 0.55 * (1 / (step / tokens + 0.12) - 1 / 1.12), "train_loss": 1.0}
        for step in (range(tokens // 9, tokens + 1, tokens // 9) if tokens else ())
    ]
    cost = {"params": 6_400_000 + 90_000 * number, "active_params": 1_200_000 + 400 * (number % 9 - 4),
            "embedding_params": 65_536, "flops_per_token": 2.6e6, "state_bytes": 8192 * (1 + number % 12)}  # fmt: skip
    defaults = {
        "fingerprint": f"{number:064x}", "cost": cost, "curve": curve if loss else [], "tokens": tokens,
        "accuracy": 0.52, "bits_per_byte": (loss or 2) / math.log(2), "tokens_per_second": 41_234.0, "seconds": 580.0,
        "seed": 11, "valid_loss": loss,
    }  # fmt: skip
    return TrialRecord(number=number, state=state, preset=preset, pattern=pattern, **{**defaults, **fields})


@pytest.fixture(scope="module")
def study():
    draw = random.Random(0)
    found = [record(i, loss, preset=name, pattern=text) for i, (name, (text, loss)) in enumerate(PRESETS.items())]
    for number in range(5, 48):
        pattern = "".join(draw.choice("MMEEAF") for _ in range(8))
        loss = 1.53 + abs(draw.gauss(0, 0.05))
        if number % 3 == 0:
            third = TOKENS // 9 * (1 if number % 2 else 3)
            found.append(record(number, None, state="PRUNED", pattern=pattern, tokens=third,
                                rungs=[[TOKENS // 9, loss + 0.6], [third, loss + 0.3]],
                                curve=[{"tokens": tokens, "valid_loss": loss + 0.8 * TOKENS / 9 / tokens}
                                       for tokens in sorted({TOKENS // 9, third})]))  # fmt: skip
        elif number == 7:
            found.append(record(number, None, state="FAIL", pattern=pattern, tokens=1_000_000,
                                reason="loss is not finite at step 61: lower lr or raise warmup_fraction"))  # fmt: skip
        elif number in (8, 10, 11):
            found.append(record(number, None, state="INFEASIBLE", pattern=pattern, tokens=0,
                                reason="1.2M active parameters are out of reach: 1.31M to 4.2M"))  # fmt: skip
        elif number == 13:
            found.append(record(number, 1.548, state="DUPLICATE", duplicate_of=4, tokens=0, curve=[]))
        else:
            found.append(record(number, loss, pattern=pattern))
    found.append(record(48, 1.5213, pattern="MM[M,E](ME)x2E"))
    return [dataclasses.replace(one, choices={"n_experts": 4 + 4 * (one.number % 2), "slot0": one.pattern[0]})
            if one.preset is None else one for one in found]  # fmt: skip


META = StudyMeta(
    name="mamba_moe-laptop", space="mamba_moe", data="Python standard library, 11.2 MB, bytes", budget="laptop",
    active_params=1_200_000, tokens=TOKENS, seq_len=256, batch_size=16, n_trials=50, seed=0, sampler="tpe",
    pruner="hyperband", command="python -m hybridnas.search space=mamba_moe study=mamba_moe-laptop",
    machine="Linux x86_64, 2 cores, 2 threads, no GPU", versions={"torch": "2.13.0", "hybridnas": "0.1.0"},
    started="2026-11-22T22:20:00", seconds=582.4, status="completed",
)  # fmt: skip


@pytest.fixture(scope="module")
def page(study, tmp_path_factory):
    return written(render_report(tmp_path_factory.mktemp("study"), study, META))


def written(page):
    """Return a page without the library that it carries."""
    assert page.count(library()) == 1
    return page.replace(library(), "")


class Links(HTMLParser):
    """Collects what a browser would fetch, and checks that elements close."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self):
        super().__init__()
        self.fetched, self.open, self.rows = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for key, value in attrs if key in ("src", "href") or (tag == "link" and key == "rel")]
        self.rows += (tag, dict(attrs).get("data-trial") is not None) == ("tr", True)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.fetched += [value for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def links(page):
    parser = Links()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_the_page_is_one_file_that_fetches_nothing(page):
    assert [link for link in links(page).fetched if not link.startswith("#")] == []
    assert "url(http" not in page
    assert "@import" not in page
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


class Page(HTMLParser):
    """The texts of a report: its title, cards, commands, and the values that table cells are sorted by."""

    def __init__(self, text):
        super().__init__()
        self.inside, self.title, self.cards, self.rows, self.code = [], "", [], {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.inside.append((tag, values.get("class") or ""))
        if tag == "tr":
            self.row = self.rows.setdefault(values.get("data-trial"), [])
        if tag == "td" and "data-v" in values:
            self.row.append(values["data-v"])
        if tag == "div" and (values.get("class") or "").startswith("card") and values["class"] != "cards":
            self.cards.append([])

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tags = [tag for tag, _ in self.inside]
        if "h1" in tags:
            self.title += data
        if "pre" in tags:
            self.code += data
        if any(name.startswith("card") and name != "cards" for _, name in self.inside) and data.strip():
            self.cards[-1].append(data.strip())


def test_the_page_holds_the_winner_its_lead_and_every_trial(study, page):
    found = Page(page)
    assert found.title == "MM[M,E](ME)x2E leads moe_mamba by 0.0267 nats per token, with one seed"
    assert [card[0] for card in found.cards] == ["1.5213", "\u22120.0267", "20.0", "1.2M", "49 of 50"]
    rank, number, name, loss, gap, experts, *_, state = found.rows["48"]
    assert (rank, number, name, loss, experts, state) == ("1", "48", "MM[M,E](ME)x2E", "1.5213", "4", "complete")
    assert float(gap) == pytest.approx(1.5213 - 1.548)
    assert set(found.rows) - {None} == {str(one.number) for one in study if one.state != "INFEASIBLE"}
    assert "python -m hybridnas.replay study=mamba_moe-laptop trial=48\n" in found.code
    assert "python -m hybridnas.generate model=runs/mamba_moe-laptop/best prompt=" in found.code


def with_test_part(records, shift):
    """Give the trials that were trained to the end a test loss: the winner's by validation is not the best there."""
    return [
        dataclasses.replace(one, test_loss=one.valid_loss + shift * (1 + (one.number == 48)), test_accuracy=0.5)
        if one.state == "COMPLETE"
        else one
        for one in records
    ]


def test_what_is_chosen_on_validation_is_stated_on_the_test_part(study, tmp_path):
    records = with_test_part(study, 0.01)
    page = Page(render_report(tmp_path, records, META))
    assert page.title == "MM[M,E](ME)x2E leads moe_mamba by 0.0167 nats per token on the test part, with one seed"
    assert page.cards[0] == ["1.5413", "test loss, trial 48 (validation 1.5213)"]
    assert page.cards[1] == ["\u22120.0167", "to moe_mamba (1.5580)"]
    valid, test, gap = map(float, page.rows["48"][3:6])
    assert (valid, test, gap) == pytest.approx((1.5213, 1.5413, 1.5413 - 1.558))
    order = [row.record.number for row in rows(records, "moe_mamba")]
    assert order == [row.record.number for row in rows(study, "moe_mamba")]
    sheet = list(csv.DictReader(write_leaderboard(tmp_path, records, "moe_mamba").read_text().splitlines()))
    assert (sheet[0]["valid_loss"], sheet[0]["vs_reference_part"]) == ("1.5213", "test")
    assert float(sheet[0]["test_loss"]) == pytest.approx(1.5413)
    assert float(sheet[0]["vs_reference"]) == pytest.approx(1.5413 - 1.558)
    shown = io.StringIO()
    render_leaderboard(records, "moe_mamba", Console(file=shown, width=120, force_terminal=True, no_color=True))
    assert leaderboard.TESTED in shown.getvalue()
    assert " test " in shown.getvalue()


def test_a_trial_without_test_figures_leaves_all_differences_on_validation(study, tmp_path):
    records = [
        dataclasses.replace(one, test_loss=None) if one.number == 5 else one for one in with_test_part(study, 0.01)
    ]
    assert headline(records, "moe_mamba") == headline(study, "moe_mamba")
    assert {row.part for row in rows(records, "moe_mamba")} == {"valid"}
    assert Page(render_report(tmp_path, records, META)).cards[0] == [
        "1.5213", "lowest validation loss, trial 48; 2.1948 bits per byte"]  # fmt: skip


def test_a_lead_with_one_seed_has_an_interval_over_documents(study, tmp_path):
    records = with_test_part(study, 0.01)
    assert Page(render_report(tmp_path, records, META)).cards[1][1] == "to moe_mamba (1.5580)"
    places = (1000,) * 20
    shifts = np.linspace(0, 2 * 16.7, 20)  # of moe_mamba [nats]: 0.0167 nats per token on average
    for record in records:
        if record.preset == "moe_mamba" or record.number == 48:
            nats = np.full(20, 1541.3) + (record.number != 48) * shifts
            sums = DocumentSums(tuple(range(20)), tuple(nats), places, places)
            write_documents(trial_folder(tmp_path, record.number), sums)
    found = Page(render_report(tmp_path, records, META)).cards[1]
    half = stats.t.ppf(0.975, 19) * shifts.std(ddof=1) / 20**0.5 / 1000
    said = re.fullmatch(r"to moe_mamba \(1\.5580\) ± (0\.\d{4}) over 20 documents, one seed", found[1])
    assert float(said[1]) == pytest.approx(half, rel=0.1)
    damaged = trial_folder(tmp_path, 48) / "documents.json"
    damaged.write_text(damaged.read_text()[:-9])
    assert Page(render_report(tmp_path, records, META)).cards[1][1] == "to moe_mamba (1.5580)"
    with pytest.raises(StudyError) as refused:
        read_documents(damaged.parent)
    assert refused.value.field == "documents"


def test_a_winner_that_loses_on_the_test_part_is_not_said_to_win(study):
    said = headline(with_test_part(study, 0.05), "moe_mamba")
    start = "MM[M,E](ME)x2E was chosen on validation data, but moe_mamba is better by "
    assert said == start + "0.0233 nats per token on the test part"


def test_a_study_without_a_reference_compares_with_none(study, tmp_path):
    alone = [one for one in study if one.preset != "moe_mamba"]
    text = written(write_report(tmp_path, alone, dataclasses.replace(META, reference=None)).read_text(encoding="utf-8"))
    found = Page(text)
    assert found.title == "MM[M,E](ME)x2E is best, at 1.5213 nats per token"
    assert [card[0] for card in found.cards] == ["1.5213", "20.0", "1.2M", "48 of 50"]
    assert len(found.rows["48"]) == len(Page(render_report(tmp_path, alone, META)).rows["48"]) - 1
    assert "moe_mamba" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL).replace("mamba_moe", "")
    sheet = csv.DictReader(write_leaderboard(tmp_path, alone, None).read_text(encoding="utf-8").splitlines())
    assert {(line["reference"], line["vs_reference"]) for line in sheet} == {("", "")}
    shown = io.StringIO()
    render_leaderboard(alone, None, Console(file=shown, width=120, force_terminal=True, no_color=True))
    assert " vs " not in shown.getvalue()


def test_the_commands_of_a_study_whose_name_has_blanks_can_be_run(study, tmp_path):
    meta = dataclasses.replace(META, name="my study", folder="runs/my study")
    commands = [line for line in Page(render_report(tmp_path, study, meta)).code.splitlines() if line[:1] not in "# "]
    settings = [part for command in commands for part in shlex.split(command)]
    assert "study=my study" in settings
    assert "model=runs/my study/best" in settings


def test_the_winner_is_drawn_from_its_stored_architecture(study, tmp_path):
    from hybridnas.arch.arch import Arch

    folder = tmp_path / "trials" / "0048"
    folder.mkdir(parents=True)
    arch = Arch.from_pattern("(ME)x2", d_model=32, vocab_size=64, n_experts=4)
    (folder / "arch.json").write_text(json.dumps(arch.to_dict()))
    page = written(render_report(tmp_path, study, META))
    assert "It is not drawn" not in page
    own = page[page.index('<section class="trial" id="trial-48">') :]
    own = own[: own.index("</section>")]
    assert '<svg xmlns="http://www.w3.org/2000/svg"' in own
    assert "4 experts of " in own
    assert "python -m hybridnas.replay study=mamba_moe-laptop trial=48\n" in own


def test_every_trial_of_the_leaderboard_has_a_page_that_its_number_leads_to(study, page):
    shown = {str(one.number) for one in study if one.state != "INFEASIBLE"}
    assert set(re.findall(r'href="#trial-(\d+)"', page)) == set(re.findall(r'id="trial-(\d+)"', page)) == shown


def test_equal_records_give_equal_pages(study, page, tmp_path):
    assert written(render_report(tmp_path, list(study), META)) == page


def charts(page):
    found = re.findall(r'<script type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    return [json.loads(text) for text in found]


def test_charts_are_drawn_in_colors_that_turn_with_the_readers_scheme(page):
    drawn = charts(page)
    assert len(drawn) > 5
    sheet, known = css(), set(LIGHT.values())
    for chart in drawn:
        used = set(re.findall(r"#[0-9A-Fa-f]{6}", json.dumps(chart)))
        for color in used & known:
            channels = ", ".join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))
            assert f'[style*="stroke: rgb({channels})"]' in sheet
        traces = [trace for trace in chart["data"] if "meta" in trace]
        assert {trace["line"]["color"] for trace in traces if "line" in trace and "color" in trace["line"]} <= known


def test_a_curve_of_the_chart_is_that_of_the_record(study, page):
    lines = {trace["meta"]: trace for trace in charts(page)[0]["data"]}
    for one in study:
        if one.state in ("COMPLETE", "PRUNED"):
            assert list(zip(lines[one.number]["x"], lines[one.number]["y"], strict=True)) == one.points()
    named = {trace["meta"]: trace["name"] for trace in charts(page)[0]["data"] if trace["showlegend"]}
    assert set(named) == {0, 1, 2, 3, 4, 48}
    assert named[4].startswith("moe_mamba 1.54")


def test_a_preset_has_one_color_in_all_pictures(page):
    from hybridnas.draw.figure import preset_color, series_style

    lines = {trace["meta"]: trace["line"]["color"] for trace in charts(page)[0]["data"]}
    for number, name in enumerate(PRESETS):
        assert lines[number] == preset_color(name) == series_style(number + 3, name=name)["color"]
    assert len({preset_color(name) for name in PRESETS}) == len(PRESETS)


def with_limits(folder, **limits):
    identity = {"space": {}, "state_length": 4096, **limits}
    (folder / "study.json").write_text(json.dumps({"format": 2, "study": "s", "identity": identity}))


def of_state(number, loss, state_bytes, **fields):
    over = state_bytes > 1024
    fields |= {"violation": f"state_bytes={state_bytes} is above max_state_bytes=1,024"} if over else {}
    return record(number, loss, figures={"state_bytes": state_bytes}, objectives={"val_loss": loss}, **fields)


def test_the_report_names_the_limits_and_what_they_cost(tmp_path):
    with_limits(tmp_path, max_state_bytes=1024.0)
    drawn = [record(8, None, state="INFEASIBLE", figures={"state_bytes": one}, cost={"state_bytes": 4.0}, tokens=0,
                    reason=f"state_bytes={one} is above max_state_bytes=1,024") for one in (2000,)]  # fmt: skip
    records = [of_state(0, 1.5, 5000, preset="transformer"), of_state(1, 1.6, 900), *drawn]
    meta = dataclasses.replace(META, reference=None, state_length=4096)
    page = Page(written(render_report(tmp_path, records, meta)))
    assert page.title == "Within at most 1 KiB of state at 4,096 tokens, (ME)x4 is best, at 1.6000 nats per token"
    assert page.rows["1"][6] == "900"  # the state of every column and chart is that at 4,096 tokens
    nobody = Page(written(render_report(tmp_path, records[:1], meta))).title
    assert nobody.startswith("None of the one architecture that completed keeps at most ")
    assert nobody.endswith("transformer comes nearest, with 4.88 KiB")


def test_limits_that_were_measured_or_refused_draws_are_counted(tmp_path):
    with_limits(tmp_path, max_latency_ms=2.0, min_decode_tokens_per_second=100.0)
    kept = {"ms_per_token": 1.5, "decode_tokens_per_second": 99.0}
    records = [record(0, 1.6, figures=kept, within_spread=["min_decode_tokens_per_second"], refused={"requires": 3}),
               record(1, 1.5, figures={"ms_per_token": 2.5, "decode_tokens_per_second": 400.0},
                      violation="ms_per_token=2.5 is above max_latency_ms=2", preset="mamba")]  # fmt: skip
    page = written(render_report(tmp_path, records, dataclasses.replace(META, reference=None)))
    assert "at least 100 tokens/s while generating at 256 tokens, (ME)x4 is best" in Page(page).title
    assert "3 draws were refused: requires 3." in page
    assert "Met within the spread of the measurement alone: trial 0." in page
    assert "mamba, 2.5" in page
    assert Page(page).rows["0"][-3:-1] == ["1.5", "99.0"]  # what the limits are judged by stands beside the trials


def test_where_a_baseline_won_the_searchs_own_best_is_named():
    records = [record(0, 1.5, preset="moe_mamba"), record(1, 1.6), record(2, 1.7)]
    said = headline(records, "moe_mamba")
    assert said.endswith("; the best that the search drew, (ME)x4 (trial 1), is 0.1000 nats per token behind")


def test_a_report_of_a_search_that_runs_reads_itself_again_and_says_how_long(study, tmp_path):
    records = [record(0, 1.5, preset="moe_mamba", seconds=30.0), record(1, 1.6, seconds=30.0)]
    with_limits(tmp_path)
    page = written(render_report(tmp_path, records, dataclasses.replace(META, status="running", n_trials=22)))
    assert 'http-equiv="refresh"' in page
    assert "running: 2 of 22 trials, about 10 min left" in page
    assert "http-equiv" not in written(render_report(tmp_path, records, META))


def test_what_a_mixture_measures_on_each_task_is_in_the_report(tmp_path):
    aux = {"loss.text": 1.25, "accuracy.recall": 0.5}
    curve = [{"tokens": 10, "valid_loss": 1.5, "aux": aux}]
    page = Page(render_report(tmp_path, [record(0, 1.5, curve=curve)], META))
    assert page.rows["0"][-2:] == ["0.5", "1.25"]


def test_words_of_the_user_are_escaped(tmp_path):
    bad = record(0, None, state="FAIL", pattern="<b>", reason="<script>alert(1)</script>")
    page = written(render_report(tmp_path, [bad, record(1, 2.0, pattern="<i>x</i>")], StudyMeta(name="<u>")))
    assert "<script>alert" not in page
    assert "<i>x" not in page
    assert "<u>" not in page


@pytest.mark.parametrize(
    ("records", "start"),
    [
        ([], "No trial has completed yet"),
        ([record(0, None, state="FAIL", reason="out of memory")], "Nothing has completed: 1 trial failed"),
        ([record(0, 1.5, preset="moe_mamba")], "Only moe_mamba has completed"),
        ([record(0, 1.5, preset="moe_mamba"), record(1, 1.6)], "moe_mamba stays ahead of the other architecture"),
        ([record(0, 1.5, preset="moe_mamba"), record(1, 1.5 - 1e-6)], "(ME)x4 and moe_mamba end at the same loss"),
        ([record(1, 1.6)], "(ME)x4 is best, at 1.6000 nats per token"),
        ([record(0, None, state="PRUNED", preset="moe_mamba"), record(1, 1.6)], "(ME)x4 is best, at 1.6000"),
        (
            [record(0, None, state="INFEASIBLE", preset="moe_mamba"), record(1, 1.6)],
            "(ME)x4 is best, at 1.6000 nats per token (moe_mamba is outside the limits)",
        ),
    ],
)
def test_the_headline_claims_no_more_than_the_records_hold(records, start, tmp_path):
    assert headline(records, "moe_mamba").startswith(start)
    links(write_report(tmp_path, records, StudyMeta(name="s")).read_text(encoding="utf-8"))


def test_a_baseline_that_did_not_complete_is_named_and_not_compared_with(tmp_path):
    pruned = record(0, None, state="PRUNED", preset="moe_mamba", rungs=[[5, 2.0]], reason="stopped at rung 1")
    page = render_report(tmp_path, [pruned, record(1, 1.6)], META)
    assert "moe_mamba is pruned: stopped at rung 1; so no difference to it is stated." in page


def test_trials_are_ranked_completed_then_pruned_by_length_then_failed(study):
    found = rows(study, "moe_mamba")
    states = [row.record.state for row in found]
    assert states == sorted(states, key=["COMPLETE", "PRUNED", "FAIL", "INFEASIBLE", "DUPLICATE"].index)
    done = [row for row in found if row.rank]
    assert [row.loss for row in done] == sorted(row.loss for row in done)
    assert [row.rank for row in done] == list(range(1, len(done) + 1))
    pruned = [row for row in found if row.record.state == "PRUNED"]
    assert [row.record.tokens for row in pruned] == sorted((row.record.tokens for row in pruned), reverse=True)
    assert all(row.gap is None for row in pruned)
    assert found[0].gap == pytest.approx(1.5213 - 1.548)
    assert found[0].tokens_per_active == pytest.approx(TOKENS / found[0].record.cost["active_params"])


def test_the_csv_holds_exact_numbers_and_every_trial(study, tmp_path):
    lines = list(
        csv.DictReader(write_leaderboard(tmp_path, study, "moe_mamba").read_text(encoding="utf-8").splitlines())
    )
    assert len(lines) == len(study)
    first = lines[0]
    assert (first["rank"], first["trial"], first["state"]) == ("1", "48", "COMPLETE")
    assert float(first["valid_loss"]) == 1.5213
    assert int(first["params"]) == 6_400_000 + 90_000 * 48
    failed = next(line for line in lines if line["state"] == "FAIL")
    assert failed["reason"].startswith("loss is not finite")
    assert failed["rank"] == failed["valid_loss"] == ""


def test_a_pipe_gets_exact_lines_and_a_terminal_a_table_that_fits(study):
    piped = io.StringIO()
    render_leaderboard(study, "moe_mamba", Console(file=piped, width=80))
    lines = [line.split("\t") for line in piped.getvalue().splitlines()]
    assert len(lines) == len(study) + 1
    assert {len(line) for line in lines} == {len(leaderboard.CSV_COLUMNS)}
    for width in (80, 120, 160):
        shown = io.StringIO()
        render_leaderboard(
            study, "moe_mamba", Console(file=shown, width=width, force_terminal=True, no_color=True), limit=10
        )
        text = re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue())
        assert max(map(len, text.splitlines())) <= width
        assert "MM[M,E]" in text
        assert "-0.0267" in text
        assert "35 more in leaderboard.csv." in text
        assert "unconfirmed" in text


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, ""), (0, "0"), (999, "999"), (1000, "1k"), (26_288_128, "26.3M"), (416_358_400, "416M"),
     (999_600, "1M"), (2_454_110_208, "2.45B"), (1234.0, "1.23k")],
)  # fmt: skip
def test_counts_are_shown_in_three_figures(value, words):
    assert human(value) == words


def test_bytes_are_shown_in_three_figures():
    assert [human_bytes(value) for value in (None, 512, 8192, 1_572_864)] == ["", "512 B", "8 KiB", "1.5 MiB"]


def test_shares_times_and_counts_of_one_are_written_for_people():
    assert [percent(value) for value in (None, 0.0762, 1.0)] == ["", "7.6 %", "100.0 %"]
    assert [duration(value) for value in (None, 80, 200, 7000)] == ["", "80 s", "3 min", "1.9 h"]
    assert [several(1, "seed"), several(2, "seed")] == ["1 seed", "2 seeds"]
