"""Packed documents: a model gives for each what it gives for that document alone, outputs, losses and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

import hybridnas
from hybridnas.arch.model import HybridLM
from hybridnas.errors import ConfigError
from hybridnas.layers import Block, BlockConfig, BlockOutput
from hybridnas.layers.segments import positions
from hybridnas.registry import BLOCKS
from tests.oracles import randomize

ENDS = [[30, 31, 64, 72], [97], [1, 2, 65]]  # where documents end in rows of 97 tokens: chunks of kernels have 64
LENGTH = 97
MOE = {"n_experts": 4, "d_expert": 12, "router": "top_k", "top_k": 2, "capacity_factor": None}
MODELS: dict[str, dict[str, Any]] = {
    **{f"{letter}F": {} for letter in sorted(BLOCKS) if letter != "E"},
    "S{window=40}M": {},
    "A{n_heads=2,window=12,softcap=2,sink=true}C": {},
    "A{n_heads=2,kv_rank=6,rope_dim=4}N": {},
    "L{kind=retnet}F": {},
    "ME": {"E": MOE},
    "[M,A]G@g F G@g": {"canon": 3},
    "MA{positions=none}": {"n_meta_tokens": 3},
    "M[Z{skip=true,norm_position=post,mlp_rank=2}@sM]N[Z{skip=true,norm_position=post,mlp_rank=2}@sM]": {},
    "WF{token_shift=true}W{value_rank=3}": {"embedding_norm": True},
}


def tiny(pattern: str, **fields: Any) -> HybridLM:
    model = hybridnas.build(pattern, d_model=16, vocab_size=29, **fields)
    stable = {  # step sizes, decays and poles keep the range of their initialization
        f"{name}.{own}": block.get_parameter(own).detach().clone()
        for name, block in model.named_modules()
        if isinstance(block, Block)
        for own in block.float32
        if own in dict(block.named_parameters())
    }
    randomize(model)
    model.load_state_dict(stable, strict=False)
    return model.double()


def some() -> tuple[Tensor, Tensor]:
    """Return ids and segments, whose numbers need not be consecutive."""
    ids_BL = torch.randint(29, (len(ENDS), LENGTH), generator=torch.Generator().manual_seed(0))
    place_L = torch.arange(LENGTH)
    segments = [3 * (place_L[:, None] >= torch.tensor(ends)).sum(dim=1) + row for row, ends in enumerate(ENDS)]
    return ids_BL, torch.stack(segments)


def documents(ids_BL: Tensor) -> list[tuple[int, int, Tensor]]:
    """Return (row, first place, ids (1, l)) of each document."""
    spans = [
        (row, first, last)
        for row, ends in enumerate(ENDS)
        for first, last in zip([0, *ends], [*ends, LENGTH], strict=True)
    ]
    return [(row, first, ids_BL[row : row + 1, first:last]) for row, first, last in spans if first < last]


def agree(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize(("pattern", "fields"), MODELS.items(), ids=MODELS)
def test_packed_documents_give_what_each_gives_alone(pattern: str, fields: dict[str, Any]) -> None:
    model = tiny(pattern, **fields).train()
    ids_BL, segments_BL = some()
    found = model(ids_BL, labels=ids_BL, segments=segments_BL)
    weights = list(model.parameters())
    got = torch.autograd.grad(found.loss, weights)
    alone_BLV, losses = torch.zeros_like(found.logits), []
    for row, first, own in documents(ids_BL):
        output = model(own, labels=own)
        alone_BLV[row, first : first + own.shape[1]] = output.logits[0].detach()
        losses.append(output.loss * (own.shape[1] - 1))
    targets = LENGTH * len(ENDS) - len(losses)  # a document's first token is predicted from nothing
    alone = sum(losses) / targets
    agree(found.logits, alone_BLV)
    agree(found.loss, alone)
    for gradient, expected in zip(got, torch.autograd.grad(alone, weights), strict=True):
        agree(gradient, expected)


class Unaware(Block):
    """A block of one's own that mixes tokens and knows nothing of documents."""

    letter, name = "Q", "unaware"

    class Config(BlockConfig):
        pass

    def __init__(self, config: Any, *, impl: Any = "auto") -> None:
        super().__init__(config, impl=impl)
        self.weight = torch.nn.Parameter(torch.ones(config.d_model))

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        torch.nn.init.ones_(self.weight)

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Any:
        return (torch.zeros(batch_size, self.config.d_model, device=device, dtype=dtype),)

    def forward(self, x_BLD: Tensor, state: Any = None) -> BlockOutput:
        return BlockOutput((self.weight * x_BLD).cumsum(dim=1), None)


def test_a_block_that_takes_no_segments_reads_each_document_as_a_row() -> None:
    model = tiny("MF")
    model.layers[1].branches[0][0] = Unaware(BlockConfig(d_model=16)).double()
    ids_BL, segments_BL = some()
    found = model(ids_BL, segments=segments_BL).logits
    for row, first, own in documents(ids_BL):
        agree(found[row, first : first + own.shape[1]], model(own).logits[0])


def test_positions_start_again_with_each_document() -> None:
    assert positions(torch.tensor([[0, 0, 4, 4, 4, 5], [7, 8, 8, 8, 8, 8]])).tolist() == [
        [0, 1, 0, 1, 2, 0],
        [0, 0, 1, 2, 3, 4],
    ]


def test_one_document_a_row_is_no_change() -> None:
    model, ids_BL = tiny("MANG"), some()[0]
    agree(model(ids_BL, segments=torch.zeros_like(ids_BL)).logits, model(ids_BL).logits)
    assert model(ids_BL[:, :0], segments=ids_BL[:, :0]).logits.shape == (3, 0, 29)


FALLING = torch.tensor([[0, 0, 1, 1], [0, 2, 1, 1]])


@pytest.mark.parametrize(
    ("segments", "got"),
    [
        (FALLING, (2, 1)),
        (torch.zeros(2, 5, dtype=torch.long), "(2, 5) torch.int64"),
        (torch.zeros(2, 4), "(2, 4) torch.float32"),
        (torch.zeros(2, 4, dtype=torch.bool), "(2, 4) torch.bool"),
        ([[0, 0, 1, 1]], "list"),
    ],
    ids=["falling", "another shape", "floats", "booleans", "a list"],
)
def test_segments_that_are_none_are_refused_in_one_sentence(segments: Any, got: Any) -> None:
    model = tiny("M")
    for call in (lambda: model(torch.zeros(2, 4, dtype=torch.long), segments=segments),
                 lambda: model.hidden(torch.zeros(2, 4, dtype=torch.long), segments_BL=segments)):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            call()
        assert (caught.value.field, caught.value.got) == ("segments", got)
        assert caught.value.allowed is not None
        assert "\n" not in str(caught.value)


def test_segments_beside_a_state_are_refused() -> None:
    model, ids_BL = tiny("MA"), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ConfigError) as caught:
        model(ids_BL, state=model.init_state(1), segments=ids_BL)
    assert caught.value.field == "segments"
