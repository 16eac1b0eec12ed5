"""Long texts chunk by chunk: the same logits as in one pass, nothing held but the state."""

import pytest
import torch

from hybridnas.arch.arch import Arch
from hybridnas.arch.long import last_logits, prefill
from hybridnas.arch.model import HybridLM
from hybridnas.errors import ConfigError


def make(pattern="MAFEN", **fields):
    if "E" in pattern:
        fields["E"] = {"n_experts": 3, "d_expert": 8, **fields.get("E", {})}
    arch = Arch.from_pattern(pattern, d_model=16, vocab_size=11, **fields)
    return HybridLM(arch, seed=1)


def text(length, batch=2):
    return torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(0))


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_chunks_give_the_logits_of_one_pass():
    model, ids = make().eval(), text(29)
    pieces = list(prefill(model, ids.split(7, dim=1)))
    assert [logits.shape[1] for logits, _ in pieces] == [7, 7, 7, 7, 1]
    close(torch.cat([logits for logits, _ in pieces], dim=1), model(ids).logits)


def test_a_state_continues_the_text():
    model, ids = make().eval(), text(20)
    ((_, state),) = prefill(model, [ids[:, :13]])
    ((logits, _),) = prefill(model, [ids[:, 13:]], state=state)
    close(logits, model(ids).logits[:, 13:])


def test_the_last_logits_and_those_at_asked_positions_are_those_of_one_pass():
    model, ids = make().eval(), text(23)
    whole = model(ids).logits
    close(last_logits(model, ids, chunk_tokens=5), whole[:, -1])
    asked = [22, 0, 4, 5, 5, 12]
    close(last_logits(model, ids, chunk_tokens=5, positions=asked), whole[:, asked])
    close(last_logits(model, iter(ids.split(9, dim=1)), chunk_tokens=4, positions=torch.tensor(asked)), whole[:, asked])


def test_nothing_is_read_beyond_the_largest_position():
    model, ids = make("M").eval(), text(20)

    def pieces():
        yield ids[:, :10]
        raise AssertionError("read on")

    close(last_logits(model, pieces(), positions=[9, 3]), model(ids).logits[:, [9, 3]])


def test_reading_leaves_the_mode_and_keeps_no_graph():
    model, ids = make("ME"), text(12)
    assert model.training
    for logits, _ in prefill(model, ids.split(5, dim=1)):
        assert model.training
        assert torch.is_grad_enabled()
        assert not logits.requires_grad
    assert not last_logits(model, ids).requires_grad
    expected = model.eval()(ids).logits[:, -1]
    close(last_logits(model.train(), ids, chunk_tokens=4), expected)
    assert model.training


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: last_logits(m, text(4), chunk_tokens=0), "chunk_tokens must be at least 1, got 0"),
        (lambda m: last_logits(m, text(4), positions=[]), "positions must be at least one index"),
        (lambda m: last_logits(m, text(4), positions=[-1]), r"from 0 up, got \[-1\]"),
        (lambda m: last_logits(m, text(4), positions=[4]), "position 4 is beyond the text of 4 tokens; use 0 to 3"),
        (lambda m: last_logits(m, []), "at least one token to read, got none"),
        (lambda m: last_logits(m, text(4)[0]), r"got shape \(4,\)"),
        (lambda m: list(prefill(m, [text(4)[:, :0]])), r"got shape \(2, 0\)"),
    ],
)
def test_bad_reading_is_refused_in_words(call, words):
    with pytest.raises(ConfigError, match=words):
        call(make("M"))


def test_a_model_that_is_not_causal_is_not_read_in_chunks():
    with pytest.raises(ConfigError, match="not causal"):
        list(prefill(make("E", E={"router": "expert_choice"}), [text(4)]))
