"""The truth set: drawn once, trained by several processes in an order of which any beginning is useful, and resumed."""

import dataclasses
from collections import Counter

import pytest

from hybridnas.analysis.decisions import Rows
from hybridnas.arch.pattern import parse
from hybridnas.arch.presets import DEFAULT_BASELINES
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.suites.decisions import simulated
from hybridnas.bench.suites.truth import ARCHITECTURES, _of_patterns, _sizes, shares
from hybridnas.data import open_source, source_config
from hybridnas.errors import ConfigError, StudyError
from hybridnas.search.rates import rate_beyond
from hybridnas.study.locks import FileLock
from hybridnas.study.truth import CHOOSING, RECALL, REPORTING, RUNGS, TEXT, Listed, read_listed, read_truth, write_truth
from hybridnas.tabular.proxies import proxies
from hybridnas.tabular.truth import SIZES, TruthSize, TruthSpec, build_truth, draw_architectures, sized
from hybridnas.train import experiment

SMALL = TruthSize(
    active_params=2000, d_model=8, batch_size=2, valid_tokens=64, cosine=True, recall=True, shared_seeds=1, more_seeds=1
)


@pytest.fixture(scope="module")
def spec(corpus):
    return TruthSpec(
        architectures=[Listed(pattern="FF", half=REPORTING)],
        sizes=[SMALL],
        data={"kind": "text", "path": str(corpus)},
        recall={"kind": "in_context_recall", "vocab_size": 16, "seq_len": 16, "n_train_examples": None},
        recall_tokens=256,
        tokens_per_active_param=0.2,
        seq_len=16,
        seeds=2,
    )


@pytest.fixture(scope="module")
def short(spec):
    """The set without further seeds, cosine and recall: four trainings at most."""
    return dataclasses.replace(
        spec, sizes=[dataclasses.replace(SMALL, cosine=False, recall=False, shared_seeds=0, more_seeds=0)], seeds=1
    )


