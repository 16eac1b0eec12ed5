"""Several sources as one: whose turn it is, whose ids, how many tokens, and each part measured by itself."""

import math

import pytest
import torch

from hybridnas import preset
from hybridnas.arch.model import HybridLM
from hybridnas.data import SOURCES, open_source, source_config
from hybridnas.errors import ConfigError, DataError
from hybridnas.train import checkpoint
from hybridnas.train.checkpoint import load_model
from hybridnas.train.config import TrainConfig
from hybridnas.train.evaluate import evaluate
from hybridnas.train.loop import run
from hybridnas.train.records import read_evals

SMALL = {
    "compression": {"seq_len": 16},
    "mqar": {"seq_len": 32, "n_pairs": 2, "vocab_size": 32, "weight": 2},
    "parity": {"seq_len": 8},
}


def mixture(parts=SMALL, **more):
    return open_source(source_config({"kind": "mixture", "parts": parts, **more}))


def part_of(batch, source):
    """Return the name of the part that a batch's ids belong to."""
    starts = {"compression": 0, "mqar": 16, "parity": 48}
    low, high = int(batch.inputs_BL.min()), int(batch.inputs_BL.max())
    (name,) = (name for name, start in starts.items() if start <= low and high < start + vocab(name))
    return name


def vocab(name):
    return {"compression": 16, "mqar": 32, "parity": 2}[name]


