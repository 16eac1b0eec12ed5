"""Suites: small trainings end to end, results that resume, published rows as printed, and accuracy by length."""

import math
from dataclasses import replace

import fsspec
import pytest
import torch

from hybridnas.analysis.rung_correlation import rank_correlation
from hybridnas.arch.arch import Arch
from hybridnas.cli import run as run_cli
from hybridnas.cli.compose import read_settings
from hybridnas.cli.suites import preset_sizes
from hybridnas.errors import ConfigError, StudyError
from hybridnas.suites import headline, induction_heads, mad, mqar, plots, results, selective_copying, speed
from hybridnas.suites.results import CurveRow, LengthRow, Row
from hybridnas.suites.runner import Runner, even_points, run_suite
from hybridnas.suites.suite import SUITES, Entry, Published, Suite, SuiteConfig, Task

TINY = {"seq_len": 16, "batch_size": 4, "tokens": 256, "valid_tokens": 64}


def toy(**fields):
    task = Task(
        name="recall",
        column="recall",
        data={"kind": "in_context_recall", "seq_len": 16, "n_test_examples": 8},
        train=TINY,
        measurements=2,
    )
    given = {
        "name": "toy",
        "title": "Toy",
        "tasks": (task,),
        "entries": (Entry(name="mamba", pattern="M", fields={"d_model": 8}),),
        "rates": (1e-3, 1e-2),
        "published": (Published(model="Theirs", values={"recall": 12.5}, source="Table 0", settings="width 1"),),
    }
    return Suite(**{**given, **fields})


def run(suite, folder, **fields):
    news = []
    given = {"folder": folder / "runs", "out": folder / "toy.csv", "tracking": "off", "device": "cpu"}
    runner = Runner(suite, suite.expanded([], {}), report=news.append, **{**given, **fields})
    return runner.run(), news


def row(**fields):
    given = {"suite": "toy", "quick": False, "model": "a", "task": "recall", "column": "recall", "lr": 1e-3,
             "weight_decay": 0.0, "seed": 0, "status": "completed", "score": 0.5}  # fmt: skip
    return Row(**{**given, **fields})


def test_a_suite_trains_the_grid_and_a_second_call_trains_nothing(tmp_path):
    suite = toy(seeds=(0, 1), decays=(0.0, 0.1))
    outcome, news = run(suite, tmp_path)
    assert outcome.done
    grid = {(r.lr, r.weight_decay) for r in outcome.rows if r.seed == 0}
    assert grid == {(1e-3, 0.0), (1e-3, 0.1), (1e-2, 0.0), (1e-2, 0.1)}
    best = results.best_setting(outcome.rows, suite)
    assert [(r.lr, r.weight_decay) for r in outcome.rows if r.seed == 1] == [best]
    assert {(r.lr, r.weight_decay) for r in outcome.rows if r.chosen} == {best}
    assert len(news) == 5
    assert len(list(tmp_path.glob("runs/mamba/recall/*/run.json"))) == 5
    assert not list(tmp_path.glob("runs/**/*.safetensors"))  # nobody asks for the weights
    again, silence = run(suite, tmp_path)
    assert again.rows == outcome.rows
    assert silence == []


def test_a_suite_that_was_stopped_goes_on_inside_its_runs(tmp_path):
    suite = toy(rates=(1e-3,))
    stopped, _ = run(suite, tmp_path, minutes=1e-9)
    assert (stopped.done, stopped.rows) == (False, [])
    outcome, _ = run(suite, tmp_path)
    (tmp_path / "toy.csv").unlink()  # the CSV is lost, the run is not: it is read again, not trained again
    stamp = next(tmp_path.glob("runs/mamba/recall/*/metrics.jsonl")).stat().st_mtime_ns
    again, _ = run(suite, tmp_path)
    assert again.rows == outcome.rows
    assert next(tmp_path.glob("runs/mamba/recall/*/metrics.jsonl")).stat().st_mtime_ns == stamp


