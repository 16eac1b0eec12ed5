"""Contexts in training and in measurement: shorter ones first, and the loss by position in a long one."""

import itertools
import math

import pytest
import torch
from counting import STEPS, Counting, arch_of, ctrl_c_at, run, same_bits, settings

from hybridnas.arch.model import HybridLM
from hybridnas.data import open_source, source_config
from hybridnas.errors import ConfigError, DataError
from hybridnas.train.config import TrainConfig
from hybridnas.train.evaluate import evaluate
from hybridnas.train.positions import loss_by_position

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {"short_first": (4, 8), "short_tokens": 3 * 64}


class Recording(Counting):
    def __init__(self, before_step=lambda step: None):
        super().__init__(before_step)
        self.shapes = []

    def train_batch(self, step, batch_size, seq_len, seed):
        self.shapes.append((step, batch_size, seq_len))
        return super().train_batch(step, batch_size, seq_len, seed)


def test_shorter_contexts_come_first_and_a_step_has_as_many_tokens():
    source = Recording()
    result = run(None, settings(**SHORT), source=source)
    assert result.status == "completed"
    lengths = [4] * 3 + [8] * 3 + [16] * (STEPS - 6)
    assert source.shapes == [(step, 64 // length, length) for step, length in enumerate(lengths)]


def test_an_interrupted_run_goes_on_at_the_context_where_it_was(tmp_path):
    whole = run(tmp_path / "whole", settings(**SHORT))
    source = Recording(ctrl_c_at(1, 4))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", settings(**SHORT), source=source)
    same_bits(run(tmp_path / "cut", settings(**SHORT), source=source), whole)


def test_a_run_without_short_contexts_is_the_run_that_it_was():
    assert "short_first" not in settings().identity() and "short_tokens" not in settings().identity()
    assert settings(**SHORT).identity()["short_first"] == [4, 8]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"short_first": (8, 4), "short_tokens": 64}, "train.short_first"),
        ({"short_first": (5,), "short_tokens": 64}, "train.short_first"),
        ({"short_first": (16,), "short_tokens": 64}, "train.short_first"),
        ({"short_first": (4,)}, "train.short_tokens"),
        ({"short_tokens": 64}, "train.short_tokens"),
        ({"short_first": (4, 8), "short_tokens": STEPS * 64}, "train.short_tokens"),
    ],
)
def test_short_contexts_that_cannot_be_are_refused(fields, field):
    with pytest.raises(ConfigError) as caught:
        settings(**fields)
    assert caught.value.field == field


def test_a_task_has_one_context():
    source = open_source(source_config({"kind": "parity", "seq_len": 16, "vocab_size": 16}))
    with pytest.raises(ConfigError) as caught:
        run(None, settings(**SHORT), source=source)
    assert caught.value.field == "train.short_first"


CPU = torch.device("cpu")


@pytest.mark.parametrize("pattern", ["M", "A"])
@pytest.mark.parametrize("length", [1, 5, 16])
def test_losses_by_position_sum_to_the_loss(monkeypatch, pattern, length):
    monkeypatch.setattr("hybridnas.train.positions.CHUNK_TOKENS", 8)  # chunks of two tokens
    model = HybridLM(arch_of(pattern), seed=0)
    rows = loss_by_position(model, Counting(), n_tokens=64, batch_size=4, seq_len=length, device=CPU)
    whole = evaluate(model, Counting(), n_tokens=64, batch_size=4, seq_len=length, device=CPU)
    assert sum(row.tokens for row in rows) == whole.tokens == 4 * length
    assert sum(row.loss * row.tokens for row in rows) / whole.tokens == pytest.approx(whole.loss, rel=1e-5)
    assert (rows[0].first, rows[-1].last) == (1, length)
    assert all(after.first == before.last + 1 for before, after in itertools.pairwise(rows))
    assert all(row.tokens == 4 * (row.last - row.first + 1) for row in rows)


def test_each_position_is_that_of_its_context():
    """A model is right from the second token on only if it has read two: their difference is the stride."""
    config = TrainConfig(tokens=64 * 16 * 80, batch_size=64, seq_len=16, lr=2e-2, valid_tokens=1024)
    model = run(None, config, arch_of("MF")).model
    first, second, *rest = loss_by_position(model, Counting(), n_tokens=64, batch_size=64, seq_len=16, device=CPU)
    assert first.loss > math.log(2) - 0.2  # two strides are possible
    assert all(row.loss < first.loss / 2 for row in rest)
    assert (first.first, first.last, second.first, second.last) == (1, 1, 2, 2)


def test_places_that_do_not_count_are_left_out_and_one_position_alone_is_refused():
    source = open_source(source_config({"kind": "induction_heads", "seq_len": 16}))
    model = HybridLM(arch_of("M"), seed=0)
    (row,) = loss_by_position(model, source, n_tokens=640, batch_size=8, seq_len=16, device=CPU, part="test")
    assert (row.first, row.last, row.tokens) == (9, 16, 40)
    compression = open_source(source_config({"kind": "compression", "seq_len": 16}))
    with pytest.raises(DataError) as caught:
        loss_by_position(model, compression, n_tokens=64, batch_size=8, seq_len=16, device=CPU)
    assert caught.value.got == "readout"
