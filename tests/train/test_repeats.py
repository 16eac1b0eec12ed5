"""Recall on text: which places say again what their row has said before, and what a model scores there."""

import random

import pytest
import torch

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.data import open_source, source_config
from hybridnas.train.evaluate import evaluate
from hybridnas.train.objective import Objective
from hybridnas.train.repeats import context_tokens, repeated


def by_hand(inputs, targets, context):
    """The definition, place by place."""
    seen, found = set(), []
    for at, target in enumerate(targets):
        string = (*inputs[max(0, at - context + 1) : at + 1], target)
        found.append(len(string) == context + 1 and string in seen)
        seen.add(string)
    return found


@pytest.mark.parametrize("context", [1, 2, 3, 8])
def test_a_place_counts_where_its_string_stood_before(context):
    ids = torch.randint(3, (6, 41), generator=torch.Generator().manual_seed(context))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    expected = [by_hand(i, t, context) for i, t in zip(inputs.tolist(), targets.tolist(), strict=True)]
    assert repeated(inputs, targets, context).tolist() == expected
    assert any(map(any, expected)) or context == 8


def test_a_row_shorter_than_the_context_has_no_such_place():
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert not repeated(ids, ids, 4).any()
    assert repeated(ids, ids, 3).sum() == 0
    assert repeated(ids, ids, 2).sum() == 2


def test_the_context_is_as_many_bytes_for_every_tokenizer():
    assert [context_tokens(bytes_) for bytes_ in (1.0, 2.0, 4.1, 30.0)] == [8, 4, 2, 1]


def test_what_a_model_scores_where_text_repeats_is_measured_on_the_test_part(tmp_path):
    draws = random.Random(0)
    words = ["".join(draws.choices("abcdefgh", k=9)) for _ in range(12)]
    for n in range(30):
        (tmp_path / f"{n}.txt").write_text(" ".join(draws.choices(words, k=300)))
    values = {"kind": "text", "path": str(tmp_path / "*.txt"), "cache_dir": str(tmp_path / "cache")}
    source = open_source(source_config(values))
    model = HybridLM(Arch.from_pattern("CF", d_model=16, vocab_size=source.vocab_size))
    settings = {"n_tokens": 2048, "batch_size": 4, "seq_len": 128}
    score = evaluate(model, source, **settings, device=torch.device("cpu"), part="test", by_document=True)
    loss, right, places = 0.0, 0, 0
    objective = Objective(model).eval()
    for batch in source.test_parts(2048, 4, 128)[""]:
        again = repeated(batch.inputs_BL, batch.targets_BL, 8)
        again = again if batch.mask_BL is None else again & batch.mask_BL
        scores = objective.scores(batch)
        loss, right = loss + float(scores.loss[again].sum()), right + int(scores.correct[again].sum())
        places += int(again.sum())
    assert score.repeats is not None
    assert 0 < places == score.repeats.tokens < score.tokens
    assert score.repeats.loss == pytest.approx(loss / places)
    assert score.repeats.accuracy == right / places
    assert score.test_figures()["test_repeat_accuracy"] == score.repeats.accuracy
    assert "test_repeat_loss" not in evaluate(model, source, **settings, device=torch.device("cpu")).test_figures()


def test_what_another_document_of_the_window_said_is_no_repeat():
    inputs = torch.tensor([[1, 2, 3, 0, 1, 2, 3, 1, 2, 0]])
    targets = torch.tensor([[2, 3, 0, 1, 2, 3, 1, 2, 0, 1]])
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]])
    assert repeated(inputs, targets, 1).tolist()[0] == [False] * 4 + [True, True, False, True, False, True]
    assert repeated(inputs, targets, 1, segments).tolist()[0] == [False] * 7 + [True, False, False]