@pytest.fixture(scope="module")
def built(spec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("truth")
    lines = []
    return build_truth(spec, folder / "truth.csv", folder / "work", report=lines.append), lines, folder


def test_every_architecture_has_all_rates_seeds_at_the_best_a_cosine_and_recall(built, spec):
    rows, _, _ = built
    for one in spec.architectures:
        own = [row for row in rows if row.pattern == str(parse(one.pattern))]
        firsts = {row.rate: row for row in own if (row.task, row.schedule, row.seed) == (TEXT, "wsd", 0)}
        assert set(spec.rates) <= set(firsts) and len(firsts) <= 4
        assert rate_beyond({rate: row.loss for rate, row in firsts.items()}, spec.rates) is None
        best = min(firsts, key=lambda rate: firsts[rate].loss)
        assert {row.rate for row in own if row.seed == 1} == {best, spec.rates[0]}
        assert [row.rate for row in own if row.seed == 2] == [best]
        assert [row.rate for row in own if row.task == TEXT and row.schedule == "cosine"] == [spec.rates[0]]
        assert [row.rate for row in own if row.task == RECALL] == [best]
        assert {row.half for row in own} == {one.half}


def test_a_size_for_baselines_alone_trains_no_architecture_that_was_drawn(short, tmp_path):
    size = dataclasses.replace(short.sizes[0], baselines_only=True)
    listed = [Listed(pattern="FF", half=REPORTING), Listed(pattern="FM", half=REPORTING, preset="mamba_mlp")]
    spec = dataclasses.replace(short, architectures=listed, sizes=[size])
    rows = build_truth(spec, tmp_path / "truth.csv", tmp_path, report=lambda text: None)
    assert {row.pattern for row in rows} == {"FM"}


def test_a_row_has_finished_models_at_all_rungs_and_the_stable_curve_before_their_decays(built):
    rows, _, folder = built
    for row in rows:
        assert not row.failed and set(row.losses) == set(row.accuracies) == set(RUNGS)
        assert abs(row.active_params / row.size - 1) <= 0.02
        if row.schedule == "wsd":
            assert set(row.trunk) == set(RUNGS) and row.trained_tokens > row.tokens
            assert not {tokens for tokens, _, _ in row.curve} & {round(rung * row.tokens) for rung in RUNGS}
        if row.task == TEXT:
            assert row.test_loss is not None
    assert read_truth(folder / "truth.csv") == sorted(rows, key=[*rows].index)


def test_the_same_call_trains_nothing_again(built, spec, monkeypatch):
    rows, _, folder = built
    monkeypatch.setattr(experiment, "train_run", None)
    assert build_truth(spec, folder / "truth.csv", folder / "work", report=lambda text: None) == rows


def test_a_training_that_was_cut_off_goes_on_to_the_same_figures(built, short, tmp_path, monkeypatch):
    rows, _, _ = built
    steps = []

    def killed(self, run, step):
        steps.append(step)
        if len(steps) == 5:
            raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("hybridnas.tabular.truth._CpuTime.on_step", killed, raising=False)
        with pytest.raises(OSError, match="power cut"):
            build_truth(short, tmp_path / "t.csv", tmp_path / "work", report=lambda text: None)
    assert read_truth(tmp_path / "t.csv") == []
    again = build_truth(short, tmp_path / "t.csv", tmp_path / "work", report=lambda text: None)
    timeless = {"cpu_seconds": 0.0, "tokens_per_second": 0.0}
    known = {row.key: dataclasses.replace(row, **timeless) for row in rows}
    assert len(again) >= 3
    assert [dataclasses.replace(row, **timeless) for row in again] == [known[row.key] for row in again]


def test_a_training_that_another_process_holds_is_left_to_it(built, short, tmp_path):
    rows, _, _ = built
    lock = FileLock(tmp_path / "work" / "2000-text-wsd-FF-0.012-0.lock")
    assert lock.acquire(wait=False)
    found = build_truth(short, tmp_path / "t.csv", tmp_path / "work", report=lambda text: None)
    lock.release()
    assert sorted(row.rate for row in found) == [0.004, 0.036]
    assert {row.key for row in found} < {row.key for row in rows}


def test_the_best_rate_at_an_edge_asks_for_one_beyond_and_only_one():
    rates = (0.012, 0.004, 0.036)
    assert rate_beyond({0.012: 2.0, 0.004: 2.1}, rates) is None
    assert rate_beyond({0.012: 2.0, 0.004: 2.1, 0.036: 2.2}, rates) is None
    assert rate_beyond({0.012: 2.0, 0.004: 2.1, 0.036: 1.9}, rates) == 0.108
    assert rate_beyond({0.012: 2.0, 0.004: 1.9, 0.036: 2.1}, rates) == 0.00133
    assert rate_beyond({0.012: 2.0, 0.004: 2.1, 0.036: 1.9, 0.108: 1.8}, rates) is None


def test_the_committed_list_is_what_the_seed_draws_balanced_over_halves_letters_and_ratios():
    listed = read_listed(ARCHITECTURES)
    assert len(listed) == 48 and len({one.pattern for one in listed}) == 48
    assert {one.preset for one in listed} == {"", *DEFAULT_BASELINES}
    assert Counter(one.half for one in listed) == {CHOOSING: 24, REPORTING: 24}
    for half in (CHOOSING, REPORTING):
        letters = Counter(slot.letter for one in listed if one.half == half for slot in parse(one.pattern).slots)
        assert set(letters) == set("AMSNGLKCFE") and min(letters.values()) >= 4
        assert any(one.preset for one in listed if one.half == half)


@pytest.mark.slow
def test_the_committed_list_is_drawn_again_by_its_seed():
    assert draw_architectures() == read_listed(ARCHITECTURES)


def test_a_row_is_read_as_it_was_written_and_another_csv_is_refused(tmp_path):
    rows = [dataclasses.replace(row, failed="diverged", test_loss=None) for row in simulated(2)]
    write_truth(tmp_path / "t.csv", rows)
    read = read_truth(tmp_path / "t.csv")
    assert sorted(map(repr, read)) == sorted(map(repr, rows)) and len(Rows(read).all) == len(rows)
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(StudyError):
        read_truth(tmp_path / "t.csv")
    assert read_truth(tmp_path / "absent.csv") == []


def test_an_unknown_size_is_refused_with_those_that_are_known():
    assert [size.active_params for size in _sizes((65_536, 4_608))] == [4_608, 65_536]
    assert _sizes(()) == list(SIZES)
    with pytest.raises(ConfigError) as caught:
        _sizes((5,))
    assert (caught.value.field, caught.value.allowed) == ("sizes", tuple(size.active_params for size in SIZES))


def test_proxies_are_the_same_each_time_and_tell_architectures_apart(corpus):
    source = open_source(source_config({"kind": "text", "path": str(corpus)}))
    one, again, other = (
        proxies(sized(text, SMALL, source.vocab_size), source, batch_size=2, seq_len=16) for text in ("FF", "FF", "FE")
    )
    assert one == again and set(one) == {"gradient norm", "snip", "naswot"}
    assert all(one[name] != other[name] for name in one)


def test_patterns_of_ones_own_are_trained_into_a_file_of_their_own():
    with pytest.raises(ConfigError) as caught:
        _of_patterns(BenchConfig(patterns=("Mx4",)), SIZES)
    assert caught.value.field == "truth"
    config = BenchConfig(patterns=("(ME{n_experts=2})x2", "MMMM"), truth="own.csv")
    spec = _of_patterns(config, SIZES[:2])
    assert [one.pattern for one in spec.architectures] == ["(ME{n_experts=2})x2", "Mx4"]
    assert not any(size.cosine or size.recall or size.more_seeds for size in spec.sizes)
    two, eight = (sized(text, SIZES[1], 257).cost() for text in ("(ME{n_experts=2})x2", "(ME)x2"))
    assert two.params < 0.6 * eight.params
    assert two.active_params == pytest.approx(eight.active_params, rel=0.02)


def test_the_share_of_a_baselines_steps_is_said_for_every_other_architecture():
    (table,) = shares(Rows(simulated(3, sizes=(1000,))), "architecture 1")
    assert [line[:3] for line in table.rows] == [[1000, "architecture 0", 2], [1000, "architecture 2", 2]]
    assert [line[3] for line in table.rows] == pytest.approx([0.01, -0.01])
    assert [line[4].split(" ")[0] for line in table.rows][1] == "not"
