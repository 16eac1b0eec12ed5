"""GRU and LSTM against torch's modules, minGRU against its equation in float64; the kernel against the cells."""

import pytest
import torch
from oracles import randomize, relative, relative_errors
from torch import nn

from hybridnas.blocks.gated_rnn import GatedRnn
from hybridnas.errors import KernelInputError, KernelUnavailableError
from hybridnas.kernels.gated_rnn import gated_rnn


class Stacked(nn.Module):
    """torch's recurrent module and a linear layer."""

    def __init__(self, kind, width, hidden, bias):
        super().__init__()
        self.rnn = getattr(nn, kind.upper())(width, hidden, bias=bias, batch_first=True)
        self.out_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        return self.out_proj(self.rnn(x)[0])


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_outputs_and_gradients_equal_torchs_module(kind, bias, dtype, most, impl):
    torch.manual_seed(0)
    theirs = Stacked(kind, 12, 20, bias).to(dtype)
    randomize(theirs)
    ours = GatedRnn(GatedRnn.Config(d_model=12, d_inner=20, kind=kind, bias=bias), impl=impl).to(dtype)
    pairs = [
        (name, None, name if name.startswith("out") else f"rnn.{name}_l0", None) for name, _ in ours.named_parameters()
    ]
    x = torch.randn(2, 31, 12, generator=torch.Generator().manual_seed(1), dtype=dtype)
    output, gradients = relative_errors(ours, theirs, pairs, x, run_ours=lambda block, x: block(x).y_BLD)
    assert output <= most
    assert gradients <= most


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_one_token_after_another_is_torchs_cell(kind):
    torch.manual_seed(0)
    cell = getattr(nn, f"{kind.upper()}Cell")(6, 5).double()
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    state, theirs = None, None
    for x_BD in x.unbind(1):
        y, state = gated_rnn(x_BD[:, None], *(p.detach() for p in cell.parameters()), state, kind=kind)
        theirs = cell(x_BD, theirs)
        expected = theirs if kind == "lstm" else (theirs,)
        for got, true in zip(state, expected, strict=True):
            torch.testing.assert_close(got, true.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y[:, 0], state[0])


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_mingru_is_the_papers_equation(dtype, most):
    torch.manual_seed(0)
    ours, true = (GatedRnn(GatedRnn.Config(d_model=12, d_inner=20, kind="mingru")) for _ in range(2))
    randomize(ours)
    true.load_state_dict(ours.state_dict())

    def paper(block, x):
        gates, values = block.weight_ih.split(20), block.bias_ih.split(20)
        h, outputs = x.new_zeros(x.shape[0], 20), []
        for x_t in x.unbind(1):
            z, n = ((x_t @ w.T + b) for w, b in zip(gates, values, strict=True))
            h = (1 - z.sigmoid()) * h + z.sigmoid() * n
            outputs.append(h)
        return block.out_proj(torch.stack(outputs, 1))

    x = torch.randn(2, 70, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for block, run in ((ours.to(dtype), lambda b, x: b(x).y_BLD), (true.double(), paper)):
        own = x.to(next(block.parameters()).dtype).requires_grad_()
        y = run(block, own)
        found.append((y, *torch.autograd.grad(y.square().sum(), [own, *block.parameters()])))
    assert max(relative(got, expected) for got, expected in zip(*found, strict=True)) <= most


def test_wrong_arguments_are_named():
    good = {"x": torch.zeros(1, 3, 2), "weight_ih": torch.zeros(12, 2), "weight_hh": torch.zeros(12, 4)}
    for changes, field in (
        ({"kind": "rnn"}, "kind"),
        ({"x": torch.zeros(3, 2)}, "x"),
        ({"weight_ih": torch.zeros(12, 3)}, "weight_ih"),
        ({"bias_ih": torch.zeros(12)}, "bias_hh"),
        ({"initial_state": (torch.zeros(1, 4),) * 2}, "initial_state"),
        ({"initial_state": (torch.zeros(1, 3),)}, "initial_state"),
    ):
        with pytest.raises(KernelInputError) as refused:
            gated_rnn(**(good | changes))
        assert refused.value.field == field
    with pytest.raises(KernelUnavailableError):
        gated_rnn(**good, impl="native")
