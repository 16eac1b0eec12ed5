"""Benchmarks: the method against numbers worked out by hand, the words, and every suite once at shapes of no size."""

import json
import sys

import pytest
import torch

from hybridnas.bench import child, chosen, floor, method, models, peers, plain
from hybridnas.bench import run as run_suites
from hybridnas.bench.context import LONG, SUITES, BenchConfig, provenance
from hybridnas.bench.method import Form, Spread, measure, ratios
from hybridnas.bench.result import Result, goal_rows, met_text, ratio_rows, ratio_text, seconds_text, timed_rows
from hybridnas.bench.suites import gpu, gpu_models, lengths, roofline, scan
from hybridnas.cli.bench import run as run_command
from hybridnas.cli.compose import read_settings
from hybridnas.cli.help import help_text
from hybridnas.errors import ConfigError
from hybridnas.files import write_json
from hybridnas.kernels.cross_entropy import linear_cross_entropy

BENCH_EXTRA = "mambapy is not installed: pip install hybridnas[bench]"


class Clock:
    """Time that passes only where a form spends it."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def form(self, name, *seconds, **options):
        costs = iter(seconds)

        def run():
            self.log.append(name)
            self.now += next(costs)

        return Form(name, run, **options)


@pytest.fixture
def in_process(monkeypatch):
    """Children that are no processes: a fresh Python that imports torch takes seconds."""

    def measured(function, arguments, **_):
        module, _, name = function.partition(":")
        value = getattr(sys.modules.get(module) or __import__(module, fromlist=["x"]), name)(**arguments)()
        return child.Child(0.5, 2**20, 2**28, value, "")

    monkeypatch.setattr(child, "measured", measured)


def test_rounds_interleave_the_forms_after_one_warm_up_of_each():
    clock = Clock()
    forms = [clock.form("a", 9, 1, 2, 3), clock.form("b", 9, 10, 20, 30)]
    times = measure(forms, 3, clock=clock)
    assert clock.log == ["a", "b", "a", "b", "a", "b", "a", "b"]
    assert times == {"a": [1, 2, 3], "b": [10, 20, 30]}


def test_a_slow_form_takes_part_in_the_first_rounds_only_and_is_not_warmed_up():
    clock = Clock()
    forms = [clock.form("a", 9, 1, 2, 3), clock.form("slow", 50, rounds=1, warm=False)]
    times = measure(forms, 3, clock=clock)
    assert clock.log == ["a", "a", "slow", "a", "a"]
    assert ratios(times["slow"], times["a"]) == [50.0]


def test_a_short_form_is_called_until_a_sample_lasts_long_enough():
    clock = Clock()
    times = measure([clock.form("a", 9, *[0.25] * 13)], 3, shortest=1.0, clock=clock)
    assert len(clock.log) == 1 + 1 + 3 * 4  # to warm up, to see how long it takes, four calls a sample
    assert times == {"a": [0.25] * 3}


def test_a_form_may_measure_itself_and_a_queue_is_waited_for_before_each_look_at_the_clock():
    waits = []
    times = measure([Form("own", lambda: 7.0)], 2, clock=Clock(), settle=lambda: waits.append(1))
    assert times == {"own": [7.0, 7.0]}
    assert len(waits) == 2 * (1 + 2)


def test_a_spread_is_median_quartiles_and_extremes():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 1.0, 2.0, 4.0, 5.0, 5)
    assert Spread.of([1.0, 2.0, 3.0, 10.0]) == (2.5, 1.0, 1.75, 4.75, 10.0, 4)
    assert Spread.of([6.0]) == (6.0, 6.0, 6.0, 6.0, 6.0, 1)


def test_ratios_are_taken_pair_by_pair_and_medians_are_never_divided():
    result = Result("x")
    result.add("case", {"peer": [10.0, 40.0, 90.0], "ours": [1.0, 10.0, 10.0]})
    spread = result.ratio("case", "peer", "ours")  # 10, 4, 9; the medians' ratio would be 4
    assert spread == (9.0, 4.0, 6.5, 9.5, 10.0, 3)
    assert [(r.of, r.over) for r in result.ratios] == [("peer", "ours")]
    result.ratio("case", "peer", "ours")
    assert len(result.ratios) == 1


def test_goals_say_whether_they_are_met_and_what_is_missing_where_nothing_was_measured():
    result = Result("x")
    result.add("c", {"peer": [10.0, 12.0], "ours": [1.0, 1.0]})
    result.missing("c", "other", BENCH_EXTRA)
    for rule, bound, of, over in (
        ("at least", 11, "peer", "ours"),
        ("at least", 11.5, "peer", "ours"),
        ("at most", 11, "peer", "ours"),
        ("at most", 0.05, "ours", "peer"),
        ("at least", 5, "other", "ours"),
    ):
        result.goal(rule, bound, case="c", of=of, over=over, what="scan", against=of)
    assert [goal.met for goal in result.goals] == [True, False, True, False, None]
    assert goal_rows([result])[0] == ["scan", "peer", "at least 11x", "11x (10.5-11.5)", "met", ""]
    assert goal_rows([result])[-1] == ["scan", "other", "at least 5x", "", "not measured", BENCH_EXTRA]
    with pytest.raises(ConfigError, match="'at least' or 'at most', got 'about'"):
        result.hold("about", 1, None, what="", against="")


def test_times_and_ratios_are_written_in_three_figures():
    assert [seconds_text(x) for x in (12.345, 0.01234, 4.2e-6, 0.1236, 0.0)] == [
        "12.3 s", "12.3 ms", "4.2 us", "124 ms", "0 us",
    ]  # fmt: skip
    assert ratio_text(Spread.of([123.4, 5.678, 9.0])) == "9x (7.34-66.2)"
    assert ratio_text(Spread.of([2.5])) == "2.5x (one pair)"
    assert ratio_text(None) == ""
    assert [met_text(x) for x in (True, False, None)] == ["met", "not met", "not measured"]


def test_a_missing_peer_is_named_with_its_extra_in_the_table_and_in_the_goal(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda name: False)
    [result] = run_suites(BenchConfig(suite="scan", tiny=True))
    rows = {(row[0], row[1]): row for row in timed_rows(result)}
    row = rows["(B,D,L,N)=(1,16,16,4) fwd+bwd", scan.MAMBAPY]
    assert row[2:] == ["", "", "", "", BENCH_EXTRA]
    assert "transformers is not installed: pip install hybridnas[bench]" in rows[row[0], scan.HF][-1]
    goals = {goal.against: goal for goal in result.goals}
    assert goals["mambapy's pscan"].met is None
    assert goals["mambapy's pscan"].note == BENCH_EXTRA
    assert any(r.over == scan.FLOOR for r in result.ratios) or floor.unavailable()
    assert peers.absent("mamba_ssm") == "mamba-ssm is not installed: pip install mamba-ssm"


# suites that train, search, or start processes
SEARCHING = {"coordinates", "fleet", "grafting", "interop", "samplers", "truth", "verdicts"}
TINY = [  # gpu asks for a GPU; lengths are measured below, with their drawing
    pytest.param(name, marks=[pytest.mark.slow] * (name in SEARCHING) + [pytest.mark.long] * (name == "verdicts"))
    for name in SUITES
    if name not in ("gpu", "lengths")
]


@pytest.mark.parametrize("name", TINY)
def test_every_suite_runs_at_shapes_of_no_size_and_fits_into_json(name, in_process, tmp_path):
    config = BenchConfig(suite=name, tiny=True, out=str(tmp_path / "r.json"), keep_memory=False)
    [result] = run_suites(config)
    read = as_written(result, tmp_path)
    if name not in (
        "roofline",
        "first",
        "conv",
        "table",
        "fidelity",
        "truth",
        "decisions",
        "coordinates",
        "grafting",
        "interop",
        "verdicts",
    ):
        assert read["goals"]


def as_written(result, folder):
    """Return a result as its file has it, with every part as it has to be."""
    write_json(folder / "r.json", result.to_dict())
    read = json.loads((folder / "r.json").read_text())
    assert set(read) == {"suite", "seconds", "timed", "ratios", "goals", "tables", "notes", "files"}
    assert read["timed"] or read["tables"]
    for row in read["timed"]:
        assert row["note"] if row["spread"] is None else row["spread"]["low"] > 0
    for ratio in read["ratios"]:
        assert set(ratio) == {"case", "of", "over", "spread"}
        assert ratio["spread"]["q1"] <= ratio["spread"]["median"] <= ratio["spread"]["q3"]
    for goal in read["goals"]:
        assert goal["met"] is None and goal["note"]  # tiny shapes decide nothing
        assert goal["goal"].startswith(("at least ", "at most "))
    for table in read["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    return read


@pytest.mark.parametrize(
    ("name", "of", "over"), [("scan", scan.MAMBAPY, scan.OURS), ("step", models.TRANSFORMER, models.MAMBA)]
)
def test_a_suite_that_tunes_malloc_measures_again_without_and_labels_it(name, of, over, in_process):
    pytest.importorskip("mambapy")
    suite = __import__(f"hybridnas.bench.suites.{name}", fromlist=["run"])
    tuned, as_it_comes = (suite.run(BenchConfig(suite=name, tiny=True, keep_memory=keep)) for keep in (True, False))
    labelled = [r.case for r in tuned.ratios if r.case.endswith(", default malloc") and r[1:3] == (of, over)]
    assert labelled and all(case.removesuffix(", default malloc") in [t.case for t in tuned.timed] for case in labelled)
    assert not any("malloc" in r.case for r in as_it_comes.ratios)
    assert any("default malloc throughout (keep_memory=false)" in note for note in as_it_comes.notes)


def test_where_the_fresh_process_fails_the_labelled_case_says_why(monkeypatch):
    monkeypatch.setattr(child, "measured", lambda *_, **__: child.Child(failed="ended by signal 9"))
    result = Result("scan")
    plain.again(BenchConfig(), result, "case", "module:work", {}, [("theirs", "ours")])
    assert [(t.case, t.name, t.spread, t.note) for t in result.timed] == [
        ("case, default malloc", "ours", None, "ended by signal 9")
    ]


def test_the_lengths_are_measured_and_drawn_beside_the_results(in_process, tmp_path):
    config = BenchConfig(suite="lengths", tiny=True, out=str(tmp_path / "r.json"), keep_memory=False)
    [result] = run_suites(config)
    as_written(result, tmp_path)
    assert result.files == [str(tmp_path / "r-lengths.svg"), str(tmp_path / "r-lengths.png")]
    svg = (tmp_path / "r-lengths.svg").read_text()
    assert svg.count("<svg") == 1


def test_where_a_length_takes_too_long_the_longer_ones_are_not_tried_and_the_table_says_so(monkeypatch):
    asked = []

    def measured(function, arguments, **options):
        asked.append((function.rpartition(":")[2], arguments["model"], arguments["length"]))
        if arguments["model"] == models.TRANSFORMER and arguments["length"] > 256:
            return child.Child(failed="stopped: took longer than 30 s")
        return child.Child(1.0, 2**20, 2**28, 0.5, "")

    monkeypatch.setattr(child, "measured", measured)
    result = lengths.run(BenchConfig(suite="lengths", quick=True))
    training = [row for row in result.tables[0].rows if row[0] == models.TRANSFORMER]
    assert [(row[1], row[2], row[4]) for row in training[:3]] == [
        (256, 0.5, ""),
        (512, None, "stopped: took longer than 30 s"),
        (1024, None, "not run: at 512 tokens it was stopped: took longer than 30 s"),
    ]
    assert ("training", models.TRANSFORMER, 1024) not in asked
    assert ("training", models.MAMBA, 4096) in asked


def test_a_process_measures_its_own_peak_memory_and_says_why_it_failed(tmp_path, monkeypatch):
    (tmp_path / "eater.py").write_text(
        "import time\n"
        "def eat(size):\n    return lambda: len(bytearray(b'x') * size)\n"
        "def fall():\n    raise ValueError('no such thing')\n"
        "def sleep():\n    return lambda: time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    one = child.measured("eater:eat", {"size": 64 * 2**20})
    assert one.value == 64 * 2**20
    if sys.platform == "linux":
        assert 60 * 2**20 < one.extra_bytes < 70 * 2**20
        assert one.rss_bytes > one.extra_bytes
    assert child.measured("eater:fall", {}).failed == "ValueError: no such thing"
    assert child.measured("eater:sleep", {}, limit=2).failed == "stopped: took longer than 2 s"


def test_the_matrix_products_of_a_step_are_found_and_replayed():
    linear = torch.nn.Linear(8, 32, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    replay, flops = models.matmul_floor(lambda: linear(x).sum().backward())
    assert flops == 3 * 2 * 4 * 8 * 32  # forward, gradient of x, gradient of the weight
    replay()
    targets = torch.randint(32, (4,))
    replay, flops = models.matmul_floor(lambda: linear_cross_entropy(x, linear.weight, targets).backward())
    assert flops == 3 * 2 * 4 * 8 * 32
    replay()


def test_the_transformer_of_a_comparison_has_the_parameters_of_mamba():
    sizes = models.Sizes(8, 256)
    mamba, transformer = (models.arch_of(name, sizes).cost() for name in (models.MAMBA, models.TRANSFORMER))
    assert abs(transformer.params / mamba.params - 1) < 0.005
    assert mamba.embedding_params == transformer.embedding_params


def test_a_form_with_a_wrong_result_is_not_timed():
    def reference(x):
        return x * x

    def draw(*shape):
        return [torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()]

    def half(x):  # right output, half the gradient
        return x.detach() * x

    result = Result("gpu")
    forms = {gpu.OURS: reference, "half": half, "off": lambda x: x * x * 1.01, "none": lambda x: x.nothing()}
    with pytest.raises(AttributeError):  # a mistake of ours is no refusal
        gpu._one_case(BenchConfig(tiny=True), result, "c", forms, draw, (4,), (3,), reference, None)
    del forms["none"]
    gpu._one_case(BenchConfig(tiny=True), result, "c", forms, draw, (4,), (3,), reference, None)
    notes = {(t.case, t.name): t.note for t in result.timed if t.spread is None}
    assert "the gradient 0 is off by" in notes["c fwd", "half"]
    assert "the output is off by" in notes["c fwd+bwd", "off"]
    assert [t.name for t in result.timed if t.spread is not None] == [gpu.OURS, gpu.OURS]


def test_the_gpu_suite_checks_and_times_every_kernel_on_any_device():
    result = Result("gpu")
    gpu.measure_on(BenchConfig(tiny=True), result, torch.device("cpu"), "auto", None)
    timed = {(t.case, t.name) for t in result.timed if t.spread is not None}
    for kind in ("fwd", "fwd+bwd"):
        assert (f"scan (1, 16, 16, 4) float32 {kind}", gpu.OURS) in timed
        assert (f"conv (1, 16, 16) bfloat16 {kind}", gpu.TORCH_CONV) in timed
        assert (f"ssd (1, 16, 2, 8, 1, 16) bfloat16 {kind}", gpu.products.TORCH_SSD) in timed
        for variant in ("Gated DeltaNet", "Kimi delta attention", "GLA"):
            assert (f"{variant} (1, 16, 2, 4, 8) bfloat16 {kind}", gpu.OURS) in timed
        assert (f"moe (16, 2, 8, 16) float32 {kind}", gpu.products.TORCH_MOE) in timed
    assert not [t.note for t in result.timed if t.note.startswith("wrong")]
    assert any(t.name == gpu.MAMBA_SSM and t.note for t in result.timed)


@pytest.mark.slow
def test_the_gpu_suite_measures_whole_models_on_any_device_and_writes_as_it_goes(tmp_path):
    result, written = Result("gpu"), []
    config = BenchConfig(tiny=True, out=str(tmp_path / "gpu.json"))
    gpu.measure_models(
        config, result, torch.device("cpu"), None, lambda: written.append(len(result.to_dict()["tables"]))
    )
    steps, search = result.tables
    assert [row[0] for row in steps.rows] == list(gpu_models.PRESETS)
    assert all(row[2] > 0 and row[-1] == "" for row in steps.rows)
    assert search.rows[0][0] == 2
    assert {t.name for t in result.timed if t.spread is None} >= {"ours, CUDA graph"}
    assert not any("failed" in note for note in result.notes)
    assert written == sorted(written)
    assert len(written) > len(gpu_models.PRESETS)
    gpu._keep(config, result)
    assert json.loads((tmp_path / "gpu-partial.json").read_text())["suite"] == "gpu"


def test_without_a_gpu_the_gpu_suite_is_refused_by_name_and_left_out_of_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = "bench suite=gpu needs a CUDA device, this machine has none; suite=roofline calculates what one would need"
    with pytest.raises(ConfigError, match=words):
        run_command(read_settings("bench", ["gpu"]))
    assert gpu.run(BenchConfig(suite="all")).notes == ["no CUDA device here: nothing was measured"]


def test_the_roofline_is_labelled_as_calculated_and_its_kernels_add_up():
    [table] = roofline.run(BenchConfig(tiny=True)).tables
    assert "calculated, not measured" in table.title
    *kernels, total = table.rows
    assert total[1] == "all, one after another"
    for column in (2, 3, 5, 6, 7):
        assert total[column] == pytest.approx(sum(row[column] for row in kernels))
    assert all(row[7] < row[6] <= row[5] for row in table.rows)  # H100, A100 80GB, A100 40GB


def test_the_roofline_has_every_triton_kernel():
    [table] = roofline.run(BenchConfig()).tables
    rows = {(row[0].split(" (")[0], row[1].split(",")[0]) for row in table.rows}
    assert {case for case, _ in rows} == {"scan", "conv", "ssd", "moe", "rmsnorm", "add + layernorm", "loss"}
    for kernel in ("chunk_inputs_gradients", "conv_backward", "ssd_maps_gradients", "grouped_weights", "norm_backward"):
        assert kernel in {name for _, name in rows}
    by_case = {(row[0], row[1]): row for row in table.rows}
    products = by_case["moe (16384,1,32,1024,3072) bfloat16", "grouped_rows, up"]
    assert products[7] == pytest.approx(1e6 * 2 * 16384 * 1024 * 3072 / 989.4e12)  # the tensor cores' peak limits it


def test_the_first_word_is_the_suite_and_results_are_written_with_command_commit_and_machine(
    tmp_path, capsys, monkeypatch
):
    out = tmp_path / "conv.json"
    monkeypatch.setattr(sys, "argv", ["bench", "conv", "tiny=true"])
    assert run_command(read_settings("bench", ["conv", "tiny=true", f"out={out}"])).code == 0
    printed = capsys.readouterr().out
    assert "conv: causal convolution with SiLU against F.conv1d" in printed
    assert "case\tof / over\tratio (quartiles)" in printed
    read = json.loads(out.read_text())
    assert read["command"] == "python -m hybridnas.bench conv tiny=true"
    assert read["commit"] is None or len(read["commit"]) == 40
    assert read["machine"]["cores"] >= 1 and read["versions"]["torch"] == torch.__version__
    assert [suite["suite"] for suite in read["suites"]] == ["conv"]
    assert read["settings"]["tiny"] is True


def test_wrong_settings_are_refused_in_a_sentence():
    with pytest.raises(ConfigError, match=r"bench suite='skan' is unknown; did you mean 'scan'\?"):
        run_command(read_settings("bench", ["skan"]))
    with pytest.raises(ConfigError, match=r"ends in \.json"):
        run_command(read_settings("bench", ["conv", "out=figures.txt"]))
    with pytest.raises(ConfigError, match="bench threads=0 must be >= 1"):
        run_command(read_settings("bench", ["conv", "threads=0"]))
    with pytest.raises(ConfigError, match="takes key=value settings, got 'moe'"):
        read_settings("bench", ["scan", "moe"])
    assert chosen("scan,moe") == ["scan", "moe"]
    assert chosen("all") == [name for name in SUITES if name not in LONG]


def test_the_help_names_every_suite():
    assert isinstance(read_settings("bench", []), BenchConfig)
    text = help_text("bench", "measure")
    assert all(name in text for name in SUITES)


def test_provenance_holds_no_path_of_this_machine():
    assert str(method.__file__.partition("hybridnas")[0]) not in json.dumps(provenance(["scan"]))


def test_ratio_rows_name_both_forms():
    result = Result("x")
    result.add("c", {"a": [4.0], "b": [2.0]})
    result.ratio("c", "a", "b")
    assert ratio_rows(result) == [["c", "a / b", "2x (one pair)"]]
