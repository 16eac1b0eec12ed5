"""What tasks have in common below their examples: numbers, sets, contexts, and settings that make no sense."""

import numpy as np
import pytest

from hybridnas.data import open_source, source_config
from hybridnas.data.draws import Draws, keys_of
from hybridnas.data.task import shuffled
from hybridnas.errors import ConfigError, DataError


def task(kind, **changes):
    return open_source(source_config({"kind": kind, **changes}))


def test_a_finite_training_set_is_read_once_an_epoch_in_new_orders():
    source = task("mqar", n_train_examples=24, seq_len=16, n_pairs=2)
    rows = [tuple(row) for step in range(6) for row in source.train_batch(step, 8, 16, 0).inputs_BL.tolist()]
    assert len(set(rows[:24])) == 24
    assert set(rows[:24]) == set(rows[24:])
    assert rows[:24] != rows[24:]
    other = [tuple(row) for step in range(3) for row in source.train_batch(step, 8, 16, 1).inputs_BL.tolist()]
    assert set(other) == set(rows)  # another seed is another order of the same set
    assert other != rows[:24]
    assert source.train_tokens == 24 * 16
    assert sorted(shuffled(np.arange(5000), 5000, 3).tolist()) == list(range(5000))


def test_numbers_drawn_are_even_and_different_where_they_must_be():
    draws = Draws(keys_of(np.arange(6000), "test"))
    for limit, count in ((5, 3), (7, 3), (40, 3)):
        chosen = draws.distinct(limit, count)
        assert all(len(set(row)) == count for row in chosen.tolist())
        expected = len(chosen) * count / limit
        assert ((np.bincount(chosen.reshape(-1), minlength=limit) - expected) ** 2 / expected).sum() < 3 * limit + 20
        pairs = np.bincount(chosen[:, 0] * limit + chosen[:, 1], minlength=limit * limit)
        assert pairs.max() < 3 * 6000 / (limit * (limit - 1)) + 20
    orders = [tuple(row) for row in draws.order(4).tolist()]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24
    assert sum((count - 250) ** 2 / 250 for count in counts) < 49.7  # chi-squared, 23 degrees, 0.1 %
    first = draws.weighted(np.array([1.0, 2.0, 5.0]), 2)[:, 0]
    assert np.bincount(first) / 6000 == pytest.approx([0.125, 0.25, 0.625], abs=0.03)
    assert draws.chance(0.3, 4).mean() == pytest.approx(0.3, abs=0.02)


def test_what_one_example_draws_does_not_depend_on_its_neighbours():
    keys = keys_of(np.arange(50), "test")

    def drawn(rows):
        draws = Draws(keys[rows])
        return np.concatenate((draws.distinct(30, 12), draws.below(9, 3), draws.order(6)), axis=1)

    whole = drawn(slice(None))
    assert all((drawn([row])[0] == whole[row]).all() for row in range(50))


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("mqar", {"vocab_size": 33}, "vocab_size=33 must be even"),
        ("mqar", {"seq_len": 65}, "seq_len=65 must be even"),
        ("mqar", {"seq_len": 64, "n_pairs": 17}, "n_pairs=17 need seq_len >= 68"),
        ("mqar", {"vocab_size": 16, "n_pairs": 8}, "n_pairs=8 need as many different keys: vocab_size >= 18, got 16"),
        ("mqar", {"n_pair": 3}, "did you mean 'n_pairs'"),
        ("selective_copying", {"seq_len": 32}, "n_tokens_to_copy=16 need seq_len >= 33"),
        ("in_context_recall", {"seq_len": 127}, "seq_len=127 must be even"),
        ("in_context_recall", {"frac_noise": 0.2}, "needs noise ids: noise_vocab_size >= 1"),
        ("in_context_recall", {"vocab_size": 16, "noise_vocab_size": 13}, "vocab_size=16 must be at least 17"),
        ("induction_heads", {"vocab_size": 2}, "must be >= 3"),
        ("induction_heads", {"seq_len": 8, "n_between": 6}, "n_between=6 needs seq_len >= 9, got 8"),
        ("dna_motifs", {"width": 8, "seq_len": 8}, "width=8 needs seq_len > 8, got 8"),
        ("dna_motifs", {"width": 2, "vocab_size": 10}, "asks for 5 motifs, of width=2 there are at most 4"),
        ("listops", {"vocab_size": 20}, "must be"),
        ("needle", {"n_needles": 8, "seq_len": 40}, "n_needles=8 of n_digits=5 need seq_len >= 63, got 40"),
        ("variable_tracking", {"seq_len": 20}, "n_chains=3 with n_hops=2 need seq_len >= 29, got 20"),
        ("variable_tracking", {"vocab_size": 20}, "leaves 1 variables for 9 assignments"),
    ],
)
def test_settings_that_make_no_sense_get_one_sentence(kind, changes, words):
    with pytest.raises(ConfigError, match=words):
        task(kind, **changes)


def test_too_few_different_examples_to_hold_some_out_are_refused():
    source = task("induction_heads", vocab_size=3, seq_len=4, n_train_examples=10)
    with pytest.raises(ConfigError, match="too few different examples to hold some out"):
        next(source.valid_batches(1, 8, 4))