def test_rows_of_other_architectures_stay_and_those_of_other_settings_do_not_mix(tmp_path):
    run(toy(), tmp_path)
    other = toy(entries=(Entry(name="attention", pattern="A", fields={"d_model": 8}),))
    outcome, _ = run(other, tmp_path)
    assert {r.model for r in outcome.rows} == {"mamba", "attention"}
    longer = replace(other.tasks[0], train={**TINY, "tokens": 320})
    outcome, _ = run(replace(other, tasks=(longer,)), tmp_path)
    assert {(r.model, r.tokens) for r in outcome.rows} == {("attention", 320)}
    again, silence = run(other, tmp_path)  # the rows of the former settings were kept
    assert {(r.model, r.tokens) for r in again.rows} == {("mamba", 256), ("attention", 256)}
    assert silence == []


def test_two_processes_may_fill_one_csv(tmp_path):
    suite = toy(rates=(1e-3,))
    other = toy(rates=(1e-3,), entries=(Entry(name="attention", pattern="A", fields={"d_model": 8}),))
    given = {"folder": tmp_path / "runs", "out": tmp_path / "toy.csv", "tracking": "off", "device": "cpu"}
    first = Runner(suite, suite.expanded([], {}), **given)  # has read the CSV before the second writes
    run(other, tmp_path)
    assert {r.model for r in first.run().rows} == {"mamba", "attention"}
    assert {point.model for point in results.read_curves(tmp_path / "toy-curves.csv")} == {"mamba", "attention"}


def test_a_failed_run_is_a_row_with_its_reason_and_never_the_best(tmp_path):
    outcome, news = run(toy(rates=(1e-3, 1e30)), tmp_path)
    failed = next(r for r in outcome.rows if r.lr == 1e30)
    assert failed.status == "failed"
    assert failed.score is None
    assert "lower train.lr" in failed.reason
    assert failed.reason in news[1]
    assert [r.lr for r in outcome.rows if r.chosen] == [1e-3]
    assert results.table(outcome.rows, toy())[1][0][-1].endswith("1 of 2 runs failed")


def test_accurate_enough_ends_a_run_early(tmp_path):
    outcome, _ = run(toy(stop_at=0.0), tmp_path)
    assert {(r.status, r.tokens) for r in outcome.rows} == {("stopped", 128)}


def test_the_best_setting_is_the_best_score_and_among_equals_the_fewest_tokens():
    suite = toy()
    rows = [row(lr=1e-3, score=0.9, tokens=200), row(lr=1e-2, score=0.9, tokens=100), row(lr=1.0, score=0.1)]
    assert results.best_setting(rows, suite) == (1e-2, 0.0)
    losses = replace(suite, score="valid_loss")
    assert results.best_setting(rows, losses) == (1.0, 0.0)
    assert results.best_setting([row(status="failed"), row(seed=3)], suite) is None


def test_a_score_is_the_mean_over_seeds_of_the_best_setting_then_over_a_columns_tasks():
    suite = toy(tasks=(*toy().tasks, replace(toy().tasks[0], name="harder")))
    rows = [row(score=0.2), row(lr=1e-2, score=0.6), row(lr=1e-2, score=0.8, seed=1), row(task="harder", score=0.1)]
    assert results.scores(rows, suite) == {"a": {"recall": pytest.approx((0.7 + 0.1) / 2)}}
    assert results.scores(rows[:3], suite) == {}  # half a column is no score


def test_the_table_puts_published_rows_with_source_and_settings_under_ours():
    columns, lines = results.table([row(score=0.25)], toy())
    assert columns == ["model", "recall", "settings"]
    assert lines == [["a", "25.0", "ours: lr 0.001, 1 seed"], ["Theirs [published]", "12.5", "Table 0; width 1"]]


def test_rows_survive_the_csv(tmp_path):
    suite = toy()
    rows = [row(chosen=True, settings=suite.tasks[0].digest, reason='a "quoted", reason', accuracy=None, tokens=7)]
    results.write_rows(tmp_path / "x.csv", rows)
    assert results.read_rows(tmp_path / "x.csv", suite) == rows
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(StudyError, match=r"x\.csv line 2 is not a row of Row"):
        results.read_rows(tmp_path / "x.csv", suite)


