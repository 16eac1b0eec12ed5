"""Pairs of passages: where they are cut, what is held out, and what is refused."""

import numpy as np
import pytest

from hybridnas.data import open_source, source_config
from hybridnas.errors import DataError


@pytest.fixture
def retrieval(tmp_path):
    """Return a function that opens pairs out of sixty files, of random digits."""
    draw = np.random.default_rng(0)
    for number in range(60):
        text = "".join(draw.choice(list("0123456789"), 300))
        (tmp_path / f"{number:02}.txt").write_text(text)
    texts = [path.read_text() for path in sorted(tmp_path.glob("*.txt"))]

    def read(**fields):
        source = open_source(source_config({"kind": "retrieval", "path": str(tmp_path), "seq_len": 51, **fields}))
        return source, texts

    return read


def pairs(batch):
    """Return (left passage, right passage, answer) of each row."""
    assert (batch.inputs_BL[:, -1] == 257).all()
    found = []
    for row, target in zip(batch.inputs_BL.tolist(), batch.targets_BL[:, -1].tolist(), strict=True):
        between = row.index(256)
        left, right = row[:between], row[between + 1 : -1]
        found.append((bytes(left).lstrip(b"\0").decode(), bytes(right).decode(), target - 258))
    return found


def home(passage, texts):
    """Return the one document that has a passage, and where."""
    (number,) = [number for number, text in enumerate(texts) if passage in text]
    return number, texts[number].index(passage)


def test_yes_is_two_passages_of_one_document_that_do_not_overlap(retrieval):
    source, texts = retrieval()
    found = pairs(source.train_batch(0, 400, 51, 0))
    for left, right, answer in found:
        assert len(left) == len(right) == 24
        (one, here), (other, there) = home(left, texts), home(right, texts)
        assert (one == other) == bool(answer)
        if answer:
            assert abs(here - there) >= 24
    shares = [answer for *_, answer in found]
    assert 150 < sum(shares) < 250
    assert {home(left, texts)[1] > home(right, texts)[1] for left, right, answer in found if answer} == {True, False}


def test_documents_are_held_out_and_pairs_are_functions_of_seed_and_number(retrieval):
    source, texts = retrieval(n_test_examples=64)
    seen = {}
    for part, batches in (
        ("train", [source.train_batch(step, 32, 51, 0) for step in range(8)]),
        ("valid", source.valid_batches(10**6, 16, 51)),
        ("test", source.test_batches(10**6, 16, 51)),
    ):
        seen[part] = {home(side, texts)[0] for batch in batches for one in pairs(batch) for side in one[:2]}
    assert not seen["train"] & seen["valid"] and not seen["valid"] & seen["test"] and not seen["train"] & seen["test"]
    assert source.valid_tokens == source.test_tokens == 64 * 51
    one, again = source.train_batch(1, 8, 51, 0), source.train_batch(0, 16, 51, 0)
    assert one.inputs_BL.equal(again.inputs_BL[8:]) and one.targets_BL.equal(again.targets_BL[8:])
    assert not one.inputs_BL.equal(source.train_batch(1, 8, 51, 1).inputs_BL)


def test_too_few_documents_and_another_length_are_refused(retrieval):
    with pytest.raises(DataError) as caught:
        retrieval(seq_len=900)
    assert (caught.value.field, caught.value.got) == ("data.path", 0)
    with pytest.raises(DataError) as caught:
        retrieval()[0].train_batch(0, 4, 52, 0)
    assert (caught.value.field, caught.value.allowed) == ("seq_len", 51)


def test_without_files_python_s_own_sources_are_read():
    source = open_source(source_config({"kind": "retrieval", "max_bytes": 2_000_000, "seq_len": 256, "pool": "mean"}))
    batch = source.train_batch(0, 4, 256, 0)
    assert batch.head == "mean" and list(source.heads(8)) == ["mean"]
    assert set(batch.targets_BL[:, -1].tolist()) <= {258, 259} and source.vocab_size == 260
