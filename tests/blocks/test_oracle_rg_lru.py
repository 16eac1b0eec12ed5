"""The RG-LRU block against transformers' RecurrentGemma: outputs, and gradients of input and every weight."""

import pytest
import torch
from oracles import randomize, relative_errors

from hybridnas.blocks.rg_lru import RgLru

pytest.importorskip("transformers")


def pair(dtype, width=24):
    from transformers.models.recurrent_gemma import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    config = RecurrentGemmaConfig(hidden_size=24, lru_width=width, num_attention_heads=3)
    torch.manual_seed(0)
    theirs = RecurrentGemmaRecurrentBlock(config, 0).to(dtype)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "rg_lru" in name:
                parameter.zero_()
    randomize(theirs)
    ours = RgLru(RgLru.Config(d_model=24, d_inner=width, gate_blocks=3)).to(dtype)
    return ours, theirs, [(name, None, name, None) for name, _ in ours.named_parameters()]


@pytest.mark.parametrize("width", [24, 36])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_outputs_and_gradients_equal_the_recurrent_block_of_recurrent_gemma(dtype, most, width):
    ours, theirs, pairs = pair(dtype, width)
    # theirs sums in float32 whatever the dtype
    theirs.rg_lru._rnn_scan = lambda *a, f=theirs.rg_lru._rnn_scan, **k: f(*a, **k, acc_dtype=dtype)
    x = torch.randn(2, 31, 24, generator=torch.Generator().manual_seed(1), dtype=dtype)
    output, gradients = relative_errors(
        ours,
        theirs,
        pairs,
        x,
        run_ours=lambda block, x: block(x).y_BLD,
        run_theirs=lambda block, x: block(x, torch.arange(31).expand(2, -1), None, use_cache=False)[0],
    )
    assert output <= most
    assert gradients <= most


def test_the_first_token_of_a_document_is_not_scaled():
    ours, theirs, _ = pair(torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 20, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    segments = torch.tensor([[0] * 7 + [1] * 13])
    with torch.no_grad():
        packed = ours(x, segments_BL=segments).y_BLD
        alone = torch.cat([ours(part).y_BLD for part in (x[:, :7], x[:, 7:])], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)


def test_the_slope_of_the_root_is_clipped_where_a_decay_is_one():
    ours, _, _ = pair(torch.float32)
    with torch.no_grad():
        ours.rg_lru.recurrent_param.fill_(-40.0)  # softplus is 0 in float32: a is 1, the root's slope infinite
    x = torch.randn(2, 9, 24, requires_grad=True)
    gradients = torch.autograd.grad(ours(x).y_BLD.square().sum(), [x, *ours.parameters()])
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