@pytest.mark.parametrize(
    ("one", "other", "rho"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
        ([1, 1, 2], [1, 1, 2], 1.0),
        ([1, 1], [1, 2], None),
        ([], [], None),
    ],
)
def test_rank_correlation(one, other, rho):
    found, _ = rank_correlation(one, other)
    assert found is None if rho is None else found == pytest.approx(rho)


def test_two_versions_of_a_suite_are_compared_where_both_have_measured():
    one = {"a": {"x": 0.1, "y": 0.5}, "b": {"x": 0.2, "y": 0.3}, "c": {"x": 0.3}}
    other = {"a": {"x": 0.5, "y": 0.5}, "b": {"x": 0.6, "y": 0.9}, "c": {"x": 0.9, "y": 1.0}}
    found = results.agreement(one, other)
    assert found == [["x", 3, pytest.approx(1.0)], ["y", 2, pytest.approx(-1.0)], ["average", 2, pytest.approx(-1.0)]]


def test_the_share_of_a_baselines_steps_is_read_off_the_curve():
    suite = toy(score="valid_loss", baseline="mamba")
    rows = [row(model="mamba", score=1.0, valid_loss=1.0, tokens=100, folder="m"),
            row(model="moe", score=0.8, valid_loss=0.8, tokens=100, folder="e"),
            row(model="slow", score=1.5, valid_loss=1.5, tokens=100, folder="s")]  # fmt: skip
    about = {"task": "recall", "lr": 1e-3, "weight_decay": 0.0, "seed": 0, "train_loss": 0.0, "accuracy": 0.0}
    curves = [CurveRow(model="moe", folder="e", tokens=t, valid_loss=x, **about) for t, x in ((25, 1.4), (75, 0.6))]
    curves += [CurveRow(model="mamba", folder="m", tokens=100, valid_loss=1.0, **about)]
    assert speed.shares(rows, curves, suite) == {"mamba": [1.0], "moe": [0.5], "slow": [None]}
    columns, lines = speed.table(rows, curves, suite)
    assert columns[-2:] == ["share of mamba's steps", "speed-up"]
    assert [line[-2:] for line in lines] == [["50 %", "2.00x"], ["100 %", "1.00x"], ["not reached", "-"]]


def test_the_published_rows_are_the_printed_figures():
    table = {r.model: r.values for r in mad.TABLE}
    assert [table["Mamba"][c] for c in mad.COLUMNS] == [52.7, 6.7, 90.4, 89.5, 90.1, 86.3]
    assert {name: values["average"] for name, values in table.items()} == {
        "Transformer": 74.5, "Hyena": 66.0, "multi-head Hyena": 73.2, "Mamba": 69.3, "GLA": 60.0, "DeltaNet": 71.8,
        "Mamba, rerun": 67.3,
    }  # fmt: skip
    for values in table.values():  # the printed average is the mean of the printed figures
        assert sum(values[c] for c in mad.COLUMNS) / 6 == pytest.approx(values["average"], abs=0.06)
    eleven = {r.model: r.values for r in induction_heads.TABLE_11}
    assert set(eleven["Mamba"].values()) == {100}
    assert len(eleven["Mamba"]) == 15
    assert (eleven["MHA-RoPE"]["2^9"], eleven["MHA-RoPE"]["2^14"]) == (83.6, 5.5)
    assert "2^15" not in eleven["MHA-Abs"]
    assert eleven["H3"]["2^20"] == 7.4
    one = {r.model: r.values["length 4096"] for r in selective_copying.TABLE_1}
    assert one == {"S4, no gate": 18.3, "S6, no gate": 97.0, "H3 block, S4": 57.0, "H3 block, Hyena": 30.1,
                   "H3 block, S6": 99.7, "Mamba block, S4": 56.4, "Mamba block, Hyena": 28.4,
                   "Mamba block, S6": 99.8}  # fmt: skip
    shares = {r.model: r.values.get("% of Mamba's steps, v1") for r in headline.HEADLINE}
    assert shares["MoE-Mamba"] == 46
    speeds = {r.model: r.values.get("speed-up, v2") for r in headline.HEADLINE}
    assert (speeds["MoE-Mamba-25M"], speeds["Transformer-MoE-25M"]) == (1.76, 1.56)
    ablated = {r.model: r.values["perplexity, 350M"] for r in headline.ABLATIONS}
    assert (ablated["selective: none"], ablated["selective: dt+B+C"]) == (10.93, 8.71)
    assert (ablated["selective: B+C"], ablated["Delta rank 4"]) == (9.12, 8.91)
    assert (ablated["N 1, B and C selective"], ablated["N 8, B and C constant"]) == (9.73, 9.82)
    assert {r.values[next(iter(r.values))] for r in mqar.METALA} == {99.0, 0.0, 28.5, 90.4}


