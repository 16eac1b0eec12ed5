"""Gated linear recurrences against their float64 recurrence, in every form."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridnas.errors import KernelInputError, KernelUnavailableError
from hybridnas.kernels.gated_delta import OPERATION, describe, gated_delta, native

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
needs_c = pytest.mark.skipif(not native.available(), reason="no C compiler")
FORMS = ["torch", pytest.param("native", marks=needs_c)]
DECAYS = {"none": None, "fixed": "H", "head": "BLH", "channel": "BLHK"}
recurrence = partial(gated_delta, return_final_state=True)


def inputs(
    batch, length, groups, share, size, width, *, decay="head", delta=True, initial=True, strength=1.0, seed=0,
    dtype=torch.float64,
):  # fmt: skip
    make = torch.Generator().manual_seed(seed)
    sizes = {"B": batch, "L": length, "G": groups, "H": groups * share, "K": size, "V": width}

    def normal(letters):
        return torch.randn([sizes[letter] for letter in letters], generator=make).to(dtype)

    # keys of length one and beta up to two, so that I - beta k k^T never grows the state
    values = {"q": normal("BLGK"), "k": torch.nn.functional.normalize(normal("BLGK"), dim=-1), "v": normal("BLHV")}
    if DECAYS[decay]:
        values["log_decay"] = -strength * torch.exp(normal(DECAYS[decay]) - 1)
    if delta:
        values["beta"] = 2 * torch.sigmoid(normal("BLH"))
    if initial:
        values["initial_state"] = normal("BHKV")
    return {name: v.requires_grad_() for name, v in values.items()}


def run(function, values, **others):
    outputs = function(**values, **others)
    make = torch.Generator().manual_seed(7)
    grads = [torch.randn(o.shape, generator=make).to(o.dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(values.values()), grads)
    return dict(zip(("o", "final", *values), (*outputs, *gradients), strict=True))


def compare(form, shape, options, *, ids=None, chunk=64, least=0.0):
    true = run(recurrence, inputs(*shape, **options), seq_idx=ids, impl="reference")
    dtypes = {torch.float32: 1e-5} | ({torch.float64: 1e-11} if form == "torch" else {})
    for dtype, allowed in dtypes.items():
        got = run(recurrence, inputs(*shape, **options, dtype=dtype), seq_idx=ids, chunk_size=chunk, impl=form)
        for name, expected in true.items():
            assert got[name].isfinite().all(), name
            error = (got[name].double() - expected).abs().max().item() if expected.numel() else 0.0
            assert error <= allowed * max(expected.abs().max().item(), least) + 1e-12, (
                f"{name} in {dtype} is {error} off"
            )


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 2, 3, 7, 16, 17, 40]),
    groups=st.integers(1, 2),
    share=st.integers(1, 3),
    size=st.sampled_from([1, 5, 16]),
    width=st.sampled_from([1, 3, 8]),
    chunk=st.sampled_from([1, 4, 7, 16, 64]),
    options=st.fixed_dictionaries(
        {"decay": st.sampled_from(list(DECAYS)), "delta": st.booleans(), "initial": st.booleans()}
    ),
    seed=st.integers(0, 999),
    documents=st.booleans(),
)
def test_outputs_and_gradients_agree_with_the_float64_recurrence(
    form, batch, length, groups, share, size, width, chunk, options, seed, documents
):
    ids = None
    if documents:
        ids = torch.randint(0, 5, (batch, length), generator=torch.Generator().manual_seed(3)).sort(1).values
    # a beta near one leaves next to nothing of the state along its key, and of the state's gradient
    shape = (batch, length, groups, share, size, width)
    compare(form, shape, {**options, "seed": seed}, ids=ids, chunk=chunk, least=0.1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [63, 64, 65, 200])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("delta", [False, True], ids=["plain", "delta"])
def test_lengths_around_a_chunk_agree_with_the_float64_recurrence(form, length, decay, delta):
    compare(form, (1, length, 1, 2, 16, 8), {"decay": decay, "delta": delta})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("size", "width"), [(30, 65), (48, 17), (64, 130), (90, 40), (128, 64), (200, 20)])
def test_heads_of_many_widths_agree_with_the_float64_recurrence(form, size, width):
    compare(form, (1, 70, 1, 2, size, width), {"decay": "channel"})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", ["fixed", "head", "channel"])
@pytest.mark.parametrize("delta", [False, True], ids=["plain", "delta"])
@pytest.mark.parametrize("strength", [50.0, 3000.0])
def test_strong_decays_are_exact_and_have_finite_gradients(form, decay, delta, strength):
    compare(form, (1, 64, 1, 2, 16, 8), {"decay": decay, "delta": delta, "strength": strength})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("delta", [False, True], ids=["plain", "delta"])
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_one_step_that_forgets_leaves_the_digits_of_the_others(form, decay, delta):
    values = inputs(1, 64, 1, 1, 8, 4, decay=decay, delta=delta, initial=False, dtype=torch.float32)
    with torch.no_grad():
        values["log_decay"][:, 5] = -1e6
    whole = recurrence(**values, impl=form)[0]
    after = recurrence(**{n: v[:, 5:] for n, v in values.items()}, impl=form)[0]
    torch.testing.assert_close(whole[:, 5:], after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_minus_infinity_forgets_as_a_document_boundary_does(form):
    values = {n: v.detach() for n, v in inputs(1, 20, 1, 2, 8, 4, decay="channel", dtype=torch.float32).items()}
    ids = (torch.arange(20) >= 9).long()[None]
    cut = dict(values, log_decay=values["log_decay"].clone())
    cut["log_decay"][:, 9] = float("-inf")
    torch.testing.assert_close(recurrence(**cut, impl=form)[0], recurrence(**values, seq_idx=ids, impl=form)[0])


def test_the_torch_form_passes_gradcheck():
    values = inputs(1, 7, 1, 2, 3, 2, decay="channel")
    names, ids = list(values), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])

    def chunked(*tensors):
        return recurrence(**dict(zip(names, tensors, strict=True)), seq_idx=ids, chunk_size=4, impl="torch")

    assert torch.autograd.gradcheck(chunked, tuple(values.values()))


@pytest.mark.parametrize("form", ["auto", *FORMS])
@pytest.mark.parametrize("decay", DECAYS)
def test_pieces_through_the_state_are_the_whole(form, decay):
    values = {n: v.detach() for n, v in inputs(2, 50, 2, 2, 4, 8, decay=decay, dtype=torch.float32).items()}
    whole, final = recurrence(**values, chunk_size=16, impl=form)
    state, parts = values.pop("initial_state"), []
    for piece in (slice(0, 20), slice(20, 21), slice(21, 50)):
        part = {n: v if v.dim() == 1 else v[:, piece] for n, v in values.items()}
        o, state = recurrence(**part, initial_state=state, chunk_size=16, impl=form)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_bfloat16_inputs_give_bfloat16_outputs_a_float32_state_and_bfloat16_gradients(form, decay):
    values = inputs(1, 20, 1, 2, 8, 4, decay=decay, initial=False, dtype=torch.bfloat16)
    got = run(recurrence, values, impl=form)
    assert got.pop("final").dtype == torch.float32
    assert {t.dtype for t in got.values()} == {torch.bfloat16}
    wide = {n: v.detach().double().requires_grad_() for n, v in values.items()}
    for name, expected in run(recurrence, wide, impl="reference").items():
        if name in got:
            assert (got[name].double() - expected).abs().max() <= 2e-2 * expected.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_views_of_one_projection_give_what_their_copies_give(form):
    make = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 20, 40, generator=make).requires_grad_()

    def parts(x):
        q, k, v, log, beta = torch.split(x, [8, 8, 12, 8, 4], dim=-1)
        q, k, log = (t.unflatten(-1, (2, 4)) for t in (q, torch.nn.functional.normalize(k, dim=-1), log))
        return q, k, v.unflatten(-1, (2, 6)), -log.square(), beta[..., :2].sigmoid()

    def gradient(function):
        return torch.autograd.grad(gated_delta(*function(whole), impl=form).square().sum(), whole)[0]

    torch.testing.assert_close(gradient(parts), gradient(lambda x: [t.contiguous() for t in parts(x)]))


@needs_c
def test_the_same_bits_for_any_number_of_threads():
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(recurrence, inputs(2, 70, 1, 3, 16, 8, dtype=torch.float32), impl="native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(more[name], found[0][name]) for more in found for name in more)


@pytest.mark.parametrize("form", FORMS)
def test_not_a_number_is_not_swallowed(form):
    values = {n: v.detach() for n, v in inputs(2, 10, 1, 2, 4, 3, dtype=torch.float32).items()}
    values["log_decay"][0, 5, 1] = float("nan")
    o, _ = recurrence(**values, impl=form)
    assert o[0, 5:, 1].isnan().all()
    assert o[1].isfinite().all() and o[0, :, 0].isfinite().all()


@pytest.mark.slow
@needs_c
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("delta", [False, True], ids=["plain", "delta"])
def test_the_operator_is_registered_as_torch_demands(decay, delta):
    values = inputs(2, 9, 1, 2, 4, 3, decay=decay, delta=delta, initial=delta, dtype=torch.float32)
    reset = torch.zeros(2, 9, dtype=torch.uint8) if delta else None
    tensors = [values.get(name) for name in ("q", "k", "v", "log_decay", "beta", "initial_state")]
    with torch.random.fork_rng():
        torch.use_deterministic_algorithms(False)
        torch.library.opcheck(torch.ops.hybridnas.gated_delta, (*tensors, reset, 0.5, True))


@pytest.mark.slow
@needs_c
def test_export_keeps_the_operator():
    class Recurrence(torch.nn.Module):
        def forward(self, *args):
            return gated_delta(*args)

    args = tuple(v.detach() for v in inputs(1, 9, 1, 2, 4, 3, initial=False, dtype=torch.float32).values())
    program = torch.export.export(Recurrence(), args)
    assert "hybridnas.gated_delta" in str(program.graph)
    torch.testing.assert_close(program.module()(*args), Recurrence()(*args))


@pytest.mark.slow
@needs_c
def test_compile_goes_through_in_one_graph_with_gradients():
    values = inputs(1, 9, 1, 2, 4, 3, decay="channel", dtype=torch.float32)
    compiled = torch.compile(gated_delta, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(gated_delta(**values).sum(), list(values.values()))
    got = torch.autograd.grad(compiled(**values).sum(), list(values.values()))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_scale_of_the_queries_defaults_to_the_root_of_the_key_channels():
    values = {n: v.detach() for n, v in inputs(1, 5, 1, 1, 16, 4).items()}
    torch.testing.assert_close(gated_delta(**values), gated_delta(**values, scale=0.25))
    torch.testing.assert_close(gated_delta(**values, scale=1.0), 4 * gated_delta(**values))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_the_recurrences_equal_transformers_chunked_forms_in_outputs_and_gradients(form, decay):
    module = {"head": "qwen3_next", "channel": "kimi_linear"}[decay]
    hugging = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    name = {"head": "torch_chunk_gated_delta_rule", "channel": "chunk_kimi_delta_attention"}[decay]
    theirs = getattr(hugging, name)

    def transposed(q, k, v, log_decay, beta, initial_state):
        return theirs(q, k, v, g=log_decay, beta=beta, initial_state=initial_state, output_final_state=True)

    shape = (2, 70, 2, 1, 16, 8)
    expected = run(transposed, inputs(*shape, decay=decay, dtype=torch.float32))
    got = run(recurrence, inputs(*shape, decay=decay, dtype=torch.float32), impl=form)
    for name, true in expected.items():
        assert (got[name] - true).abs().max() <= 1e-5 * true.abs().max(), name


@pytest.mark.parametrize(
    ("changes", "got", "allowed"),
    [
        ({"q": torch.zeros(1, 4, 6)}, (1, 4, 6), "(B, L, G, K)"),
        ({"q": torch.zeros(1, 4, 2, 0), "k": torch.zeros(1, 4, 2, 0)}, 0, ">= 1"),
        ({"k": torch.zeros(1, 4, 2, 5)}, (1, 4, 2, 5), (1, 4, 2, 3)),
        ({"v": torch.zeros(1, 4, 6)}, (1, 4, 6), "(B, L, H, V)"),
        ({"q": torch.zeros(1, 4, 3, 3), "k": torch.zeros(1, 4, 3, 3)}, 3, [1, 2, 4]),
        ({"log_decay": torch.zeros(3)}, (3,), (4,)),
        ({"log_decay": torch.zeros(1, 4, 3)}, (1, 4, 3), (1, 4, 4)),
        ({"log_decay": torch.zeros(1, 4)}, (1, 4), "(H,), (B, L, H) or (B, L, H, K)"),
        ({"log_decay": torch.zeros(1, 4, 4, 2)}, (1, 4, 4, 2), (1, 4, 4, 3)),
        ({"beta": torch.zeros(1, 4, 1)}, (1, 4, 1), (1, 4, 4)),
        ({"initial_state": torch.zeros(1, 4, 6, 3)}, (1, 4, 6, 3), (1, 4, 3, 6)),
        ({"seq_idx": torch.zeros(1, 4)}, torch.float32, "integers"),
        ({"chunk_size": 0}, 0, ">= 1"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected_and_got(changes, got, allowed):
    values = {n: v.detach().float() for n, v in inputs(1, 4, 2, 2, 3, 6).items()}
    with pytest.raises(KernelInputError) as refused:
        gated_delta(**(values | changes))
    assert (refused.value.field, refused.value.got, refused.value.allowed) == (next(iter(changes)), got, allowed)


def test_a_requested_implementation_runs_or_raises():
    values = {n: v.detach() for n, v in inputs(1, 4, 2, 2, 3, 6).items()}
    with pytest.raises(KernelUnavailableError) as refused:
        gated_delta(**values, impl="native")
    assert (refused.value.field, refused.value.got) == ("impl", "native")
    assert refused.value.allowed == ["auto", "reference", "torch"]
    q, v = torch.zeros(1, 2, 1, 300), torch.zeros(1, 2, 1, 4)
    if native.available():  # else that is the reason
        with pytest.raises(KernelUnavailableError, match="takes at most 256 key channels K, got 300"):
            gated_delta(q, q, v, impl="native")
    assert gated_delta(q, q, v).shape == (1, 2, 1, 4)
    assert describe("cpu", torch.float64).startswith("torch: chunked matrix products")
    assert OPERATION.name == "gated_delta"
