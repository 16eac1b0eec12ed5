"""Cross-entropy, with and without the head, against its float64 specification: values, gradients, masks, dtypes."""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridnas.errors import ConfigError, KernelInputError, KernelUnavailableError
from hybridnas.kernels.cross_entropy import cross_entropy, describe, eager, linear_cross_entropy, native, token_scores

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C compiler")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPS = torch.ops.hybridnas


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks, the last one shorter, at sizes that a test can afford."""
    monkeypatch.setattr(eager, "_FUSED_ROWS", 5)
    monkeypatch.setattr(eager, "_FUSED_BYTES", 0)


def make(tokens, features, vocabulary, *, ignored=0.3, seed=0, dtype=torch.float64):
    """Return x, weight, targets; a share of the targets is ignored."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, features).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, features).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,)).masked_fill(torch.rand(tokens) < ignored, -100)
    return x, weight, targets


def spelled_out(x, weight, targets, reduction="mean"):
    """Loss and gradients of the textbook form in float64, which is nothing but log_softmax and an index."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    counts = targets != -100
    loss = -(x @ weight.T).log_softmax(1).gather(1, targets.clamp(min=0)[:, None])[:, 0] * counts
    if reduction != "none":
        loss = loss.sum() / (counts.sum().clamp(min=1) if reduction == "mean" else 1)
    return loss, x, weight


def assert_close(got, true, tolerance):
    scale = max(true.abs().max().item(), 1.0) if true.numel() else 1.0
    error = (got.double() - true).abs().max().item() if true.numel() else 0.0
    assert got.shape == true.shape
    assert error <= tolerance * scale, f"off by {error:.1e} of {scale:.1e}"


def assert_agrees(function, x, weight, targets, reduction, tolerance):
    """Compare a loss and its gradients, upstream gradients other than one included, with the float64 form."""
    torch.manual_seed(1)
    got = function(x, weight, targets, reduction=reduction)
    true, x64, weight64 = spelled_out(x, weight, targets, reduction)
    upstream = torch.randn(true.shape, dtype=torch.float64)
    assert_close(got, true, tolerance)
    for mine, theirs in zip(
        torch.autograd.grad(got, (x, weight), upstream.to(got.dtype)),
        torch.autograd.grad(true, (x64, weight64), upstream),
        strict=True,
    ):
        assert_close(mine, theirs, tolerance)


def on_logits(x, weight, targets, **options):
    return cross_entropy(x @ weight.T, targets, **options)


def linear_by(impl):
    return lambda *args, **options: linear_cross_entropy(*args, impl=impl, **options)


def logits_by(impl):
    return lambda *args, **options: on_logits(*args, impl=impl, **options)


PATHS = {f"{name} {impl}": by(impl) for name, by in (("head", linear_by), ("logits", logits_by))
         for impl in ("reference", "torch", "auto")}  # fmt: skip
cases = st.tuples(
    st.sampled_from([0, 1, 2, 5, 13, 31]),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([1, 2, 7, 31, 101]),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from(["mean", "sum", "none"]),
    st.integers(0, 1000),
)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=30)
@given(case=cases)
def test_losses_and_gradients_are_those_of_the_specification(path, small_chunks, case):
    tokens, features, vocabulary, ignored, reduction, seed = case
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        x, weight, targets = make(tokens, features, vocabulary, ignored=ignored, seed=seed, dtype=dtype)
        assert_agrees(PATHS[path], x, weight, targets, reduction, tolerance)


def test_torch_agrees_with_the_specification():
    x, weight, targets = make(40, 8, 30)
    assert_close(
        linear_cross_entropy(x, weight, targets, impl="reference"), F.cross_entropy(x @ weight.T, targets), 1e-14
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_z_loss_adds_the_squared_logarithm_of_the_normalizer_of_what_counts(path, reduction, small_chunks):
    x, weight, targets = make(23, 5, 31, ignored=0.3, seed=4, dtype=torch.float64)
    got = PATHS[path](x, weight, targets, reduction=reduction, z_loss=0.1)
    counts = targets != -100
    logits = x @ weight.T
    true = F.cross_entropy(logits, targets, reduction="none") + 0.1 * torch.logsumexp(logits, 1).square() * counts
    true = {"mean": true.sum() / counts.sum(), "sum": true.sum(), "none": true}[reduction]
    upstream = torch.randn(true.shape, dtype=torch.float64)
    assert_close(got, true, 1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(got, (x, weight), upstream), torch.autograd.grad(true, (x, weight), upstream), strict=True
    ):
        assert_close(mine, theirs, 1e-12)


@pytest.mark.parametrize("impl", ["reference", "torch", "auto"])
def test_nothing_counted_costs_nothing(impl):
    x, weight, targets = make(6, 4, 9, ignored=1.0)
    loss = linear_cross_entropy(x, weight, targets, impl=impl)
    loss.backward()
    assert loss.item() == 0 and x.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


@pytest.mark.parametrize("impl", ["reference", "torch", "auto"])
def test_a_mask_is_the_same_as_ignored_targets_and_leading_dimensions_are_kept(impl):
    x, weight, targets = make(12, 4, 9, ignored=0.0)
    mask = torch.arange(12).view(3, 4) % 3 != 0
    x_3, targets_3 = x.view(3, 4, 4), targets.view(3, 4)
    masked = linear_cross_entropy(x_3, weight, targets_3, mask=mask, reduction="none", impl=impl)
    ignored = linear_cross_entropy(
        x_3, weight, targets_3.masked_fill(~mask, 7), ignore_index=7, reduction="none", impl=impl
    )
    counts = mask & (targets_3 != 7)
    assert masked.shape == (3, 4) and not masked[~mask].any()
    assert torch.allclose(masked * counts, ignored * counts)


def test_only_what_is_asked_for_is_differentiated(small_chunks):
    x, weight, targets = make(23, 4, 9)
    true, x64, weight64 = spelled_out(x, weight, targets)
    dx, dweight = torch.autograd.grad(true, (x64, weight64))
    only_x = linear_cross_entropy(x, weight.detach(), targets, impl="torch")
    only_weight = linear_cross_entropy(x.detach(), weight, targets, impl="torch")
    assert_close(torch.autograd.grad(only_x, x)[0], dx, 1e-12)
    assert_close(torch.autograd.grad(only_weight, weight)[0], dweight, 1e-12)
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, targets, impl="torch").requires_grad


def test_a_graph_that_is_kept_gives_the_same_gradient_twice():
    x, weight, targets = make(9, 4, 9)
    loss = 3 * linear_cross_entropy(x, weight, targets, impl="torch")
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_pass_gradcheck(small_chunks, reduction):
    x, weight, targets = make(7, 3, 4)
    assert torch.autograd.gradcheck(lambda *xw: linear_by("torch")(*xw, targets, reduction=reduction), (x, weight))
    logits = (x @ weight.T).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: cross_entropy(v, targets, reduction=reduction, impl="torch"), (logits,))


@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_extreme_logits_stay_finite_and_right(impl):
    x = torch.tensor([[1000.0], [-1000.0], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    loss = linear_cross_entropy(x, weight, torch.tensor([1, 1, 0]), reduction="none", impl=impl)
    assert torch.allclose(loss, torch.tensor([2000.0, 0.0, 1.0986123]))
    loss.sum().backward()
    assert x.grad.isfinite().all() and x.grad[0] == 2.0


def test_tokens_of_no_probability_are_allowed_and_a_wrong_number_is_not_hidden():
    logits = torch.tensor([[0.0, float("-inf")], [float("nan"), 0.0]])
    for impl in ("reference", "torch", "auto"):
        loss = cross_entropy(logits, torch.tensor([0, 0]), reduction="none", impl=impl)
        assert loss[0] == 0 and loss[1].isnan()


@pytest.mark.parametrize("path", ["head torch", "head auto", "logits torch"])
def test_bfloat16_is_as_right_as_its_inputs(path, small_chunks):
    x, weight, targets = make(40, 8, 30, dtype=torch.bfloat16)
    # the float64 form of the same rounded inputs; an eighth bit of rounding is 2^-9, a few of them meet in a sum
    assert_agrees(PATHS[path], x, weight, targets, "mean", 4 * 2**-9)
    assert linear_cross_entropy(x, weight, targets).dtype == torch.float32


def test_under_autocast_masters_stay_float32_and_so_does_the_loss():
    x, weight, targets = make(40, 8, 30, dtype=torch.float32)
    true, *_ = spelled_out(x.bfloat16(), weight.bfloat16(), targets)
    for impl in ("torch", "auto"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = linear_cross_entropy(x, weight, targets, impl=impl)
        dx, dweight = torch.autograd.grad(loss, (x, weight))
        assert loss.dtype == dx.dtype == dweight.dtype == torch.float32
        assert_close(loss, true, 4 * 2**-9)


def test_scores_are_what_evaluation_computes_from_logits(small_chunks):
    x, weight, targets = make(33, 4, 9, dtype=torch.float32)
    scores = token_scores(x.view(3, 11, 4), weight, targets.view(3, 11))
    logits, counts = (x @ weight.T).detach(), targets != -100
    assert scores.loss.shape == scores.correct.shape == (3, 11) and not scores.loss.requires_grad
    assert torch.equal(scores.correct.flatten(), (logits.argmax(1) == targets) & counts)
    assert torch.allclose(scores.logsumexp.flatten()[counts], logits.logsumexp(1)[counts], atol=1e-6)
    assert torch.allclose(scores.loss.sum(), F.cross_entropy(logits, targets, reduction="sum"), rtol=1e-6)
    nothing = token_scores(x[:0], weight, targets[:0])
    assert nothing.loss.shape == (0,) and nothing.correct.dtype == torch.bool


def test_equal_likeliest_tokens_count_as_the_first():
    scores = token_scores(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1]))
    assert scores.correct.tolist() == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("need", [(True, True), (False, False), (True, False)])
def test_the_operators_keep_torchs_contract(small_chunks, need):
    x, weight, targets = make(13, 4, 9, dtype=torch.float32)
    torch.library.opcheck(OPS.linear_cross_entropy, (x, weight, targets, -100, 1e-3, *need, "torch"))
    logits = (x @ weight.T).detach().requires_grad_()
    torch.library.opcheck(OPS.cross_entropy, (logits, targets, -100, 1e-3, "torch"))


@pytest.mark.slow
def test_both_compile_in_one_graph_and_export():
    x, weight, targets = make(13, 4, 9, dtype=torch.float32)

    def both(x, weight):
        head = linear_cross_entropy(x, weight, targets, mask=targets > 2, impl="torch")
        return head + on_logits(x, weight, targets, impl="torch") + linear_cross_entropy(x, weight, targets)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(
        torch.autograd.grad(compiled(x, weight), (x, weight)),
        torch.autograd.grad(both(x, weight), (x, weight)),
        strict=True,
    ):
        assert_close(mine, theirs.double(), 1e-6)

    class Head(torch.nn.Module):
        def forward(self, x, weight):
            return both(x, weight)

    exported = torch.export.export(Head(), (x.detach(), weight.detach())).module()
    assert_close(exported(x, weight).detach(), both(x, weight).detach().double(), 1e-6)


def test_auto_is_torchs_own_calls_for_one_chunk_and_chunks_beyond(monkeypatch):
    x, weight, targets = make(300, 4, 9, ignored=0.0)  # float64, which has no C form
    assert eager.chunk_rows(256) == 8192 and eager.chunk_rows(4096) == 512 and eager.chunk_rows(50257) == 128
    assert "linear_cross_entropy" not in graph_names(linear_cross_entropy(x, weight, targets))
    assert "linear_cross_entropy" in graph_names(linear_cross_entropy(x, weight, targets, mask=targets > 3))
    monkeypatch.setattr(eager, "_FUSED_BYTES", 0)
    assert "linear_cross_entropy" in graph_names(linear_cross_entropy(x, weight, targets))


def graph_names(loss):
    """Return the names of all backward nodes, joined."""
    found, nodes = [], [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        found.append(node.name())
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return " ".join(found)


def test_a_wrong_argument_is_named_with_what_was_expected_and_got():
    x, weight, targets = make(4, 3, 5, ignored=0.0, dtype=torch.float32)
    floating = "floating-point tensor (..., D)"
    for wrong, got, allowed in (
        ({"x": x[0]}, "(3,), torch.float32", floating),
        ({"x": x.long()}, "(4, 3), torch.int64", floating),
        ({"weight": weight.T.contiguous()}, (3, 5), (3, 3)),
        ({"weight": weight.double()}, torch.float64, torch.float32),
        ({"weight": weight[:0]}, (0, 3), "V >= 1"),
        ({"targets": targets.float()}, torch.float32, "integers"),
        ({"targets": [1, 2, 3, 4]}, "list", "integers"),
        ({"targets": targets[:3]}, (3,), (4,)),
        ({"mask": targets}, torch.int64, "bools"),
        ({"targets": targets.to("meta")}, torch.device("meta"), torch.device("cpu")),
    ):
        with pytest.raises(KernelInputError) as refused:
            linear_cross_entropy(**({"x": x, "weight": weight, "targets": targets} | wrong))
        (field,) = wrong
        assert (refused.value.field, refused.value.got, refused.value.allowed) == (field, got, allowed)
    for impl in ("torch", "auto"):
        for value in (5, -1):
            with pytest.raises(KernelInputError) as refused:
                linear_cross_entropy(x, weight, torch.tensor([0, value, 1, -100]), impl=impl)
            assert refused.value.got == value and refused.value.allowed == "0..4 or ignore_index=-100"
            with pytest.raises(KernelInputError) as refused:
                on_logits(x, weight, torch.tensor([0, value, 1, 2]), impl=impl)
            assert refused.value.field == "targets" and refused.value.got == value
    with pytest.raises(ConfigError) as refused:
        linear_cross_entropy(x, weight, targets, reduction="avg")
    assert (refused.value.field, refused.value.allowed) == ("reduction", ("mean", "sum", "none"))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_is_refused_on_a_processor():
    x, weight, targets = make(4, 3, 5)
    with pytest.raises(KernelUnavailableError, match="linear_cross_entropy impl='triton' needs a CUDA device"):
        linear_cross_entropy(x, weight, targets, impl="triton")
    assert describe("cpu", torch.float64).startswith("torch: with the head in chunks")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 37, 256, 1031])
def test_rows_in_c_agree_with_the_specification(small_chunks, dtype, vocabulary):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4 * 2**-9}[dtype]
    x, weight, targets = make(13, 3, vocabulary, dtype=dtype)
    for reduction in ("mean", "none"):
        assert_agrees(linear_by("native"), x, weight, targets, reduction, tolerance)
        assert_agrees(logits_by("native"), x, weight, targets, reduction, 4 * tolerance)  # logits rounded as well


@needs_compiler
def test_rows_in_c_take_strides_improbable_tokens_and_wrong_numbers_and_keep_torchs_contract():
    logits = torch.randn(7, 2 * 37)[:, ::2]
    logits[0, :36] = float("-inf")
    logits[5, 3], logits[6, 3] = float("nan"), float("inf")
    targets = torch.tensor([36, 0, -100, 5, 36, 1, 1])
    got = cross_entropy(logits, targets, reduction="none", impl="native")
    true = cross_entropy(logits.double(), targets, reduction="none", impl="reference")
    assert_close(got[:5], true[:5], 1e-6)
    assert got[5:].isnan().all() and true[5:].isnan().all()
    x, weight, targets = make(5, 4, 9, dtype=torch.float32)
    torch.library.opcheck(OPS.linear_cross_entropy, (x, weight, targets, -100, 1e-3, True, True, "native"))
    logits = (x @ weight.T).detach().requires_grad_()
    torch.library.opcheck(OPS.cross_entropy, (logits, targets, -100, 1e-3, "native"))


@needs_compiler
def test_a_row_in_c_is_the_same_bits_alone_and_on_any_number_of_threads():
    logits, targets = torch.randn(64, 301), torch.randint(301, (64,))
    torch.set_num_threads(2)
    try:
        two = cross_entropy(logits, targets, reduction="none", impl="native")
    finally:
        torch.set_num_threads(1)
    assert torch.equal(cross_entropy(logits, targets, reduction="none", impl="native"), two)
    assert torch.equal(cross_entropy(logits[9:10], targets[9:10], reduction="none", impl="native"), two[9:10])


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 37, 1031])
def test_triton_rows_agree_with_the_specification(small_chunks, dtype, vocabulary):
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4 * 2**-9}[dtype]
    x, weight, targets = make(7, 3, vocabulary, dtype=dtype)
    for reduction in ("mean", "none"):
        assert_agrees(linear_by("triton"), x, weight, targets, reduction, tolerance)
        assert_agrees(logits_by("triton"), x, weight, targets, reduction, 4 * tolerance)  # logits rounded as well


@pytest.mark.interpreter
def test_triton_rows_take_strides_and_improbable_tokens_and_keep_torchs_contract():
    logits = torch.randn(5, 2 * 37)[:, ::2]
    logits[0, :36] = float("-inf")
    targets = torch.tensor([36, 0, -100, 5, 36])
    got = cross_entropy(logits, targets, reduction="none", impl="triton")
    assert_close(got, cross_entropy(logits.double(), targets, reduction="none", impl="reference"), 1e-6)
    logits = torch.randn(5, 9, requires_grad=True)
    torch.library.opcheck(OPS.cross_entropy, (logits, targets.clamp(max=8), -100, 1e-3, "triton"))