def test_mad_has_its_66_settings_and_six_optimiser_settings():
    suite = mad.mad(quick=False)
    counts = {column: sum(t.column == column for t in suite.tasks) for column in mad.COLUMNS}
    assert counts == dict(zip(mad.COLUMNS, (11, 11, 11, 6, 14, 13), strict=True))
    assert len(suite.tasks) * len(suite.rates) * len(suite.decays) == 396
    assert suite.rates == (1e-4, 5e-4, 1e-3)
    longest = next(t for t in suite.tasks if t.name == "noisy recall, seq_len 1024")
    assert longest.data["frac_noise"] == 0.2
    assert longest.train["tokens"] == 200 * 12_800 * 1024
    assert len(mad.mad(quick=True).tasks) == 6


def test_the_rank_correlation_of_a_quick_version_is_one_command(tmp_path, capsys):
    def write(quick, figures):
        suite = mad.mad(quick)
        rows = [row(model=model, task=task.name, column=task.column, settings=task.digest, score=score)
                for model, score in figures.items() for task in suite.tasks]  # fmt: skip
        results.write_rows(tmp_path / f"{quick}.csv", rows)
        return tmp_path / f"{quick}.csv"

    full = write(False, {"a": 0.9, "b": 0.8, "c": 0.3, "d": 0.2})
    quick = write(True, {"a": 0.5, "b": 0.6, "c": 0.4, "e": 0.9})
    assert run_cli(["evaluate", "suite=mad", "suite.quick=true", f"suite.out={quick}", f"suite.against={full}"]) == 0
    table = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["column", "models", "Spearman"]
    assert table[1:] == [[column, "3", "0.500"] for column in (*mad.COLUMNS, "average")]


@pytest.mark.parametrize("name", list(SUITES))
@pytest.mark.parametrize("quick", [False, True])
def test_every_suite_can_be_begun(name, quick):
    from hybridnas.data import source_config
    from hybridnas.train.config import TrainConfig

    suite = SUITES.get(name)(quick)
    assert len({task.digest for task in suite.tasks}) == len(suite.tasks)
    for task in suite.tasks:
        config = source_config(task.data)
        assert getattr(config, "seq_len", task.train["seq_len"]) == task.train["seq_len"]  # a text has any
        tokens = task.train.get("tokens", 1_000_000)
        TrainConfig.from_dict({**task.train, "tokens": tokens, "lr": suite.rates[0]})
    names = [entry.name for entry in suite.expanded([], {})]
    assert len(set(names)) == len(names)
    assert {name for entry in suite.entries for name in entry.tasks} <= {task.name for task in suite.tasks}
    every = [task.name for task in suite.tasks]
    prints = [(e.arch(256).fingerprint(), task) for e in suite.expanded([], {}) for task in e.tasks or every]
    assert len(set(prints)) == len(prints)  # none is trained under two names: its row would have one of them
    for entry in suite.expanded([], {}):
        arch = entry.arch(256)
        if entry.active_params:
            assert arch.cost().active_params == pytest.approx(entry.active_params, rel=0.003)


