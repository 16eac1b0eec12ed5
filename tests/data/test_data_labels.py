"""Labelled texts of one's own: what is read, how it is split, what a model sees of it, and what is refused."""

import json

import pytest

from hybridnas.data import open_source, source_config
from hybridnas.data.rows import BadRowError
from hybridnas.errors import ConfigError, DataError

ROWS = [
    {"text": f"{'good' if n % 3 else 'bad'} words number {n}", "label": "yes" if n % 3 else "no"} for n in range(300)
]


@pytest.fixture
def labels(tmp_path):
    """Return a function that writes rows as JSON lines, or a text as a file, and opens them."""

    def read(rows=ROWS, name="rows.jsonl", **fields):
        content = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(content)
        return open_source(source_config({"kind": "labels", "path": str(tmp_path / name), "seq_len": 32, **fields}))

    return read


def examples(batches):
    """Return (text, label) of each row of batches."""
    found = []
    for batch in batches:
        assert batch.mask_BL[:, -1].all() and not batch.mask_BL[:, :-1].any()
        assert (batch.inputs_BL[:, -1] == 256).all()
        for row, target in zip(batch.inputs_BL[:, :-1].tolist(), batch.targets_BL[:, -1].tolist(), strict=True):
            found.append((bytes(row).lstrip(b"\0").decode(), target - 257))
    return found


def test_an_example_is_a_text_a_question_and_its_label(labels):
    source = labels()
    assert source.labels == ["no", "yes"] and (source.vocab_size, source.seq_len) == (259, 32)
    held_out = [examples(part(10**6, 16, 32)) for part in (source.valid_batches, source.test_batches)]
    train = examples([source.train_batch(0, len(ROWS) - sum(map(len, held_out)), 32, 0)])
    wanted = {(row["text"][:31], source.labels.index(row["label"])) for row in ROWS}
    assert set(train) | set(held_out[0]) | set(held_out[1]) == wanted
    assert len(train) == len(set(train)) and not set(train) & set(held_out[0])
    assert 10 < len(held_out[0]) < 60 and 10 < len(held_out[1]) < 60
    assert train != examples([source.train_batch(0, len(train), 32, 1)])


