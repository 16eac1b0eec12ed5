"""Every letter under every variant on a GPU: what it gives in float64 on a processor, in pieces and packed too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybridnas.layers import Block, Variant
from hybridnas.registry import BLOCKS
from hybridnas.testing import build, config_of, run_in_chunks, tokens
from tests.oracles import relative

pytestmark = pytest.mark.gpu

LENGTH = 70
CASES = [(BLOCKS.get(letter), variant) for letter in BLOCKS for variant in BLOCKS.get(letter).test_configs()]
CAUSAL = [case for case in CASES if config_of(*case).causal]
Case = tuple[type[Block], Variant]


def words(case: Case) -> str:
    return f"{case[0].letter} {dict(case[1].fields)}"


@pytest.mark.parametrize("case", CASES, ids=words)
def test_outputs_and_gradients_are_those_of_float64(case: Case, device: torch.device) -> None:
    found: list[list[Any]] = []
    for block in (build(*case).double(), build(*case).to(device)):
        weight = next(block.parameters())
        x_BLD = tokens(2, LENGTH).to(weight.device, weight.dtype).requires_grad_()
        y_BLD = block(x_BLD).y_BLD
        upstream = tokens(2, LENGTH, seed=2).to(y_BLD)
        found.append([y_BLD, *torch.autograd.grad(y_BLD, [x_BLD, *block.parameters()], upstream, allow_unused=True)])
    for expected, got in zip(*found, strict=True):
        assert (expected is None) == (got is None)
        if expected is not None:
            assert relative(got.detach().cpu(), expected.detach()) < 1e-3


@pytest.mark.parametrize("case", CAUSAL, ids=words)
@torch.no_grad()
def test_pieces_and_packed_documents_agree_with_the_whole(case: Case, device: torch.device) -> None:
    block, x_BLD = build(*case).to(device), tokens(2, LENGTH).to(device)
    whole_BLD = block(x_BLD).y_BLD
    assert relative(run_in_chunks(block, x_BLD, [33, 1, 36])[0], whole_BLD) < 1e-3
    if block.takes_segments:
        segments_BL = (torch.arange(LENGTH, device=device) >= 30).long().expand(2, -1)
        packed_BLD = block(x_BLD, segments_BL=segments_BL).y_BLD
        alone_BLD = torch.cat([whole_BLD[:, :30], block(x_BLD[:, 30:]).y_BLD], dim=1)
        assert relative(packed_BLD, alone_BLD) < 1e-3


@pytest.mark.parametrize("case", CASES, ids=words)
def test_bfloat16_is_near_float32(case: Case, device: torch.device) -> None:
    block, x_BLD = build(*case).to(device), tokens(2, LENGTH).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        y_BLD = block(x_BLD).y_BLD
    exact_BLD = block(x_BLD).y_BLD
    y_BLD.float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in block.parameters() if p.grad is not None)
    errors_BL = (y_BLD.float() - exact_BLD).detach().norm(dim=-1) / exact_BLD.detach().norm(dim=-1)
    # the median: a quotient near its pole (mLSTM) may be far off; tokens without any output have no error
    assert float(errors_BL.nanmedian()) < 0.05
    assert bool(y_BLD.isfinite().all())