@pytest.mark.parametrize("quick", [False, True])
def test_the_second_study_of_the_mixers_has_equal_states_and_equal_active_parameters(quick):
    suite = SUITES.get("history_state")(quick)
    costs = [entry.arch(64).cost(suite.tasks[-1].train["seq_len"] if quick else 256) for entry in suite.entries]
    middle = sorted(cost.state_bytes for cost in costs)[len(costs) // 2]
    assert len(costs) > 10
    for cost in costs:
        assert cost.state_bytes == pytest.approx(middle, rel=0.05)
        assert cost.active_params == pytest.approx(costs[0].active_params, rel=0.01)


def test_the_headlines_target_is_the_mamba_of_its_width():
    entries = {entry.name: entry for entry in headline.headline(False).entries}
    assert entries["mamba"].arch(256).cost().active_params == headline.MAMBA_ACTIVE
    assert [name for name, entry in entries.items() if entry.seeds is None] == ["mamba", "moe_mamba"]


def test_what_the_user_names_is_matched_where_the_suite_matches():
    suite = headline.headline(False)
    named = suite.expanded(["(ME)x2", "Mx3", "(MF)x2"], {})
    assert [entry.free for entry in named] == [("d_expert",), ("d_inner",), ("d_ff",)]
    for entry in named:
        assert entry.arch(256).cost().active_params == pytest.approx(headline.MAMBA_ACTIVE, rel=0.02)


def test_sizes_given_to_a_preset_reach_it_and_its_own_leave_the_choice_to_the_suite():
    config = read_settings("evaluate", ["suite=mad", "preset=moe_mamba", "preset.n_blocks=2", "preset.n_experts=4"])
    assert preset_sizes(config) == {"n_blocks": 2, "n_experts": 4}
    (entry,) = toy(fields={"d_model": 16}).expanded(["moe_mamba"], preset_sizes(config))
    arch = entry.arch(16)
    assert (str(arch.pattern), arch.d_model) == ("MEME", 16)


def test_a_sweep_reaches_the_sizes_that_a_pattern_has_and_repeats_none():
    suite = toy(variants=tuple({"d_model": d, "d_state": n} for d in (8, 16) for n in (2, 4)), entries=())
    names = [entry.name for entry in suite.expanded(["M", "A"], {})]
    assert names == ["M, d_model 8, d_state 2", "M, d_model 8, d_state 4", "M, d_model 16, d_state 2",
                     "M, d_model 16, d_state 4", "A, d_model 8", "A, d_model 16"]  # fmt: skip
    (given,) = suite.expanded(["A"], {"d_model": 24})
    assert given.arch(16).d_model == 24


def test_an_architecture_may_learn_some_of_a_suites_tasks_alone(tmp_path):
    one = toy().tasks[0]
    two = replace(one, name="longer", column="longer", train={**TINY, "tokens": 320})
    both = Entry(name="mamba", pattern="M", fields={"d_model": 8})
    some = Entry(name="attention", pattern="A", fields={"d_model": 8}, tasks=("longer",))
    outcome, news = run(toy(tasks=(one, two), entries=(both, some), rates=(1e-3,)), tmp_path)
    assert [(r.model, r.task) for r in outcome.rows] == [
        ("mamba", "recall"), ("mamba", "longer"), ("attention", "longer")
    ]  # fmt: skip
    assert news[-1].startswith("[3/3] ")


def test_a_task_gives_every_architecture_the_flops_of_its_reference(tmp_path):
    task = replace(toy().tasks[0], flops_of="M", train={**TINY, "tokens": 3200})
    wide = Entry(name="wide", pattern="M", fields={"d_model": 16})
    suite = toy(tasks=(task,), rates=(1e-3,), fields={"d_model": 8}, entries=(*toy().entries, wide))
    outcome, _ = run(suite, tmp_path)
    flops = [row.tokens * suite.expanded([], {})[i].arch(16).cost(16).flops_per_token
             for i, row in enumerate(outcome.rows)]  # fmt: skip
    assert outcome.rows[0].tokens == 3200 > 2 * outcome.rows[1].tokens
    assert flops[1] == pytest.approx(flops[0], rel=64 / outcome.rows[1].tokens)  # a step more at most
    assert task.digest != replace(task, flops_of=None).digest
    with pytest.raises(ConfigError) as error:
        run_suite(suite, Lookup, folder=tmp_path / "own", device="cpu")
    assert (error.value.field, error.value.got) == ("model", "Lookup")


def genome(folder):
    letters = torch.randint(4, (6000,), generator=torch.Generator().manual_seed(0)).tolist()
    folder.mkdir(exist_ok=True)
    (folder / "g.fa").write_text(">one\n" + "".join("ACGT"[letter] for letter in letters) + "\n")
    return folder / "g.fa"


def test_a_suite_reads_files_where_they_lie_and_says_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDNAS_CACHE", str(tmp_path / "cache"))
    data = {"kind": "dna", "path": str(tmp_path / "absent" / "g.fa"), "split_by": "segment"}
    task = Task(name="16", column="16", data=data, train={**TINY, "tokens": 64})
    suite = toy(tasks=(task,), rates=(1e-3,), files="a genome: apt-get install it", figure="contexts",
                score="valid_loss", unit="base", published=())  # fmt: skip
    with pytest.raises(ConfigError) as error:
        run(suite, tmp_path)
    assert (error.value.field, error.value.allowed) == ("suite.path", "a genome: apt-get install it")
    here = SuiteConfig(name="toy", path=str(genome(tmp_path / "here"))).applied(suite)
    elsewhere = SuiteConfig(name="toy", path=str(genome(tmp_path / "elsewhere"))).applied(suite)
    outcome, _ = run(here, tmp_path)
    assert [task.digest for task in here.tasks] == [task.digest for task in elsewhere.tasks]
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/afar/g.fa", (tmp_path / "here" / "g.fa").read_bytes())
    afar = SuiteConfig(name="toy", path="memory://afar/g.fa").applied(suite)
    assert run(afar, tmp_path / "afar")[0].rows[0].valid_loss == outcome.rows[0].valid_loss
    memory.store.clear()
    svg, _ = plots.draw(here, outcome, tmp_path / "drawn.csv")
    assert "<!-- mamba -->" in svg.read_text() and "<!-- validation loss [bits/base] -->" in svg.read_text()
    _, lines = results.table(outcome.rows, here)
    assert float(lines[0][1]) == pytest.approx(outcome.rows[0].valid_loss / math.log(2), abs=1e-4)
    with pytest.raises(ConfigError) as error:
        SuiteConfig(name="toy", path="x.fa").applied(toy())
    assert (error.value.field, error.value.got) == ("suite.path", "x.fa")


class Lookup(torch.nn.Module):
    """A module of somebody's own: logits of the next id from the present one."""

    def __init__(self, vocab_size, width=8):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, width)
        self.out = torch.nn.Linear(width, vocab_size)

    def forward(self, ids):
        return self.out(self.embedding(ids))


