"""Hyena in modal form against its filter written out, in float64: convolution by definition, outputs and gradients."""

import pytest
import torch
from oracles import randomize, relative

from hybridnas.blocks.hyena import Hyena


def paper(block, x):
    """Return the block's output with every filter written out (arXiv 2302.10866, equations 4 and 5; 2310.18780)."""
    z = block.in_proj(x)
    taps, bias = block.conv1d.weight[:, 0], block.conv1d.bias
    late = [torch.nn.functional.pad(z, (0, 0, back, 0))[:, : z.shape[1]] for back in reversed(range(taps.shape[1]))]
    z = sum(part * tap for part, tap in zip(late, taps.T, strict=True)) + (0 if bias is None else bias)
    x2, x1, v = z.chunk(3, -1)
    u = x1 * v
    poles, residues = torch.view_as_complex(block.poles), torch.view_as_complex(block.residues)
    powers = torch.stack([poles**t for t in range(x.shape[1])])  # (L, I, N)
    h = (residues * powers).sum(-1).real
    y = torch.stack([(h[: t + 1].flip(0) * u[:, : t + 1]).sum(1) for t in range(x.shape[1])], 1)
    return block.out_proj((y + block.D * u) * x2)


@pytest.mark.parametrize("fields", [{}, {"d_state": 4, "d_inner": 10, "bias": False, "conv_bias": False}])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 3e-5), (torch.float64, 1e-11)])
def test_outputs_and_gradients_are_those_of_the_convolution(fields, dtype, most):
    torch.manual_seed(0)
    ours, true = (Hyena(Hyena.Config(d_model=12, **fields)) for _ in range(2))
    randomize(ours, std=0.05)
    with torch.no_grad():
        ours.poles.mul_(0.95)
    true.load_state_dict(ours.state_dict())
    x = torch.randn(2, 70, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.randn(2, 70, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = []
    for block, run in ((ours.to(dtype), lambda b, x: b(x).y_BLD), (true.double(), paper)):
        own = x.to(next(block.parameters()).dtype).requires_grad_()
        y = run(block, own)
        found.append((y, *torch.autograd.grad((y * weights.to(y.dtype)).sum(), [own, *block.parameters()])))
    assert max(relative(got, expected) for got, expected in zip(*found, strict=True)) <= most


def test_poles_are_within_the_unit_circle_at_first_and_filters_fade():
    block = Hyena(Hyena.Config(d_model=200, d_state=4))
    radius = torch.view_as_complex(block.poles.detach()).abs()
    assert radius.max() < 1
    assert radius.min() < 0.5 < 0.99 < radius.max()


def test_a_layer_of_stripedhyena_has_the_weights_of_the_released_one():
    cost = Hyena.Config(d_model=4096, d_state=2).cost(1024)
    assert cost.params + 2 * 4096 == 67_219_456  # with its two norms
    assert cost.state_bytes == 2 * 3 * 4096 * 4 + 4096 * 2 * 8
