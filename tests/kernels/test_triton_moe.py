"""The Triton form of routed experts against the loop over tokens in float64, under Triton's interpreter."""

import pytest
import torch

from hybridnas.errors import KernelUnavailableError
from hybridnas.kernels.moe_dispatch import Experts, expert_choice, token_choice
from hybridnas.kernels.moe_dispatch import triton as host

pytestmark = [pytest.mark.usefixtures("unwritten_memory_is_nan"), pytest.mark.interpreter, pytest.mark.slow]


def drawn(tokens, choices, n_experts, width, hidden, outer, *, gated=False, bias=True, dtype=torch.float32):
    """Return x, gates, the experts' tensors, and K distinct experts a token."""
    make = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=make).to(dtype)

    first = 2 * hidden if gated else hidden
    leaves = [normal(tokens, width), torch.rand(tokens, choices, generator=make), normal(n_experts, width, first)]
    leaves += [normal(n_experts, hidden, outer)]
    if bias:
        leaves += [normal(n_experts, first), normal(n_experts, outer)]
    expert = torch.rand(tokens, n_experts, generator=make).argsort(1)[:, :choices]
    return leaves, expert


def run(leaves, index, impl, *, gated=False, capacity=None, pick=False):
    """Return output and gradients, and what each expert got."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    experts = Experts(*leaves[2:], *[None] * (6 - len(leaves)), activation="silu", gated=gated)
    if pick:
        y, counts = expert_choice(leaves[0], leaves[1], index, experts, impl=impl), None
    else:
        y, counts = token_choice(leaves[0], leaves[1], index, experts, capacity=capacity, impl=impl)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(leaves[0].dtype)
    if leaves[0].dtype == torch.float64:
        upstream = upstream.to(torch.bfloat16).double()
    else:
        upstream = upstream.to(torch.bfloat16).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, upstream)], counts


def compare(shape, *, dtype=torch.float32, bias=True, **more):
    leaves, index = drawn(*shape, bias=bias, dtype=dtype, gated=more.get("gated", False))
    got, counts = run(leaves, index, "triton", **more)
    wanted, wanted_counts = run([t.double() for t in leaves], index, "reference", **more)
    assert counts.tolist() == wanted_counts.tolist()
    pairs = zip(got, wanted, strict=True)
    return [((g.double() - w).abs().max() / w.abs().max().clamp_min(1e-30)).item() for g, w in pairs]


@pytest.mark.parametrize(
    ("shape", "more"),
    [
        ((7, 1, 3, 5, 4, 6), {}),
        ((1, 1, 1, 1, 1, 1), {}),
        ((20, 2, 3, 20, 7, 9), {"gated": True}),
        ((20, 3, 5, 33, 7, 9), {"capacity": 6, "bias": False}),
        ((20, 1, 2, 3, 5, 40), {"capacity": 8}),
        ((9, 2, 12, 3, 2, 4), {}),
    ],
    ids=str,
)
def test_outputs_and_gradients_agree_with_the_loop_in_float64(shape, more):
    errors = compare(shape, **more)
    assert max(errors) < 2e-6, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_and_no_worse(dtype):
    errors = compare((13, 2, 2, 3, 7, 5), dtype=dtype)
    assert max(errors) < 8 * torch.finfo(dtype).eps, errors


def test_experts_may_pick_their_tokens():
    leaves, _ = drawn(13, 3, 4, 3, 7, 5)
    index = torch.stack([torch.randperm(13, generator=torch.Generator().manual_seed(e))[:3] for e in range(4)])
    leaves[1] = torch.rand(4, 3)
    got, _ = run(leaves, index, "triton", pick=True)
    wanted, _ = run([t.double() for t in leaves], index, "reference", pick=True)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_choices_are_grouped_in_the_order_of_tokens():
    expert = torch.tensor([[2, 0], [2, 1], [0, 2]]).repeat(50, 1)
    slot, choice, ends, counts = host.group(expert, 4, None)
    assert counts.tolist() == [100, 50, 150, 0] and ends.tolist() == [100, 150, 300, 300]
    order = torch.sort(expert.flatten(), stable=True).indices
    assert torch.equal(choice.long(), order)
    assert torch.equal(slot.flatten()[order], torch.arange(300, dtype=torch.int32))
    slot, choice, ends, counts = host.group(expert, 4, 60)
    assert counts.tolist() == [100, 50, 150, 0] and ends.tolist() == [60, 110, 170, 170]
    kept = torch.cat([order[:60], order[100:150], order[150:210]])
    assert torch.equal(choice[:170].long(), kept) and int((slot >= 0).sum()) == 170


def test_no_token_and_a_width_it_refuses():
    leaves, expert = drawn(0, 1, 2, 3, 4, 5)
    (y, *gradients), counts = run(leaves, expert, "triton")
    assert y.shape == (0, 5) and counts.tolist() == [0, 0] and not gradients[2].any()
    leaves, expert = drawn(2, 1, 2, 3, 4, 5)
    with pytest.raises(KernelUnavailableError, match=r"^moe_dispatch impl='triton' takes .*, got float64; use"):
        run([t.double() for t in leaves], expert, "triton")


def test_the_operators_trace_and_keep_torchs_contract():
    torch.use_deterministic_algorithms(False)
    leaves, expert = drawn(5, 2, 3, 4, 3, 2)
    leaves = [t.requires_grad_() for t in leaves]

    def both(impl):
        return token_choice(leaves[0], leaves[1], expert, Experts(*leaves[2:]), capacity=3, impl=impl)[0]

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)("triton")
    torch.testing.assert_close(compiled, both("reference"), rtol=1e-5, atol=1e-5)
    slot, choice, ends, _ = host.group(expert, 3, None)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    ops = torch.ops.hybridnas
    multiplied = (leaves[0], leaves[2], leaves[4], choice // 2, slot, ends)
    torch.library.opcheck(ops.moe_multiply, multiplied, test_utils=checks)
    torch.library.opcheck(ops.moe_combine, (torch.randn(10, 4, requires_grad=True), leaves[1], slot))
    torch.library.opcheck(ops.moe_group, (expert, 3, 2), test_utils=checks[:1])
