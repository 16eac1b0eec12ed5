"""Which tokens a step reads: a pure function of step and seed, every token once an epoch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridnas.data import DataConfig, open_source
from hybridnas.data.shards import Shards, Split
from hybridnas.data.tokenizers import ByteTokenizer
from hybridnas.data.windows import TextSource, permute, window_starts
from hybridnas.errors import DataError


def source_of(n_train, n_valid=1000):
    """A source whose ids are their own positions, so that a batch tells where it was cut."""
    train = Split(np.arange(n_train, dtype=np.uint32), n_train, 1)
    valid = Split(np.arange(n_valid, dtype=np.uint32), n_valid, 1)
    return TextSource(Shards(train, valid, valid, ByteTokenizer(), "0" * 64), name="positions", corpus=None)


def keys(seed):
    return np.random.default_rng(seed).integers(0, 2**63, 6).astype(np.uint64)


@given(size=st.integers(1, 3000), seed=st.integers(0, 50))
@settings(deadline=None)
def test_a_permutation_reaches_every_place_once(size, seed):
    places = permute(np.arange(size, dtype=np.uint64), size, keys(seed))
    assert sorted(places.tolist()) == list(range(size))


def test_a_permutation_of_a_trillion_needs_no_table():
    places = permute(np.arange(1000, dtype=np.uint64), 10**12, keys(0))
    assert len(set(places.tolist())) == 1000
    assert places.max() < 10**12


def test_all_orders_of_four_are_about_equally_frequent():
    orders = [tuple(permute(np.arange(4, dtype=np.uint64), 4, keys(seed)).tolist()) for seed in range(2400)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24
    assert sum((count - 100) ** 2 / 100 for count in counts) < 49.7  # chi-squared, 23 degrees, 0.1 %


@given(n=st.integers(10, 600), seq_len=st.integers(1, 40), seed=st.integers(0, 9), batch=st.integers(1, 7))
@settings(deadline=None, max_examples=60)
def test_an_epoch_reads_every_token_at_most_once_and_leaves_fewer_than_a_window(n, seq_len, seed, batch):
    if n <= seq_len:
        return
    source = source_of(n, n_valid=50)
    windows = n // seq_len
    steps = -(-2 * windows // batch)
    batches = [source.train_batch(step, batch, seq_len, seed) for step in range(steps)]
    inputs = torch.cat([b.inputs_BL for b in batches])
    targets = torch.cat([b.targets_BL for b in batches])
    assert targets.equal((inputs + 1) % n)  # the next token, over the end of the ring as well
    for epoch in (0, 1):
        rows = slice(epoch * windows, (epoch + 1) * windows)
        for side in (inputs, targets):
            seen = side[rows].flatten().tolist()
            assert len(seen) == len(set(seen)) == windows * seq_len > n - seq_len


def test_epochs_and_seeds_have_other_orders_and_other_cuts():
    starts = [window_starts(np.arange(100) + 100 * epoch, 6450, 64, seed) for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert starts[first].tolist() != starts[second].tolist()
        assert set(starts[first] % 64) != set(starts[second] % 64)


def test_a_batch_depends_on_its_step_alone_whatever_was_read_before():
    straight = source_of(5000)
    batches = [straight.train_batch(step, 8, 32, 7) for step in range(60)]
    for resume_at in (59, 20, 37, 20):  # resumed again and again, backwards too, each time by a new process's source
        resumed = source_of(5000)
        for step in range(resume_at, 60):
            assert resumed.train_batch(step, 8, 32, 7).inputs_BL.equal(batches[step].inputs_BL)


def test_the_order_is_the_same_for_any_batch_size():
    source = source_of(5000)
    rows = torch.cat([source.train_batch(step, 1, 32, 3).inputs_BL for step in range(24)])
    assert torch.cat([source.train_batch(step, 8, 32, 3).inputs_BL for step in range(3)]).equal(rows)


SORTED = [400, 550, 20, 270, 600, 520]
FEISTEL = [82000, 16390, 41320, 52650, 45530, 85420]


def test_the_order_never_changes_between_releases():
    assert window_starts(np.arange(6), 1000, 10, 42).tolist() == SORTED
    assert window_starts(np.arange(6), 100_000, 10, 42).tolist() == FEISTEL


def test_batches_are_contiguous_int64_without_mask():
    for batch in (source_of(500).train_batch(0, 3, 16, 0), next(source_of(500).valid_batches(100, 3, 16))):
        for ids in (batch.inputs_BL, batch.targets_BL):
            assert ids.shape == (3, 16)
            assert ids.dtype == torch.int64
            assert ids.is_contiguous()
        assert batch.mask_BL is None


@given(tokens=st.integers(1, 3000), batch=st.integers(1, 9), seq_len=st.integers(1, 60), n=st.integers(61, 1500))
@settings(deadline=None)
def test_validation_windows_are_as_many_as_asked_apart_and_evenly_spread(tokens, batch, seq_len, n):
    source = source_of(500, n_valid=n)
    batches = list(source.valid_batches(tokens, batch, seq_len))
    inputs = torch.cat([b.inputs_BL for b in batches])
    existing = (n - 1) // seq_len
    assert len(inputs) == min(existing, -(-tokens // seq_len))
    assert all(len(b.inputs_BL) == batch for b in batches[:-1])
    assert torch.cat([b.targets_BL for b in batches]).equal(inputs + 1)
    assert int(inputs.max()) + 1 < n
    starts = inputs[:, 0] // seq_len
    gaps = starts.diff()
    assert (gaps >= 1).all()
    if len(gaps):
        assert gaps.max() - gaps.min() <= 1
        assert abs(int(starts[0]) - (existing - 1 - int(starts[-1]))) <= 1  # as far from the start as from the end


def test_validation_is_the_same_at_every_call():
    source = source_of(500)
    first, second = (list(source.valid_batches(300, 4, 16)) for _ in range(2))
    assert all(a.inputs_BL.equal(b.inputs_BL) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("n_train", "n_valid", "use"), [(16, 100, "train on"), (100, 16, "validate on")])
def test_fewer_tokens_than_a_window_are_refused_at_the_first_step(n_train, n_valid, use):
    source = source_of(n_train, n_valid)
    message = rf"positions has 16 tokens to {use}, fewer than one window of seq_len=16 .* \(at most 15\)"
    with pytest.raises(DataError, match=message):
        source.train_batch(0, 1, 16, 0)
    with pytest.raises(DataError, match=message):
        source.valid_batches(100, 1, 16)
    assert source.train_batch(0, 1, 15, 0).inputs_BL.shape == (1, 15)


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    return open_source(DataConfig(cache_dir=str(tmp_path_factory.mktemp("cache"))))


def test_the_standard_library_trains_on_bytes_of_python(stdlib):
    assert stdlib.train_tokens > 5_000_000
    assert 0.02 < stdlib.valid_tokens / stdlib.train_tokens < 0.12
    assert stdlib.vocab_size == 256
    assert stdlib.token_lengths.tolist() == [0] + [1] * 255
    assert 0.02 < stdlib.test_tokens / stdlib.train_tokens < 0.12
    batches = [stdlib.train_batch(step, 16, 256, 0) for step in range(20)]
    text = " ".join(stdlib.tokenizer.decode(row.tolist()) for b in batches for row in b.inputs_BL)
    assert text.count("def ") > 20
    assert text.count("self") > 20
    assert all(int(b.inputs_BL.min()) >= 0 and int(b.inputs_BL.max()) < 256 for b in batches)


def windows_of(ids, width):
    """Return the hash of every window, as the polynomial of its bytes: written apart from the code that is tested."""
    factor, done = np.uint64(0x9E3779B97F4A7C15), 1
    hashes = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    with np.errstate(over="ignore"):
        while done < width:
            hashes, factor, done = hashes[:-done] * factor + hashes[done:], factor * factor, 2 * done
    return hashes


def copied_share(train, held_out, width, counted):
    """Return the share of the bytes that count which lie in a copied window of bytes that count."""
    whole = np.convolve(counted, np.ones(width, dtype=np.int64), "valid") == width
    known, asked = np.sort(windows_of(train, width)), windows_of(held_out, width)
    found = known[np.searchsorted(known, asked).clip(max=len(known) - 1)] == asked
    hits = np.flatnonzero(found & whole)
    inside = np.zeros(len(held_out), dtype=bool)
    for hit in hits:
        inside[hit : hit + width] = True
    return inside.sum() / counted.sum()


@pytest.mark.slow
def test_of_what_is_measured_of_the_standard_library_less_than_a_hundredth_is_copied(stdlib):
    shards = stdlib._shards
    for part in (shards.valid, shards.test):
        assert 0.9 < part.counted.mean() < 1
        assert copied_share(shards.train.tokens, part.tokens, 64, part.counted) < 0.01
        assert 0 < part.copied[1] < part.copied[0] < 0.1


def test_a_source_says_what_it_reads_in_one_line(stdlib):
    said = stdlib.describe()
    assert said.startswith("standard library of Python 3.")
    assert f"({stdlib.train_tokens:,} tokens)" in said
    assert f"documents, {stdlib._shards.test.bytes:,} bytes for testing (" in said
    assert "tokenizer bytes, 256 tokens, 1.00 bytes per token" in said
    assert "\n" not in said


def test_each_target_of_the_test_part_knows_its_document():
    tokens = np.tile(np.array([7, 8, 9, 10, 0], dtype=np.uint32), 40)  # 0 ends a document
    test = Split(tokens, len(tokens), 40)
    source = TextSource(Shards(test, test, test, ByteTokenizer(), "0" * 64), name="fives", corpus=None)
    rows = [row for batch in source.test_batches(200, 2, 12) for row in batch.documents_BL.tolist()]
    starts = range(0, len(tokens) - 12, 12)
    assert rows == [[(start + 1 + place) // 5 for place in range(12)] for start in starts]
    assert all(batch.documents_BL is None for batch in source.valid_batches(200, 2, 12))


def packed(tokens, pack="documents", counted=None):
    part = Split(np.array(tokens, dtype=np.uint32), len(tokens), 1, counted)
    return TextSource(Shards(part, part, part, ByteTokenizer(), "0" * 64), name="packed", corpus=None, pack=pack)


def test_a_packed_window_says_which_document_each_token_is_of_and_predicts_none_from_another():
    tokens = [7, 8, 0, 9, 0, 5, 6, 7, 8, 0]  # 0 ends a document
    source, plain = packed(tokens), packed(tokens, pack=None)
    for step in range(6):
        batch, stream = source.train_batch(step, 2, 4, 3), plain.train_batch(step, 2, 4, 3)
        assert batch.inputs_BL.equal(stream.inputs_BL)
        assert batch.targets_BL.equal(stream.targets_BL)
        for inputs, segments, mask in zip(batch.inputs_BL, batch.segments_BL, batch.mask_BL, strict=True):
            assert segments.tolist() == [inputs[:place].tolist().count(0) for place in range(4)]
            assert mask.tolist() == [one != 0 for one in inputs.tolist()]
        assert stream.segments_BL is stream.mask_BL is None


def test_packed_places_that_are_not_measured_stay_so():
    counted = np.array([True, False] * 5)
    for name in ("valid", "test"):
        (batch,) = getattr(packed([7, 8, 0, 9, 0, 5, 6, 7, 8, 0], counted=counted), f"{name}_batches")(9, 1, 9)
        assert batch.mask_BL.tolist() == [[False, True, False, True, False, True, False, True, False]]
        assert batch.segments_BL.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 2]]


def test_packing_is_part_of_what_identifies_the_data_and_a_stream_is_what_it_was():
    assert packed([7, 0, 8], pack=None).fingerprint == "0" * 64
    assert packed([7, 0, 8]).fingerprint != "0" * 64
    assert "do not see each other" in packed([7, 0, 8]).describe()
