"""Batches of rows of different lengths: every row gives what it gives alone, for every block of the registry."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.arch.padding import RowStates, hidden_of_rows
from hybridnas.errors import ConfigError
from hybridnas.registry import BLOCKS
from tests.oracles import randomize, relative

LETTERS = sorted(BLOCKS)
PATTERNS = [*(f"{letter}A" for letter in LETTERS), "MEF", "[M,A]ES{window=4}"]
LENGTHS = [7, 3, 12, 7]


def tiny(pattern: str, **fields: Any) -> HybridLM:
    model = HybridLM(Arch.from_pattern(pattern, d_model=16, vocab_size=29, **fields), seed=1).eval()
    randomize(model)
    return model


def batch(seed: int = 0) -> Tensor:
    return torch.randint(29, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_a_padded_row_gives_what_it_gives_alone(pattern: str) -> None:
    model, ids_BL = tiny(pattern), batch()
    columns_L = torch.arange(ids_BL.shape[1])
    for left in (False, True):
        real_BL = torch.stack([(columns_L >= 12 - n) if left else (columns_L < n) for n in LENGTHS])
        states = RowStates(model, len(LENGTHS))
        with_state = states.read(model, ids_BL, real_BL)
        without_state, _ = hidden_of_rows(model, ids_BL, real_BL.long())
        following = states.read(model, ids_BL[:, :2])
        for row, real_L in enumerate(real_BL):
            own_1l = ids_BL[row][real_L][None]
            alone = model.hidden(torch.cat([own_1l, ids_BL[row : row + 1, :2]], dim=1)).x_BLD
            for found in (with_state, without_state):
                assert relative(found[row, real_L], alone[0, :-2]) < 1e-5
                assert not found[row, ~real_L].any()
            assert relative(following[row], alone[0, -2:]) < 1e-5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_prompts_of_different_lengths_continue_as_each_alone(pattern: str) -> None:
    model, ids_BL = tiny(pattern), batch()
    for chunk in (1024, 5):
        found = model.generate(ids_BL, 6, lengths=LENGTHS, temperature=0.0, prefill_chunk=chunk)
        for row, length in enumerate(LENGTHS):
            alone = model.generate(ids_BL[row : row + 1, :length], 6, temperature=0.0, prefill_chunk=chunk)[0]
            assert found[row, : length + 6].tolist() == alone.tolist()
            assert found[row, length + 6 :].tolist() == ids_BL[row, length:].tolist()


@torch.no_grad()
def test_documents_of_a_row_do_not_see_each_other() -> None:
    model, ids_BL = tiny("MAE"), batch()[:1]
    document_BL = torch.tensor([[1, 1, 1, 0, 2, 2, 2, 2, 2, 3, 3, 0]])
    found, _ = hidden_of_rows(model, ids_BL, document_BL)
    for number in (1, 2, 3):
        own = document_BL[0] == number
        assert relative(found[0, own], model.hidden(ids_BL[:, own]).x_BLD[0]) < 1e-5


@torch.no_grad()
def test_a_model_that_is_not_causal_reads_rows_of_one_length_together() -> None:
    model, ids_BL = tiny("AE", E={"router": "expert_choice", "n_experts": 2}), batch()
    real_BL = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    found, aux = hidden_of_rows(model, ids_BL, real_BL.long())
    for length in set(LENGTHS):
        rows = [row for row, own in enumerate(LENGTHS) if own == length]
        assert relative(found[rows, :length], model.hidden(ids_BL[rows, :length]).x_BLD) < 1e-5
    expected = model.hidden(ids_BL).aux
    assert (set(aux.losses), set(aux.stats)) == (set(expected.losses), set(expected.stats))


@torch.no_grad()
def test_rows_of_states_are_reordered_repeated_and_joined() -> None:
    model, ids_BL = tiny("AM"), batch()
    states = RowStates(model, 4)
    states.read(model, ids_BL, torch.arange(12) < torch.tensor(LENGTHS)[:, None])
    assert len(states.groups) == 3  # attention keeps lengths apart
    states.select(torch.tensor([2, 0, 0]))
    found = states.read(model, ids_BL[:3, :1])
    for row, (old, length) in enumerate([(2, 12), (0, 7), (0, 7)]):
        alone = model.hidden(torch.cat([ids_BL[old : old + 1, :length], ids_BL[row : row + 1, :1]], dim=1)).x_BLD
        assert relative(found[row], alone[0, -1:]) < 1e-5
    recurrent = tiny("MF")
    states = RowStates(recurrent, 4)
    states.read(recurrent, ids_BL, torch.arange(12) < torch.tensor(LENGTHS)[:, None])
    assert [rows.tolist() for rows, _ in states.groups] == [[0, 1, 2, 3]]


@pytest.mark.parametrize("lengths", [[1, 2], [0, 1, 1, 1], [1, 1, 1, 13], [1.0, 1.0, 1.0, 1.0]])
def test_lengths_that_are_no_prompts_are_refused(lengths: list[float]) -> None:
    with pytest.raises(ConfigError) as error:
        tiny("M").generate(batch(), 1, lengths=lengths)
    assert (error.value.field, error.value.got) == ("lengths", lengths)