def test_rows_of_every_format_are_the_same_examples(labels, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    plain = labels()
    csv = labels(
        "n,text,label\n" + "".join(f'{n},"{row["text"]}",{row["label"]}\n' for n, row in enumerate(ROWS)), "a.csv"
    )
    table = {"other": list(range(len(ROWS))), **{name: [row[name] for row in ROWS] for name in ("text", "label")}}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    parquet = open_source(source_config({"kind": "labels", "path": str(tmp_path / "a.parquet"), "seq_len": 32}))
    nested = labels([{"doc": {"body": row["text"]}, "gold": row["label"]} for row in ROWS], "nested.jsonl",
                    text_field="doc.body", label_field="gold")  # fmt: skip
    batches = [one.train_batch(3, 8, 32, 0) for one in (plain, csv, parquet, nested)]
    assert all(batch.inputs_BL.equal(batches[0].inputs_BL) for batch in batches)
    assert all(batch.targets_BL.equal(batches[0].targets_BL) for batch in batches)
    assert plain.fingerprint == csv.fingerprint == parquet.fingerprint != nested.fingerprint


def test_whole_numbers_are_labels_in_their_order_and_balance_is_said(labels):
    source = labels([{"text": f"text {n}", "label": 2 if n % 5 == 0 else 10} for n in range(200)])
    assert source.labels == [2, 10]
    assert source.balance("train")["10"] == pytest.approx(0.8, abs=0.08)
    assert "always '10' is right in" in source.describe()
    details = source.details(4, 0)
    assert details.shares == source.balance("train") and len(details.samples) == 4


@pytest.mark.parametrize(
    ("rows", "fields", "field", "got"),
    [
        ([{"text": "a", "label": 0.5}] * 3, {}, "data.label_field", 0.5),
        ([{"text": f"t{n}", "label": "one"} for n in range(50)], {}, "data.label_field", 1),
        ([{"text": f"t{n}", "klass": "one"} for n in range(50)], {}, "data.label_field", "label"),
        ([{"text": f"t{n}", "label": n} for n in range(3)], {}, "data.path", 3),
        ([{"text": "", "label": "a"}], {}, "data.path", 0),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(labels, rows, fields, field, got):
    with pytest.raises(DataError) as caught:
        labels(rows, **fields)
    assert (caught.value.field, caught.value.got) == (field, got)


def test_bad_rows_files_without_rows_and_other_lengths(labels, tmp_path):
    rows = [*ROWS, {"text": "no label"}]
    with pytest.raises(BadRowError, match="line 301"):
        labels(rows)
    assert "(without 1 row)" in labels(rows, skip_bad_rows=True).describe()
    with pytest.raises(DataError) as caught:
        labels("plain text", "a.txt")
    assert caught.value.got == ".txt"
    with pytest.raises(DataError) as caught:
        labels().train_batch(0, 4, 16, 0)
    assert (caught.value.field, caught.value.allowed) == ("seq_len", 32)
    with pytest.raises(ConfigError):
        source_config({"kind": "labels"})


def weights(count):
    """Rows whose number is how often a text says 'a', times 3, plus 10."""
    import random

    draw = random.Random(0)
    rows = []
    for n in range(count):
        letters = [draw.choice("ab") for _ in range(12)]
        rows.append({"text": f"{''.join(letters)} {n}", "label": 10 + 3 * letters.count("a")})
    return rows


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_number_is_learnt_from_the_last_position_or_the_mean(labels, pool, tmp_path):
    import numpy as np
    from scipy.stats import pearsonr

    from hybridnas.arch.arch import Arch
    from hybridnas.train.checkpoint import load_heads, load_model
    from hybridnas.train.config import TrainConfig
    from hybridnas.train.evaluate import evaluate
    from hybridnas.train.loop import run
    from hybridnas.train.objective import make_heads

    rows = weights(400)
    source = labels(rows, target="number", pool=pool)
    train = [row["label"] for row in rows if row["text"].encode() in source.examples("train")[0]]
    batch = source.train_batch(0, 8, 32, 0)
    where = [rows[int(bytes(row).split()[-1])]["label"] for row in batch.inputs_BL[:, :-1].numpy().astype("uint8")]
    assert batch.values_BL[:, -1].numpy() == pytest.approx((np.array(where) - np.mean(train)) / np.std(train), abs=1e-5)
    config = TrainConfig(tokens=32 * 16 * 150, batch_size=16, seq_len=32, lr=1e-2, valid_tokens=4096)
    folder = tmp_path / "run"
    result = run(Arch.from_pattern("MF", d_model=16, vocab_size=source.vocab_size), source, config, device="cpu",
                 folder=folder)  # fmt: skip
    last = result.evals[-1]
    assert last.accuracy > 0.7 and last.aux["test_accuracy"] > 0.7 and last.aux["correlation"] > 0.8
    model = load_model(folder)
    how = {"n_tokens": 10**6, "batch_size": 16, "seq_len": 32, "device": model.head.weight.device}
    score = evaluate(model, source, heads=load_heads(folder, make_heads(source, model, 1)), **how)
    predicted, true = (side.numpy() for side in score.numbers)
    assert score.loss == pytest.approx(last.valid_loss, rel=1e-4)
    assert score.loss == pytest.approx(0.5 * np.mean((predicted - true) ** 2), rel=1e-4)
    assert score.correlation == pytest.approx(pearsonr(predicted, true).statistic, rel=1e-4)
    assert score.accuracy == pytest.approx(1 - np.mean((predicted - true) ** 2) / np.var(true), rel=1e-3)
    first = evaluate(model, source, heads=make_heads(source, model, 1), **how)
    assert first.accuracy == pytest.approx(-((true.mean()) ** 2) / np.var(true), abs=1e-3)  # the mean of training


@pytest.mark.parametrize(
    ("rows", "field", "got"),
    [
        ([{"text": f"t{n}", "label": "much"} for n in range(50)], "data.label_field", "much"),
        ([{"text": f"t{n}", "label": True} for n in range(50)], "data.label_field", True),
        ([{"text": f"t{n}", "label": 2.5} for n in range(50)], "data.label_field", 2.5),
        ([{"text": f"t{n}", "label": 10**400 + n} for n in range(50)], "data.label_field", 10**400),
        ([{"text": f"t{n}", "label": (-1) ** n * 1e302} for n in range(50)], "data.label_field", 1e302),
    ],
)
def test_what_is_no_number_or_always_the_same_is_refused(labels, rows, field, got):
    with pytest.raises(DataError) as caught:
        labels(rows, target="number")
    assert (caught.value.field, caught.value.got) == (field, got)


def test_numbers_are_described(labels):
    source = labels([{"text": f"text {n}", "label": n / 4} for n in range(200)], target="number")
    details = source.details(3, 0)
    assert len(details.samples) == 3 and "labels" not in details.figures
    assert details.parts["train"]["mean"] == pytest.approx(25, abs=4)
    assert source.balance("train") == {} and source.vocab_size == 257
    assert source.fingerprint != labels([{"text": f"text {n}", "label": n / 8} for n in range(200)],
                                        target="number").fingerprint  # fmt: skip


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_label_is_learnt_from_the_last_position_or_the_mean(labels, pool):
    from hybridnas.arch.arch import Arch
    from hybridnas.train.config import TrainConfig
    from hybridnas.train.loop import run

    source = labels(pool=pool)
    config = TrainConfig(tokens=32 * 16 * 100, batch_size=16, seq_len=32, lr=1e-2, valid_tokens=4096)
    result = run(Arch.from_pattern("MF", d_model=16, vocab_size=source.vocab_size), source, config, device="cpu")
    assert result.evals[-1].accuracy > 0.95  # always "yes" is right in two of three