def test_a_module_of_ones_own_is_scored_and_not_trained_twice(tmp_path):
    asked = []

    def mine(vocab_size):
        asked.append(vocab_size)
        return Lookup(vocab_size)

    given = {"folder": tmp_path / "own", "device": "cpu", "seeds": [0, 1]}
    outcome = run_suite(toy(), mine, **given)
    assert outcome.done
    assert set(asked) == {16}
    assert {(r.model, r.pattern, r.params) for r in outcome.rows} == {("mine", "", 16 * 8 + 8 * 16 + 16)}
    assert sorted(r.seed for r in outcome.rows) == [0, 0, 1]
    assert set(outcome.scores) == {"mine"}
    assert len({r.fingerprint for r in outcome.rows}) == 1
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "own").rglob("metrics.jsonl")}
    again = run_suite(toy(), mine, **given)
    assert again.rows == outcome.rows
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    both = run_suite(toy(fields={"d_model": 8}), {"wide": lambda v: Lookup(v, 16), "M": "M"}, **{**given, "seeds": [0]})
    assert {r.model for r in both.rows} == {"mine", "wide", "M"}


def test_a_published_suite_takes_a_module_an_architecture_and_a_pattern(tmp_path):
    arch = Arch.from_pattern("A", d_model=8, vocab_size=2)
    models = {"own": Lookup, "arch": arch, "pattern": "M"}
    given = {"quick": True, "rates": [0.01], "tasks": ["memorise"], "tokens": 4096, "folder": tmp_path, "device": "cpu"}
    outcome = run_suite("mad", models, **given)
    assert {r.model: r.pattern for r in outcome.rows} == {"own": "", "arch": "A", "pattern": "M"}
    assert {r.suite for r in outcome.rows} == {"mad"}