def test_a_round_has_as_many_batches_of_each_part_as_its_weight_in_a_seeded_order():
    source = mixture()
    assert (source.vocab_size, source.seq_len) == (50, 32)
    turns = [part_of(source.train_batch(step, 4, 32, 0), source) for step in range(40)]
    rounds = [turns[first : first + 4] for first in range(0, 40, 4)]
    assert all(sorted(turn) == ["compression", "mqar", "mqar", "parity"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 3
    assert turns == [part_of(mixture().train_batch(step, 4, 32, 0), source) for step in range(40)]
    assert turns != [part_of(source.train_batch(step, 4, 32, 1), source) for step in range(40)]


def test_a_part_reads_its_own_batches_one_after_another_with_as_many_tokens_as_the_others():
    source = mixture()
    alone = open_source(source_config({"kind": "parity", "seq_len": 8}))
    batches = [source.train_batch(step, 4, 32, 7) for step in range(12)]
    assert {batch.inputs_BL.numel() for batch in batches} == {4 * 32}
    own = [batch for batch in batches if part_of(batch, source) == "parity"]
    for step, batch in enumerate(own):
        wanted = alone.train_batch(step, 16, 8, 7)
        assert batch.inputs_BL.equal(wanted.inputs_BL + 48)
        assert batch.targets_BL.equal(wanted.targets_BL + 48)
        assert batch.mask_BL.equal(wanted.mask_BL)
    assert [batch.head for batch in batches] == [
        "readout" if part_of(batch, source) == "compression" else None for batch in batches
    ]


def test_shared_ids_are_one_task_at_several_sizes():
    sizes = {f"mqar_{n}": {"kind": "mqar", "seq_len": 16 * n, "n_pairs": n, "vocab_size": 64} for n in (1, 2, 4)}
    source = mixture(sizes, ids="shared")
    assert (source.vocab_size, source.seq_len) == (64, 64)
    assert source.fingerprint != mixture(sizes).fingerprint
    shapes = {tuple(source.train_batch(step, 2, 64, 0).inputs_BL.shape) for step in range(3)}
    assert shapes == {(8, 16), (4, 32), (2, 64)}


def test_text_and_tasks_go_together(corpus):
    parts = {"text": {"path": str(corpus)}, "parity": {"seq_len": 16}}
    source = mixture(parts, seq_len=64)
    assert (source.vocab_size, source.seq_len) == (source._parts["text"].vocab_size + 2, 64)
    shapes = {tuple(source.train_batch(step, 2, 64, 0).inputs_BL.shape) for step in range(2)}
    assert shapes == {(2, 64), (8, 16)}
    assert set(source.valid_parts(256, 2, 64)) == {"text", "parity"}


def test_every_part_is_measured_by_itself_and_counts_the_same():
    source = mixture({name: SMALL[name] for name in ("mqar", "parity")})
    model = HybridLM(preset("mamba", d_model=16, n_blocks=1, vocab_size=source.vocab_size))
    device = torch.device("cpu")
    score = evaluate(model, source, n_tokens=1024, batch_size=8, seq_len=32, device=device)
    assert set(score.parts) == {"mqar", "parity"}
    assert score.parts["parity"].tokens == 512 != score.parts["mqar"].tokens
    for kind in ("loss", "accuracy"):
        assert getattr(score, kind) == pytest.approx(sum(getattr(p, kind) for p in score.parts.values()) / 2)
        assert score.figures()[f"{kind}.mqar"] == getattr(score.parts["mqar"], kind)
    assert abs(score.loss - math.log(source.vocab_size)) < 1
    assert score.bits_per_byte is None


def test_a_training_run_records_every_part_and_keeps_the_decoder_of_its_compression(tmp_path):
    source = mixture()
    arch = preset("mamba", d_model=16, n_blocks=1, vocab_size=source.vocab_size)
    config = TrainConfig(tokens=1024, batch_size=4, seq_len=32, eval_at=(512,), valid_tokens=768, accumulate=2)
    result = run(arch, source, config, folder=tmp_path / "one", device="cpu")
    assert result.status == "completed"
    for value in read_evals(tmp_path / "one"):
        assert value.valid_loss == pytest.approx(sum(value.aux[f"loss.{name}"] for name in SMALL) / 3)
        assert value.accuracy == pytest.approx(sum(value.aux[f"accuracy.{name}"] for name in SMALL) / 3)
    stopped = run(arch, source, config, folder=tmp_path / "two", device="cpu", max_seconds=0)
    assert stopped.status == "stopped"
    again = run(arch, mixture(), config, folder=tmp_path / "two", device="cpu")
    assert [v.valid_loss for v in again.evals] == [v.valid_loss for v in result.evals]  # resumed: to the bit
    kept, trained = checkpoint.load(tmp_path / "one").heads, result.heads["readout"]
    assert kept["readout.layers.1.weight"].equal(trained.layers[1].weight)
    assert not kept["readout.layers.1.bias"].eq(0).all()
    assert not any("readout" in name for name in load_model(tmp_path / "one").state_dict())
    stored = run(arch, source, config, folder=tmp_path / "one", device="cpu")  # read back, heads and all
    assert stored.heads["readout"].layers[1].weight.equal(trained.layers[1].weight)
    given = {"n_tokens": 768, "batch_size": 4, "seq_len": 32, "device": torch.device("cpu")}
    assert evaluate(stored.model, source, heads=stored.heads, **given).loss == result.evals[-1].valid_loss


def test_an_export_leaves_the_decoder_behind_and_says_so_when_it_is_missed(tmp_path):
    import hybridnas
    from hybridnas.export.folder import export

    source = open_source(source_config({"kind": "compression", "seq_len": 16}))
    arch = preset("mamba", d_model=16, n_blocks=1, vocab_size=16)
    config = TrainConfig(tokens=512, batch_size=4, seq_len=16, valid_tokens=64)
    result = run(arch, source, config, folder=tmp_path / "run", device="cpu")
    model = hybridnas.load(export(result.model, tmp_path / "model", source=source, card={}))
    with pytest.raises(DataError) as caught:
        evaluate(model, source, n_tokens=64, batch_size=4, seq_len=16, device=torch.device("cpu"))
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("heads", [], "readout")


def test_compression_is_read_out_of_the_last_position_alone():
    from hybridnas.data.heads.readout import Readout
    from hybridnas.train.objective import Objective, make_heads

    source = open_source(source_config({"kind": "compression", "seq_len": 16}))
    batch = source.train_batch(0, 4, 16, 0)
    model = HybridLM(preset("mamba", d_model=16, n_blocks=1, vocab_size=16))
    heads = make_heads(source, model, 3)
    weights = [make_heads(source, model, seed)["readout"].layers[1].weight for seed in (3, 4)]
    assert heads["readout"].layers[1].weight.equal(weights[0])
    assert not weights[0].equal(weights[1])
    objective = Objective(model, heads)
    x = torch.randn(4, 16, 16)
    other = torch.randn(4, 16, 16)
    other[:, -1] = x[:, -1]
    read = objective._through_head
    assert read(x, batch).equal(read(other, batch))
    assert not read(x, batch).equal(read(-x, batch))
    assert read(x, batch._replace(head=None)) is x
    decoded = read(x, batch)
    assert all(not decoded[:, 0].equal(decoded[:, place]) for place in range(1, 16))
    assert sum(p.numel() for p in Readout(128).parameters()) == 2 * (128 * 128 + 128) + 3 * 128


def test_mad_is_its_six_tasks_at_their_baselines():
    config = SOURCES.get("mad").config()
    source = open_source(config)
    assert (source.vocab_size, source.seq_len) == (16 + 16 + 16 + 16 + 256 + 32, 256)
    assert list(source.heads(8)) == ["readout"]
    shapes = [tuple(source.train_batch(step, 2, 256, 0).inputs_BL.shape) for step in range(6)]
    assert sorted(shapes) == [(2, 256), (4, 128), (4, 128), (4, 128), (16, 32), (16, 32)]


@pytest.mark.parametrize(
    ("parts", "more", "words"),
    [
        ({}, {}, "needs parts"),
        ({"mqra": {}}, {}, r"data.parts.mqra: unknown data 'mqra'.*mqar"),
        ({"mqar": {"n_pair": 3}}, {}, r"data.parts.mqar: data has no field 'n_pair'.*n_pairs"),
        ({"mqar": {"n_pairs": 300}}, {}, r"data.parts.mqar: mqar n_pairs=300 need seq_len >= 1200"),
        ({"mqar": {"weight": 0}}, {}, r"data.parts.mqar.weight=0 must be a whole number"),
        ({"mqar": 3}, {}, "must be a mapping of settings"),
        ({"mad": {}}, {}, "is a mixture itself"),
        ({"mqar": {}}, {"seq_len": 64}, "seq_len=64 is shorter than an example of 128 tokens"),
    ],
)
def test_mixtures_that_make_no_sense_get_one_sentence(parts, more, words):
    with pytest.raises(ConfigError, match=words):
        mixture(parts, **more)


def test_parts_may_be_named_alone():
    by_list, by_text = (source_config({"kind": "mixture", "parts": p}) for p in (["mqar", "parity"], "mqar, parity"))
    assert by_list == by_text
    assert list(by_list.opened()) == ["mqar", "parity"]