@pytest.mark.parametrize("between", [0, 1, 3])
def test_the_answer_of_an_induction_head_ends_so_far_before_the_last_trigger(between):
    source = task("induction_heads", vocab_size=16, seq_len=12, n_between=between)
    inputs_BL = source.train_batch(0, 512, 12, 0).inputs_BL
    first = {row.index(15) for row in inputs_BL.tolist()}
    assert first == set(range(12 - 2 - between))  # the trigger; its answer and what is between fit in front of the last


def test_labels_of_motifs_and_lists_are_no_constant_and_lengths_differ():
    motifs = open_source(source_config({"kind": "dna_motifs"}))
    assert motifs.chance() < 0.2  # eight motifs
    lists = task("listops", seq_len=64).examples(np.arange(400), train=True, seed=0)
    lengths = (lists.inputs_BL != 15).sum(axis=1)
    assert (lengths.min(), lengths.max()) == (32, 64)
    assert set(lists.targets_BL[:, -1].tolist()) == set(range(10))
    depths = ((lists.inputs_BL >= 10) & (lists.inputs_BL < 14)).cumsum(axis=1) - (lists.inputs_BL == 14).cumsum(axis=1)
    assert depths.max() == 6 and (depths[:, -1] == 0).all()


def test_the_mean_of_all_positions_can_answer_instead_of_the_last(tmp_path):
    import torch

    from hybridnas.arch.arch import Arch
    from hybridnas.train.config import TrainConfig
    from hybridnas.train.loop import run

    source = task("listops", seq_len=16, pool="mean")
    (head,) = source.heads(8).values()
    x_BLD = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([x_BLD[:, : n + 1].mean(dim=1) for n in range(5)], dim=1)
    torch.testing.assert_close(head(x_BLD), expected)
    config = TrainConfig(tokens=1024, seq_len=16, batch_size=16, valid_tokens=256)
    arch = Arch.from_pattern("M", d_model=8, vocab_size=16)
    pooled = run(arch, source, config, folder=tmp_path / "mean", device="cpu")
    last = run(arch, task("listops", seq_len=16), config, folder=tmp_path / "last", device="cpu")
    assert pooled.status == last.status == "completed"
    assert pooled.evals[-1].valid_loss != last.evals[-1].valid_loss


def test_a_task_has_its_own_context():
    source = task("mqar", seq_len=64, n_pairs=4)
    assert source.context(None, 256) == source.context(64, 256) == 64
    with pytest.raises(ConfigError, match=r"seq_len=128 disagrees .* mqar: 4 key-value pairs.*data.seq_len=128"):
        source.context(128, 256)
    with pytest.raises(DataError, match="examples of 64 tokens, asked for seq_len=32"):
        source.train_batch(0, 4, 32, 0)


def settings_of(command, *overrides):
    from hybridnas.cli.compose import read_settings

    return read_settings(command, list(overrides))


def test_training_takes_the_context_of_its_task_unless_another_was_asked_for(tmp_path, capsys):
    from hybridnas.cli.train import run

    given = ("preset=mamba", "preset.d_model=16", "preset.n_blocks=1", "data=mqar", "data.n_pairs=2", "data.seq_len=16")
    sizes = ("data.vocab_size=32", "train.tokens=512", "train.valid_tokens=128", "device=cpu", "tracking=off")
    assert run(settings_of("train", *given, *sizes, f"out={tmp_path / 'run'}")).code == 0
    said = capsys.readouterr().out
    assert "mqar: 2 key-value pairs" in said
    assert "2 steps of 256 tokens" in said  # 16 sequences of 16
    with pytest.raises(ConfigError, match=r"seq_len=32 disagrees with the task's own length.*data.seq_len=32"):
        run(settings_of("train", *given, *sizes, "train.seq_len=32", f"out={tmp_path / 'other'}"))


def test_a_search_and_its_budget_take_the_context_of_the_task(tmp_path):
    from hybridnas.search.config import SearchConfig
    from hybridnas.search.runner import Search

    settings = settings_of("search", "data=mad", "budget=smoke", "space=hybrid")
    budget = settings.budget
    assert budget.seq_len == 128
    search = Search(SearchConfig(space=settings.space, data=settings.data, budget=budget, runs=tmp_path, device="cpu"))
    assert search.config.budget.seq_len == 256
    assert search.config.budget.step_tokens == 16 * 256
    text = settings_of("search", "data=stdlib", "budget=smoke").data
    search = Search(SearchConfig(space=settings.space, data=text, budget=budget, runs=tmp_path, device="cpu"))
    assert search.config.budget.seq_len == 128


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (("data=mqr",), "data"),
        (("data=mad", "data.parts.compression.vocab_sise=3"), "data.parts.compression.vocab_sise"),
        (("data=mqar", "data.n_pair=3"), "data.n_pair"),
    ],
)
def test_mistyped_tasks_are_refused_by_name(overrides, field):
    with pytest.raises(ConfigError) as caught:
        settings_of("train", *overrides)
    assert caught.value.field == field


def test_parts_of_a_mixture_are_named_and_set():
    with pytest.raises(ConfigError, match="needs parts"):
        source_config(settings_of("train", "data=mixture").data)
    given = settings_of("train", "data=mixture", "data.parts=[mqar,parity]", "data.parts.mqar.n_pairs=4").data
    assert given == {"kind": "mixture", "parts": {"mqar": {"n_pairs": 4}, "parity": {}}}
    assert source_config(given).opened()["mqar"][0].n_pairs == 4
