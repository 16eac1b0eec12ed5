"""Decoding of the blocks on gated_delta: the fused step of a whole layer against the block's own forward."""

import pytest
import torch
from torch import nn

from hybridnas.kernels.delta_step import native
from hybridnas.layers.norms import LayerNorm, RMSNorm
from hybridnas.registry import BLOCKS

CASES = [(letter, variant.fields) for letter in "GKL" for variant in BLOCKS.get(letter).test_configs()]
needs_compiler = pytest.mark.skipif(not native.available(), reason="no C compiler")


def build(letter, fields, d_model=16):
    torch.manual_seed(0)
    cls = BLOCKS.get(letter)
    return cls(cls.Config(d_model=d_model, **fields)).eval()


def start(block, batch=3):
    return block.init_state(batch, device=torch.device("cpu"), dtype=torch.float32)


@needs_compiler
@pytest.mark.parametrize(("letter", "fields"), CASES)
def test_one_call_for_a_token_equals_the_layers_forward(letter, fields):
    block, norm = build(letter, fields), RMSNorm(16) if fields else LayerNorm(16)
    x_BLD = torch.randn(3, 9, 16)
    with torch.no_grad():
        run, state = block.one_token(norm, start(block)), start(block)
        for x_BD in x_BLD.unbind(1):
            y_BLD, state, _ = block(norm(x_BD[:, None]), state)
            torch.testing.assert_close(run(x_BD.clone()), x_BD + y_BLD[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("letter", "GKL")
def test_a_layer_that_is_more_than_its_weights_has_no_fused_step(letter):
    with torch.no_grad():
        hooked = build(letter, {})
        hooked.out_proj.register_forward_hook(lambda *_: None)
        assert hooked.one_token(RMSNorm(16), start(hooked)) is None
        replaced = build(letter, {})
        replaced.in_proj = nn.Sequential(replaced.in_proj)
        assert replaced.one_token(RMSNorm(16), start(replaced)) is None
        narrow = build(letter, {}).bfloat16()
        assert narrow.one_token(RMSNorm(16), start(narrow)) is None
    assert build(letter, {}).one_token(RMSNorm(16), start(build(letter, {}))) is None  # gradients are on
