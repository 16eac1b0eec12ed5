"""Accuracy by length: the same as one whole pass, in constant memory, and words where there is no figure."""

import json
from pathlib import Path

import pytest
import torch

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.cli import run as run_cli
from hybridnas.data.source import SOURCES, Batch, Source, SourceConfig, SourceKind
from hybridnas.errors import ConfigError
from hybridnas.suites import results
from hybridnas.suites.lengths import at_lengths


class Counting(Source):
    """Every token is the number of those before it, modulo the vocabulary; a model that knows is always right."""

    vocab_size = 7
    fingerprint = "counting"

    def describe(self):
        return "counting"

    def train_batch(self, step, batch_size, seq_len, seed):
        raise NotImplementedError

    def valid_batches(self, n_tokens, batch_size, seq_len):
        ids = (torch.arange(seq_len + 1) % 7).expand(batch_size, -1)
        mask = torch.zeros(batch_size, seq_len, dtype=torch.bool)
        mask[:, -3:] = True
        for _ in range(0, n_tokens, batch_size * seq_len):
            yield Batch(ids[:, :-1], ids[:, 1:], mask)


@pytest.fixture
def counting():
    SOURCES.add("counting", SourceKind(SourceConfig, lambda config: Counting()))
    yield {"kind": "counting"}
    SOURCES.remove("counting")


@pytest.mark.parametrize("pattern", ["M", "MA"])
def test_accuracy_by_length_is_that_of_one_whole_pass(pattern, counting, monkeypatch):
    monkeypatch.setattr("hybridnas.suites.lengths.CHUNK_TOKENS", 32)  # so that chunks are many
    torch.manual_seed(0)
    model = HybridLM(Arch.from_pattern(pattern, d_model=16, vocab_size=7), seed=1)
    rows = list(at_lengths(model, counting, [40, 16], examples=4, name="counter", seed=3))
    assert [(r.length, r.seed, r.model, r.examples) for r in rows] == [(16, 3, "counter", 4), (40, 3, "counter", 4)]
    for found in rows:
        batch = next(iter(Counting().valid_batches(1, 1, found.length)))
        hits = (model(batch.inputs_BL).logits.argmax(-1) == batch.targets_BL)[batch.mask_BL]
        assert found.accuracy == pytest.approx(hits.float().mean().item())
        assert found.state_bytes == model.arch.cost(found.length).state_bytes


def test_attention_stops_in_words_where_memory_ends_and_mamba_goes_on(counting):
    attention = HybridLM(Arch.from_pattern("A", d_model=16, vocab_size=7))
    rows = list(at_lengths(attention, counting, [16, 4096], examples=1, memory=100_000))
    assert rows[0].accuracy is not None
    assert rows[1].accuracy is None
    assert rows[1].words == "out of memory: a state of 512 KiB needs 1.5 MiB, 97.7 KiB are free"
    mamba = HybridLM(Arch.from_pattern("M", d_model=16, vocab_size=7))
    assert all(r.accuracy is not None for r in at_lengths(mamba, counting, [16, 4096], examples=1, memory=100_000))


def test_a_length_that_would_take_too_long_is_said_and_not_run(counting):
    model = HybridLM(Arch.from_pattern("M", d_model=8, vocab_size=7))
    rows = list(at_lengths(model, counting, [16, 2**40], examples=1, patience=60))
    assert rows[1].accuracy is None
    assert rows[1].words.startswith("not run: about ")
    assert rows[1].words.endswith("by the speed at 16, allowed 1")


def test_lengths_below_one_are_refused():
    model = HybridLM(Arch.from_pattern("M", d_model=8, vocab_size=7))
    with pytest.raises(ConfigError, match="must be whole numbers of at least 1"):
        list(at_lengths(model, {"kind": "stdlib"}, [0]))


def test_lengths_by_the_command_for_a_run_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = ["pattern=M", "arch.d_model=8", "data=induction_heads", "data.seq_len=16", "train.seq_len=16",
             "train.batch_size=2", "train.tokens=64", "train.valid_tokens=32", "tracking=off", "out=run"]  # fmt: skip
    assert run_cli(["train", *train]) == 0
    capsys.readouterr()
    asked = ["model=run", "data=induction_heads", "lengths=[32,16]", "max_gib=1", "out=by_length.csv"]
    assert run_cli(["evaluate", *asked]) == 0
    table = [line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line]
    assert [line[0] for line in table] == ["length", "16", "32"]
    rows = results.read_lengths(Path("by_length.csv"))
    assert [(r.length, r.examples) for r in rows] == [(16, 512), (32, 512)]
    assert json.loads(Path("run/run.json").read_text())["status"] == "completed"