def test_what_is_no_model_or_setting_is_refused(tmp_path):
    for model, got in ((3, "int"), (lambda vocab_size: "M", "str")):
        with pytest.raises(ConfigError) as caught:
            run_suite(toy(), model, folder=tmp_path, device="cpu")
        assert (caught.value.field, caught.value.got) == ("model", got)
    with pytest.raises(ConfigError):
        run_suite("mda", Lookup, folder=tmp_path)
    with pytest.raises(ConfigError):
        run_suite("mad", Lookup, folder=tmp_path, quik=True)


def test_even_points():
    assert even_points(100, 4) == (25, 50, 75, 100)
    assert even_points(2, 4) == (1, 2)


def test_a_suite_with_lengths_keeps_weights_and_measures_the_chosen_run(tmp_path):
    task = Task(
        name="induction", column="16", data={"kind": "induction_heads", "seq_len": 16}, train=TINY, lengths=(16, 32)
    )
    suite = toy(tasks=(task,), figure="lengths", published=induction_heads.TABLE_11)
    outcome, _ = run(suite, tmp_path)
    assert [(r.model, r.length) for r in outcome.lengths] == [("mamba", 16), ("mamba", 32)]
    assert results.read_lengths(tmp_path / "toy.csv") == outcome.lengths
    chosen = next(r for r in outcome.rows if r.chosen)
    assert (tmp_path / "runs" / chosen.folder / "checkpoint.safetensors").is_file()
    columns, lines = results.length_table(outcome.lengths, suite)
    assert columns == ["model", "2^4", "2^5", "settings"]
    assert lines[0][0] == "mamba"
    again, silence = run(suite, tmp_path)
    assert [r.length for r in again.lengths] == [16, 32]
    assert silence == []
    assert (tmp_path / "toy-runs.csv").is_file()
    longer, _ = run(replace(suite, tasks=(replace(task, train={**TINY, "tokens": 320}),)), tmp_path)
    chosen = next(r for r in longer.rows if r.chosen)
    assert [(r.folder, r.length) for r in longer.lengths] == [(chosen.folder, 16), (chosen.folder, 32)]
    assert len(results.read_lengths(tmp_path / "toy.csv")) == 4  # of both trainings; those of one are tabulated


def test_rows_of_lengths_say_words_where_there_is_no_accuracy():
    rows = [LengthRow(model="a", task="recall", seed=0, length=64, accuracy=0.5),
            LengthRow(model="a", task="recall", seed=0, length=100, accuracy=None, words="out of memory")]  # fmt: skip
    columns, lines = results.length_table(rows, toy(published=()))
    assert columns == ["model", "2^6", "100", "settings"]
    assert lines == [["a", "50.0", "out of memory", "ours: recall, seed 0"]]


@pytest.mark.parametrize(
    ("figure", "words"),
    [("tasks", "mamba"), ("widths", "mamba; recall"), ("state", "mamba"), ("curves", "training tokens")],
)
def test_each_kind_of_figure_shows_what_was_measured(tmp_path, figure, words):
    elsewhere = Published(model="Theirs", values={"another length": 12.5}, source="Table 0", settings="width 1")
    suite = toy(figure=figure, published=(elsewhere,))
    outcome, _ = run(suite, tmp_path)
    svg, png = plots.draw(suite, outcome, tmp_path / "drawn.csv")
    assert f"<!-- {words} -->" in svg.read_text()
    assert "published" not in svg.read_text()  # the row has no figure for this column: it is in the table alone
    assert png.read_bytes().startswith(b"\x89PNG")
