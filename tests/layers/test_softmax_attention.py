"""Softmax attention on tensors: every way to compute it gives what one mask over all scores gives."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hybridnas.hardware import Impl
from hybridnas.layers.rotary import rotate, rotation
from hybridnas.layers.softmax_attention import scored_pairs, softmax_attention


def spelled_out(q, k, v, window, scale, softcap, sink):
    """One query after another, by the definition."""
    past, groups = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    rows = []
    for i in range(q.shape[2]):
        first = 0 if window is None else max(0, past + i + 1 - window)
        keys, values = (x[:, :, first : past + i + 1].repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("bhp,bhtp->bht", q[:, :, i], keys) * (scale or q.shape[3] ** -0.5)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        weights = scores.exp()
        total = weights.sum(-1) + (0 if sink is None else sink.exp())
        rows.append(torch.einsum("bht,bhtv->bhv", weights / total[..., None], values))
    return torch.stack(rows, dim=2)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 90),
    past=st.integers(0, 12),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (3, 1)]),
    values=st.sampled_from([4, 6, 8]),
    window=st.none() | st.integers(1, 70),
    scale=st.none() | st.just(0.9),
    softcap=st.none() | st.just(1.5),
    sink=st.booleans(),
    impl=st.sampled_from([Impl.AUTO, Impl.REFERENCE]),
)
def test_outputs_and_gradients_are_those_of_the_definition(
    length, past, heads, values, window, scale, softcap, sink, impl
):
    make = torch.Generator().manual_seed(length)
    shapes = [(2, heads[0], length, 6), (2, heads[1], past + length, 6), (2, heads[1], past + length, values)]
    inputs = [torch.randn(shape, generator=make, dtype=torch.float64) for shape in shapes]
    inputs += [torch.randn(heads[0], generator=make, dtype=torch.float64)] if sink else []
    upstream = torch.randn(2, heads[0], length, values, generator=make, dtype=torch.float64)

    def outcome(run):
        given = [x.clone().requires_grad_() for x in inputs]
        y = run(given)
        return [y, *torch.autograd.grad((y * upstream).sum(), given)]

    got = outcome(
        lambda g: softmax_attention(
            *g[:3], window=window, scale=scale, softcap=softcap, sink_H=g[3] if sink else None, impl=impl
        )
    )
    expected = outcome(lambda g: spelled_out(*g[:3], window, scale, softcap, g[3] if sink else None))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("length", "window"),
    [(7, None), (7, 9), (40, 40), (41, 40), (200, 5), (333, 100), (64, 1), (600, None), (900, 300)],
)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_declared_pairs_are_those_that_are_multiplied(length, window, softcap):
    q, k, v = (torch.randn(1, heads, length, 8) for heads in (2, 1, 1))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        softmax_attention(q, k, v, window=window, softcap=softcap)
    assert counter.get_total_flops() == 2 * 2 * (8 + 8) * scored_pairs(length, window, written_out=softcap is not None)


@pytest.mark.parametrize("window", [None, 300])
def test_scores_that_are_written_out_in_parts_are_those_of_one_mask(window):
    make = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, 700, 4, generator=make, dtype=torch.float64) for heads in (2, 1, 1)]
    inputs = [x.requires_grad_() for x in (*inputs, torch.randn(2, generator=make, dtype=torch.float64))]

    def outcome(impl):
        y = softmax_attention(*inputs[:3], window=window, softcap=2.0, sink_H=inputs[3], impl=impl)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    for got, expected in zip(outcome(Impl.AUTO), outcome(Impl.REFERENCE), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_the_work_of_a_window_grows_linearly_with_the_length():
    for window in (1, 16, 100, 1000):
        per_token = [scored_pairs(length, window) / length for length in (2**12, 2**15, 2**20)]
        assert max(per_token) <= 1.6 * window + 64
        assert per_token[2] == pytest.approx(per_token[1], rel=0.05)


def test_channels_beyond_the_turned_ones_stay_as_they_are():
    x_BLP = torch.randn(2, 5, 8)
    cos_Lh, sin_Lh = rotation(3, 5, 4, 100.0, x_BLP.device)
    turned = rotate(x_BLP, cos_Lh, sin_Lh)
    assert torch.equal(turned[..., 4:], x_BLP[..., 4:])
    torch.testing.assert_close(turned[..., :4], rotate(x_BLP[..., :4], cos_Lh, sin_Lh))
    pair = torch.complex(x_BLP[..., 0], x_BLP[..., 2]) * torch.polar(torch.ones(5), torch.arange(3.0, 8.0))
    torch.testing.assert_close(torch.complex(turned[..., 0], turned[..., 2]), pair)


@pytest.mark.parametrize("impl", [Impl.AUTO, Impl.REFERENCE])
@pytest.mark.parametrize("window", [None, 3, 50, 200])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_queries_see_the_keys_of_their_own_document_alone(impl, window, softcap):
    make, length = torch.Generator().manual_seed(0), 300  # more rows than are written out together
    q, k, v = (torch.randn(2, heads, length, 4, generator=make, dtype=torch.float64) for heads in (4, 2, 2))
    ends = [(0, 150, 151, 290, 300), (0, 7, 300)]
    place = torch.arange(length)[:, None]
    segments = torch.stack([(place >= torch.tensor(of[1:])).sum(1) for of in ends])
    how = {"window": window, "softcap": softcap}
    found = softmax_attention(q, k, v, segments_BL=segments, impl=impl, **how)
    for row, of in enumerate(ends):
        for first, last in pairwise(of):
            own = (x[row : row + 1, :, first:last] for x in (q, k, v))
            expected = softmax_attention(*own, impl=Impl.REFERENCE, **how)
            torch.testing.assert_close(found[row : row + 1, :, first:last], expected, rtol=0, atol=1e-12)
