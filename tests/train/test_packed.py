"""``data.pack=documents``: training on packed windows is training on their documents one by one."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hybridnas
from hybridnas.arch.model import HybridLM
from hybridnas.data import Batch, Source, open_source, source_config
from hybridnas.errors import ConfigError
from hybridnas.train.evaluate import evaluate
from hybridnas.train.objective import Objective
from tests.oracles import randomize


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of 3 to 60 bytes, several in every window."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("texts")
    for number in range(200):
        (folder / f"{number:03}.txt").write_text("".join(draw.choice("abcdef ") for _ in range(draw.randint(3, 60))))
    return folder


def opened(corpus: Path, **fields: Any) -> Source:
    values = {
        "kind": "text",
        "path": str(corpus),
        "cache_dir": str(corpus / "cache"),
        "valid_fraction": 0.2,
        "test_fraction": 0.2,
    }
    return open_source(source_config({**values, "pack": "documents", **fields}))


def model_of(source: Source, pattern: str = "MAGF") -> HybridLM:
    model = hybridnas.build(pattern, d_model=16, vocab_size=source.vocab_size)
    randomize(model)
    return model.double()


def pieces(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Return the inputs and targets of each document, or piece of one, that has a target; separators end documents."""
    found = []
    for ids, following in zip(batch.inputs_BL.tolist(), batch.targets_BL[:, -1:].tolist(), strict=True):
        text = bytes(ids + following).split(b"\0")
        own = [piece + b"\0" for piece in text[:-1]] + [text[-1]]
        found += [torch.tensor([list(piece)]) for piece in own if len(piece) > 1]
    return [(piece[:, :-1], piece[:, 1:]) for piece in found]


def test_a_packed_step_is_that_of_the_documents_one_by_one(corpus: Path) -> None:
    source = opened(corpus)
    model = model_of(source)
    objective, batch = Objective(model), source.train_batch(0, 4, 96, 0)
    assert batch.segments_BL is not None
    assert int(batch.segments_BL.max()) >= 2
    weights = list(model.parameters())
    together = objective(batch).total
    alone = sum(objective(Batch(inputs, targets)).total for inputs, targets in pieces(batch))
    assert isinstance(alone, Tensor)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)  # summed in float32
    for got, expected in zip(torch.autograd.grad(together, weights), torch.autograd.grad(alone, weights), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("part", ["valid", "test"])
def test_a_packed_measurement_is_that_of_the_documents_one_by_one(corpus: Path, part: str) -> None:
    source = opened(corpus)
    model = model_of(source)
    found = evaluate(
        model, source, n_tokens=300, batch_size=2, seq_len=64, device=torch.device("cpu"), part=part, by_document=True
    )
    batches = source.valid_batches(300, 2, 64) if part == "valid" else source.test_batches(300, 2, 64)
    own = [piece for batch in batches for piece in pieces(batch)]
    with torch.no_grad():
        nats = sum(float(Objective(model)(Batch(*piece)).total) for piece in own)
    places = sum(piece[1].numel() for piece in own)
    assert found.tokens == places
    assert found.loss == pytest.approx(nats / places, rel=1e-5)
    if part == "test":
        assert found.documents is not None
        assert sum(found.documents.tokens) == places


def test_packed_runs_are_trained_resumed_and_known_by_their_data(corpus: Path, tmp_path: Path) -> None:
    arch = hybridnas.Arch.from_pattern("MA", d_model=16, vocab_size=256)
    settings: dict[str, Any] = {"tokens": 1024, "batch_size": 2, "seq_len": 64, "valid_tokens": 128}
    settings |= {"accumulate": 2, "eval_at": (512,)}
    whole = hybridnas.fit(arch, opened(corpus), **settings)
    hybridnas.fit(arch, opened(corpus), folder=tmp_path / "run", max_seconds=0, **settings)
    resumed = hybridnas.fit(arch, opened(corpus), folder=tmp_path / "run", **settings)
    stream = hybridnas.fit(arch, opened(corpus, pack=None), **settings)
    assert [one.valid_loss for one in resumed.evals] == [one.valid_loss for one in whole.evals]
    assert whole.evals[-1].valid_loss != stream.evals[-1].valid_loss
    with pytest.raises(hybridnas.HybridNASError, match="data"):
        hybridnas.fit(arch, opened(corpus, pack=None), folder=tmp_path / "run", **settings)


class Bigram(nn.Module):
    """A user's own model of ids alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 256)

    def forward(self, ids_BL: Tensor) -> Tensor:
        logits_BLV: Tensor = self.table(ids_BL)
        return logits_BLV


class Told(Bigram):
    """One that is told of documents."""

    def forward(self, ids_BL: Tensor, segments: Tensor | None = None) -> Tensor:
        self.segments = segments
        return super().forward(ids_BL)


def test_a_module_that_takes_segments_gets_them_and_another_is_refused(corpus: Path) -> None:
    source = opened(corpus)
    batch, told = source.train_batch(0, 2, 64, 0), Told()
    Objective(told)(batch)
    assert told.segments is batch.segments_BL
    with pytest.raises(ConfigError) as caught:
        Objective(Bigram())(batch)
    assert (caught.value.field, caught.value.got) == ("data.pack", "documents")


@pytest.mark.slow
def test_a_compiled_model_takes_packed_documents(corpus: Path) -> None:
    source = opened(corpus)
    model = hybridnas.build("M", d_model=16, vocab_size=256)  # boundaries through a state; attention's are a mask
    batch = source.train_batch(0, 2, 64, 0)
    expected = Objective(model)(batch).total
    torch.testing.assert_close(Objective(model, compile_model=True)(batch).total, expected, rtol=1e-5, atol=0)
