"""Genomes: FASTA as nucleotides, windows within a contig, both strands, splits by contig, and what is refused."""

import gzip
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridnas.cli import run
from hybridnas.data import open_source, source_config
from hybridnas.data.dna import LETTERS
from hybridnas.data.pieces import PieceError
from hybridnas.data.tokenizers import load_tokenizer
from hybridnas.errors import ConfigError, DataError

COMPLEMENT = str.maketrans("ACGTN", "TGCAN")


def bases(seed, count):
    return "".join(np.random.default_rng(seed).choice(list("ACGT"), count))


def fasta(contigs, width=60):
    lines = []
    for name, text in contigs.items():
        lines += [f">{name} some words", *(text[at : at + width] for at in range(0, len(text), width))]
    return "\n".join(lines) + "\n"


GENOME = {f"chr{n}": bases(n, 300 + 40 * n) for n in range(10)}


@pytest.fixture
def dna(tmp_path):
    """Return a function that opens FASTA text, or a path, as data."""

    def read(content=None, name="genome.fa", **fields):
        path = tmp_path / name
        if content is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        fields.setdefault("cache_dir", str(tmp_path / "cache"))
        fields.setdefault("path", str(path))
        return open_source(source_config({"kind": "dna", **fields}))

    return read


def text_of(ids):
    return "".join("|" if one == 0 else LETTERS[one - 1] for one in ids.tolist())


def windows(batch):
    return [
        text_of(torch.cat((row, target[-1:]))) for row, target in zip(batch.inputs_BL, batch.targets_BL, strict=True)
    ]


def counted_places(batch):
    return torch.ones_like(batch.inputs_BL, dtype=torch.bool) if batch.mask_BL is None else batch.mask_BL


