"""The gated short convolution against transformers' LFM2 and LFM3: outputs, and gradients of input and every weight."""

import importlib

import pytest
import torch
from oracles import relative_errors

from hybridnas.blocks.gated_conv import GatedConv

pytest.importorskip("transformers")


@pytest.mark.parametrize(("family", "taps"), [("lfm2", 3), ("lfm3", 7)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_outputs_and_gradients_equal_the_short_convolution_of(family, taps, bias, dtype, most):
    models = importlib.import_module(f"transformers.models.{family}")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    name = family.capitalize()
    config = getattr(models, f"{name}Config")(
        hidden_size=24, num_hidden_layers=1, layer_types=["conv"], conv_L_cache=taps, conv_bias=bias
    )
    torch.manual_seed(0)
    theirs = getattr(module, f"{name}ShortConv")(config, 0).to(dtype)
    ours = GatedConv(GatedConv.Config(d_model=24, d_conv=taps, bias=bias, conv_bias=bias)).to(dtype)
    pairs = [(name, None, name, None) for name, _ in ours.named_parameters()]
    x = torch.randn(2, 31, 24, generator=torch.Generator().manual_seed(1), dtype=dtype)
    output, gradients = relative_errors(ours, theirs, pairs, x, run_ours=lambda block, x: block(x).y_BLD)
    assert output <= most
    assert gradients <= most