def test_every_window_of_an_epoch_lies_within_one_contig_and_none_is_read_twice(dna):
    source = dna(fasta(GENOME), valid_names=["chr0"], test_names=["chr1", "chr2"])
    framed = {name: f"|{text}|" for name, text in GENOME.items() if name not in ("chr0", "chr1", "chr2")}
    assert source.train_tokens == sum(len(text) - 1 for text in framed.values())
    per_epoch = sum((len(text) - 1) // 32 for text in framed.values())
    for epoch in range(2):
        found = windows(source.train_batch(epoch, per_epoch, 32, 0))
        assert len(set(found)) == per_epoch
        assert all(any(window in text for text in framed.values()) for window in found)
    assert windows(source.train_batch(0, per_epoch, 32, 0)) != windows(source.train_batch(0, per_epoch, 32, 1))
    one, two = source.train_batch(1, 4, 32, 0), source.train_batch(0, 8, 32, 0)
    assert one.inputs_BL.equal(two.inputs_BL[4:])


def test_held_out_windows_are_those_of_their_contigs_and_say_which(dna):
    source = dna(fasta(GENOME), valid_names=["chr0"], test_names=["chr1", "chr2"])
    valid = [window for batch in source.valid_batches(10**6, 4, 50) for window in windows(batch)]
    assert "".join(window[:-1] for window in valid).rstrip("|") == f"|{GENOME['chr0']}"
    batches = list(source.test_batches(10**6, 4, 50))
    assert (
        sum(int(batch.mask_BL.sum()) if batch.mask_BL is not None else 200 for batch in batches) == source.test_tokens
    )
    for batch in batches:
        for window, documents in zip(windows(batch), batch.documents_BL.tolist(), strict=True):
            assert len(set(documents)) == 1
            assert window.rstrip("|") in f"|{GENOME[f'chr{documents[0] + 1}']}|"


def test_gz_folders_and_windows_line_ends_are_the_same_genome(dna, tmp_path):
    plain = dna(fasta(GENOME))
    packed = dna(gzip.compress(fasta(GENOME, 70).replace("\n", "\r\n").encode()), name="other/genome.fna.gz")
    folder = dna(path=str(tmp_path / "other"))
    assert plain.train_batch(3, 4, 32, 0).inputs_BL.equal(packed.train_batch(3, 4, 32, 0).inputs_BL)
    assert plain.fingerprint == packed.fingerprint == folder.fingerprint
    again = dna()  # from the cache
    assert again.fingerprint == plain.fingerprint


def test_contigs_are_drawn_for_the_parts_and_the_largest_stays_in_training(dna):
    genome = {"big": bases(0, 20_000), **{f"plasmid{n}": bases(n + 1, 300 + n) for n in range(6)}}
    source = dna(fasta(genome))
    valid, test = (set(source._parts[part]) for part in ("valid", "test"))
    assert valid and test and not valid & test and 0 in source._parts["train"]
    assert dna(split_seed=5).fingerprint != source.fingerprint
    with pytest.raises(DataError) as caught:
        dna(valid_names=["chrX"])
    assert (caught.value.field, caught.value.got) == ("data.valid_names", "chrX")
    assert caught.value.allowed == tuple(genome)


def test_a_genome_of_one_contig_is_held_out_by_segments(dna):
    with pytest.raises(DataError, match=r"data\.split_by=segment") as caught:
        dna(fasta({"one": bases(0, 100_000)}))
    assert (caught.value.got, caught.value.allowed) == (1, ">= 3")
    source = dna(split_by="segment")
    total = source.train_tokens + source.valid_tokens + source.test_tokens
    assert 0.04 < source.valid_tokens / total < 0.08
    assert "segments" in source.describe()


CASES = {  # options, contig, what is read, and which places are not predicted
    "same": ({}, "acgtACGT", "ACGTACGT", ""),
    "apart": ({"lower": "apart"}, "acgtNnAC", "acgtNnAC", "Nn"),
    "lower": ({"lower": "skip"}, "acgtACGT", "ACGTACGT", "first4"),
    "unknown": ({}, "ACNNrYGU", "ACNNNNGT", "N"),
    "predict": ({"unknown": "predict"}, "ACNNrYGU", "ACNNNNGT", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_lower_case_and_unknown_bases_are_read_as_asked(dna, case):
    options, given, read, skipped = CASES[case]
    source = dna(fasta({"a": given * 8, "b": given * 8}), test_fraction=0, **options)
    (batch, *_) = source.valid_batches(1000, 1, 16)
    assert windows(batch)[0] == "|" + (read * 3)[:16]
    counted = counted_places(batch)[0].tolist()
    expected = [place % 8 >= 4 if skipped == "first4" else letter not in skipped
                for place, letter in enumerate((read * 2)[:16])]  # fmt: skip
    assert counted == expected
    assert source.vocab_size == (11 if case == "apart" else 6)


def test_runs_of_unknown_bases_can_end_a_contig(dna):
    source = dna(fasta({"a": "N" * 50 + "ACGT" * 20 + "n" * 70 + "GGCC" * 20 + "N", "b": "TTTT" * 30}), unknown="cut")
    assert source._store.names == ("a:51", "a:201", "b")
    text = text_of(np.asarray(source._store.ids))
    assert text == f"|{'ACGT' * 20}||{'GGCC' * 20}||{'TTTT' * 30}|"


def test_half_of_the_training_windows_are_the_other_strand(dna):
    fields = {"valid_names": ["chr0"], "test_names": ["chr1"]}
    forward = dna(fasta(GENOME), **fields)
    both = dna(reverse_complement=True, **fields)
    one, other = windows(forward.train_batch(0, 400, 24, 0)), windows(both.train_batch(0, 400, 24, 0))
    turned = [window[::-1].translate(COMPLEMENT) for window in one]
    assert all(window in pair for window, *pair in zip(other, one, turned, strict=True))
    assert 150 < sum(window == old for window, old in zip(other, one, strict=True)) < 250
    assert both.fingerprint != forward.fingerprint


def test_a_score_on_both_strands_does_not_depend_on_the_one_that_was_sequenced(dna):
    from hybridnas.arch.arch import Arch
    from hybridnas.arch.model import HybridLM
    from hybridnas.train.evaluate import evaluate

    fields = {"valid_names": ["chr0"], "test_names": ["chr1"], "reverse_complement": True}
    flipped = {name: text[::-1].translate(COMPLEMENT) for name, text in GENOME.items()}
    model = HybridLM(Arch.from_pattern("M", d_model=8, vocab_size=6), seed=0)
    length = len(GENOME["chr0"]) + 1  # one window, so that both strands are cut at the same places
    scores = [
        evaluate(model, dna(fasta(genome), name=f"{n}.fa", **fields), n_tokens=10**6, batch_size=2, seq_len=length,
                 device=torch.device("cpu"))
        for n, genome in enumerate((GENOME, flipped))
    ]  # fmt: skip
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-6)
    assert scores[0].parts["forward"].loss == pytest.approx(scores[1].parts["reverse"].loss, rel=1e-6)
    assert scores[0].parts["forward"].loss != pytest.approx(scores[0].parts["reverse"].loss, rel=1e-6)


def test_bits_are_stated_per_base(dna, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dna(fasta(GENOME))
    settings = ["pattern=F", "arch.d_model=8", "data=dna", "data.path=genome.fa", "device=cpu", "seq_len=32"]
    assert run(["evaluate", *settings, f"data.cache_dir={tmp_path}/cache"]) == 0
    rows = dict(line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line)
    assert float(rows["bits per base"]) == pytest.approx(math.log2(6), abs=0.3)


def test_a_model_of_dna_is_exported_with_its_letters(dna, tmp_path):
    for lower, text in (("same", "ACGTNACGT"), ("apart", "acgtnACGTN")):
        source = dna(fasta(GENOME), lower=lower)
        source.save_tokenizer(tmp_path / lower)
        tokenizer = load_tokenizer(tmp_path / lower)
        assert (tokenizer.kind, tokenizer.separator, tokenizer.vocab_size) == ("dna", 0, source.vocab_size)
        ids = tokenizer.encode(text)
        assert ids == [LETTERS.index(letter) + 1 for letter in text]
        assert tokenizer.decode(ids) == text
    assert load_tokenizer(tmp_path / "same").encode("acgt") == [1, 2, 3, 4]


def twobit(contigs):
    """Return a 2bit file, written from UCSC's description of the format (genome.ucsc.edu/FAQ/FAQformat#format7)."""
    import struct

    def runs(text, wanted):
        found, start = [], None
        for place, letter in enumerate([*text, ""]):
            if start is None and letter and wanted(letter):
                start = place
            elif start is not None and not (letter and wanted(letter)):
                found.append((start, place - start))
                start = None
        return struct.pack(f"<{1 + 2 * len(found)}I", len(found), *(a for a, _ in found), *(n for _, n in found))

    records = []
    for text in contigs.values():
        padded = text.upper().replace("N", "T").ljust(-(-len(text) // 4) * 4, "T")
        codes = ["TCAG".index(letter) for letter in padded]
        packed = bytes(a << 6 | b << 4 | c << 2 | d for a, b, c, d in zip(*[iter(codes)] * 4, strict=True))
        masks = runs(text, lambda letter: letter in "Nn") + runs(text, str.islower)
        records.append(struct.pack("<I", len(text)) + masks + struct.pack("<I", 0) + packed)
    offset = 16 + sum(5 + len(name) for name in contigs)
    index = b""
    for name, record in zip(contigs, records, strict=True):
        index += bytes([len(name)]) + name.encode() + struct.pack("<I", offset)
        offset += len(record)
    return struct.pack("<4I", 0x1A412743, 0, len(contigs), 0) + index + b"".join(records)


def test_2bit_is_the_same_genome(dna, tmp_path):
    pytest.importorskip("twobitreader", reason="needs the extra: pip install 'hybridnas[dna]'")
    genome = {**GENOME, "chr3": bases(3, 100) + "N" * 20 + bases(4, 90).lower() + "ACG"}
    plain, packed = dna(fasta(genome), lower="apart"), dna(twobit(genome), name="genome.2bit", lower="apart")
    assert packed.fingerprint == plain.fingerprint
    assert packed._store.facts["lower"] == plain._store.facts["lower"] == 90
    with pytest.raises(PieceError, match=r"genome\.2bit"):
        dna(twobit(genome)[:40], name="genome.2bit")


def test_2bit_without_its_reader_names_the_extra(dna, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "twobitreader", None)
    with pytest.raises(PieceError, match=r"hybridnas\[dna\]") as caught:
        dna(b"any", name="genome.2bit")
    assert (caught.value.field, caught.value.got) == ("data.path", ".2bit")


BAD = {
    "protein": (">p\nACGT\nMKVLAE\n", "line 3", "L"),
    "aligned": (">p\nAC-GT\n", "line 2", "-"),
    "no header": ("ACGT\n", "line 1", "ACGT"),
    "fastq": ("@read\nACGT\n+\nIIII\n", "line 1", "@read"),
    "twice": (">a\nACGT\n>a\nACGT\n", "two contigs", "a"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_fasta_of_nucleotides_is_named_with_its_line(dna, case):
    content, words, got = BAD[case]
    with pytest.raises(PieceError, match=words) as caught:
        dna(content)
    assert (caught.value.field, caught.value.got) == ("data.path", got)


def test_contigs_of_one_name_in_two_files_stay_two(dna, tmp_path):
    for name, letter in (("one", "A"), ("two", "C")):
        (tmp_path / f"{name}.fa").write_text(fasta({"chr1": letter * 50}))
    source = dna(path=f"{tmp_path}/one.fa,{tmp_path}/two.fa", test_fraction=0)
    assert source._store.names == ("chr1", "two.fa/chr1")


@pytest.mark.parametrize("content", ["", "\n\n", ">only\n>headers\n", ">a\nNNNN\n>b\nNN\n>c\nNRN\n"])
def test_a_file_without_bases_is_refused(dna, content):
    with pytest.raises(PieceError) as caught:
        dna(content)
    assert caught.value.field == "data.path"


def test_a_corpus_shorter_than_a_window_and_a_missing_path_are_refused(dna):
    source = dna(fasta(GENOME))
    with pytest.raises(DataError) as caught:
        source.train_batch(0, 1, 5000, 0)
    assert (caught.value.field, caught.value.got) == ("seq_len", 5000)
    with pytest.raises(ConfigError) as refused:
        dna(path=None)
    assert refused.value.field == "data.path"
    with pytest.raises(DataError, match="soundly packed"):
        dna(gzip.compress(b">a\n" + b"ACGT\n" * 1000)[:-9], name="cut.fa.gz")


def test_details_count_bases_and_copies_on_either_strand(dna):
    genome = {**GENOME, "copy": GENOME["chr5"][::-1].translate(COMPLEMENT)}
    details = dna(fasta(genome), valid_names=["copy"], test_names=["chr1"]).details(4, 0)
    text = "".join(genome.values())
    assert details.figures["bases"] == len(text)
    assert details.shares["A"] == pytest.approx(text.count("A") / len(text))
    copied = {
        part: own.get("copied from train, either strand, runs of 64 bases") for part, own in details.parts.items()
    }
    assert copied["valid"] == pytest.approx(1, abs=0.02) and copied["test"] == 0
    assert all(sample.text in text for sample in details.samples)


GENOME_FILE = Path(
    os.environ.get("HYBRIDNAS_TEST_GENOME", "/usr/share/doc/bowtie/examples/genomes/NC_008253.fna.gz")
)  # Escherichia coli 536, GenBank NC_008253; of Debian's package bowtie-examples


@pytest.mark.slow
@pytest.mark.skipif(not GENOME_FILE.is_file(), reason=f"no {GENOME_FILE}: apt-get install bowtie-examples")
def test_a_real_genome_is_read_whole(dna):
    source = dna(path=str(GENOME_FILE), split_by="segment", reverse_complement=True)
    details = source.details(2, 0)
    assert details.figures["bases"] == 4_938_920  # as GenBank states
    assert details.figures["share of G and C"] == pytest.approx(0.505, abs=0.001)
    assert details.parts["valid"]["bases"] / 4_938_920 == pytest.approx(0.05, abs=0.02)
    for _, batches in source.valid_parts(10**6, 64, 512).items():
        assert sum(int(counted_places(batch).sum()) for batch in batches) > 200_000
