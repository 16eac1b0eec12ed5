"""Linear attention against transformers' lightning attention, and in float64 against each paper's equations."""

import math

import pytest
import torch
import torch.nn.functional as F

from hybridnas.blocks.linear_attention import LinearAttention
from tests.oracles import randomize, relative_errors

D, HEADS, K, V = 24, 3, 6, 8
LENGTH = 70


def x_BLD(dtype=torch.float64):
    return torch.randn(2, LENGTH, D, generator=torch.Generator().manual_seed(1), dtype=dtype)


def block(**fields):
    sizes = {"n_heads": HEADS, "head_dim": K, "value_head_dim": V}
    torch.manual_seed(0)
    return LinearAttention(LinearAttention.Config(d_model=D, **{**sizes, **fields})).eval()


def by_token(block, x):
    state, outputs = block.init_state(x.shape[0], device=x.device, dtype=x.dtype), []
    for piece in x.split([1, 1, 30, *[1] * (LENGTH - 32)], dim=1):
        y, state, _ = block(piece, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(("layer", "layers"), [(0, 4), (2, 4)])
def test_lightning_equals_minimax(layer, layers):
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = modeling.MiniMaxConfig(
        hidden_size=D, num_attention_heads=HEADS, head_dim=K, num_hidden_layers=layers, block_size=16
    )
    torch.manual_seed(0)
    theirs = modeling.MiniMaxLightningAttention(config, layer).eval()
    randomize(theirs, std=0.1)
    factor = 1 - layer / (layers - 1 + 1e-5) + 1e-5
    ours = block(kind="lightning", decay_factor=factor, norm_eps=theirs.norm.variance_epsilon, value_head_dim=K)
    wide = HEADS * K

    def part(index):
        return lambda w: w.view(HEADS, 3, K, D)[:, index].reshape(-1, D)

    pairs = [("in_proj.weight", slice(i * wide, (i + 1) * wide), "qkv_proj.weight", part(i)) for i in range(3)]
    pairs += [("in_proj.weight", slice(3 * wide, None), "output_gate.weight", None)]
    pairs += [(name, None, name, None) for name in ("norm.weight", "out_proj.weight")]

    def run(module, x):
        return module(x, None, None)

    for ours_run in (None, by_token):
        output, gradient = relative_errors(ours, theirs, pairs, x_BLD(torch.float32), run_ours=ours_run, run_theirs=run)
        assert output < 1e-5
        assert gradient < 5e-5


def heads(x, width):
    return x.unflatten(-1, (-1, width))


def split_heads(qkv):
    parts = qkv.split([HEADS * K, HEADS * K, HEADS * V], -1)
    return [heads(part, width) for part, width in zip(parts, (K, K, V), strict=True)]


def recurrence(q, k, v, decay=None, beta=None):
    """Return S_t^T q_t of S_t = diag(decay_t) S_{t-1} + k_t v_t^T, with beta of the delta rule (2102.11174)."""
    S, outputs = v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        written = v[:, t]
        if decay is not None:
            S = (decay if decay.dim() == 2 else decay[:, t])[..., None] * S
        if beta is not None:
            written = beta[:, t, :, None] * (written - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], written)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(outputs, 1)


def normed(o, weight, eps=1e-5):
    return weight * o / (o.square().mean(-1, keepdim=True) + eps).sqrt()


def plain(w, x):
    """2006.16236, equations 9 and 12: phi(q) (sum phi(k) v) / phi(q) (sum phi(k))."""
    q, k, v = split_heads(x @ w["in_proj.weight"].T)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    weights = torch.einsum("bihk,bjhk->bhij", q, k).tril()
    o = torch.einsum("bhij,bjhv->bihv", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)
    return o.flatten(-2) @ w["out_proj.weight"].T


def retnet(w, x):
    """2307.08621, equations 5 and 8: the parallel form, with the positions of the whole sequence."""
    q, k, v, g = (x @ w["in_proj.weight"].T).split([18, 18, 24, 24], -1)
    angle = torch.arange(LENGTH)[:, None] * 10000.0 ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    q, k = (torch.complex(*heads(part, K).chunk(2, -1)) * turn for part in (q, k))
    gamma = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=torch.float64))
    lag = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    D_HLL = (gamma[:, None, None] ** lag.clamp(min=0)) * (lag >= 0)
    scores = torch.einsum("bihk,bjhk->bhij", q, k.conj()).real * D_HLL / K**0.5
    o = normed(torch.einsum("bhij,bjhv->bihv", scores, heads(v, V)), w["norm.weight"])
    return (o.flatten(-2) * F.silu(g)) @ w["out_proj.weight"].T


def lightning(w, x):
    """2501.08313, section 2.2: SiLU of all projections, decays by head, norm of the whole, sigmoid gate."""
    qkv, g = (x @ w["in_proj.weight"].T).split([60, 24], -1)
    q, k, v = F.silu(qkv).split([18, 18, 24], -1)
    slope = torch.tensor([2 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)], dtype=torch.float64)
    decay = (-0.7 * slope).exp()[:, None].expand(HEADS, K)
    o = normed(recurrence(heads(q, K), heads(k, K), heads(v, V), decay).flatten(-2), w["norm.weight"])
    return (o * g.sigmoid()) @ w["out_proj.weight"].T


def gla(w, x):
    """2312.06635, section 4.4: alpha = sigmoid(W2 W1 x + b)^(1/16)."""
    q, k, v, g, low = (x @ w["in_proj.weight"].T).split([18, 18, 24, 24, 16], -1)
    decay = (low @ w["decay_proj.weight"].T + w["decay_proj.bias"]).sigmoid() ** (1 / 16)
    o = normed(recurrence(heads(q, K) / K**0.5, heads(k, K), heads(v, V), heads(decay, K)), w["norm.weight"])
    return (o.flatten(-2) * F.silu(g)) @ w["out_proj.weight"].T


def deltanet(w, x):
    """2406.06484, section 3: convolutions with SiLU, unit queries and keys, beta a sigmoid, norm of each head."""
    u, b = (x @ w["in_proj.weight"].T).split([60, HEADS], -1)
    late = F.pad(u, (0, 0, 3, 0))
    u = F.silu(sum(late[:, t : t + LENGTH] * w["conv1d.weight"][:, 0, t] for t in range(4)))
    q, k, v = split_heads(u)
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    o = normed(recurrence(q / K**0.5, k, v, beta=2 * b.sigmoid()), w["norm.weight"])
    return o.flatten(-2) @ w["out_proj.weight"].T


def hgrn2(w, x):
    """2404.07904, section 3: f = bound + (1 - bound) sigmoid(x), the input gate 1 - f is the key."""
    q, v, f = (x @ w["in_proj.weight"].T).split([18, 24, 18], -1)
    f = heads(0.3 + 0.7 * f.sigmoid(), K)
    o = recurrence(heads(F.silu(q), K), 1 - f, heads(v, V), f).flatten(-2)
    return normed(o, w["norm.weight"]) @ w["out_proj.weight"].T


@pytest.mark.parametrize(
    ("equations", "options"),
    [
        (plain, {}),
        (retnet, {}),
        (lightning, {"decay_factor": 0.7}),
        (gla, {}),
        (deltanet, {"negative_eigenvalues": True}),
        (hgrn2, {"lower_bound": 0.3}),
    ],
)
def test_in_float64_a_kind_equals_its_papers_equations(equations, options):
    ours, theirs = (block(kind=equations.__name__, **options).double() for _ in range(2))
    randomize(theirs, std=0.1)
    pairs = [(name, None, name, None) for name, _ in theirs.named_parameters()]

    def run(module, x):
        return equations(dict(module.named_parameters()), x)

    for ours_run in (None, by_token):
        errors = relative_errors(ours, theirs, pairs, x_BLD(), run_ours=ours_run, run_theirs=run)
        assert max(errors) < 1e-11


def test_positions_of_retnet_are_relative_and_do_not_lose_digits_with_length():
    ours = block(kind="retnet")
    x = x_BLD(torch.float32)
    with torch.no_grad():
        state = ours.init_state(2, device=x.device, dtype=x.dtype)
        for _ in range(40):
            _, state, _ = ours(torch.zeros(2, 1000, D), state)  # zeros write nothing
        late, _, _ = ours(x, state)
        torch.testing.assert_close(late, ours(x).y_BLD, rtol=1e-5, atol=1e-6)


def test_decays_of_heads_are_the_published_numbers():
    from hybridnas.blocks.linear_attention import _fixed_decays

    retnet = _fixed_decays("retnet", 8, torch.device("cpu"), torch.float64).exp()
    assert retnet.tolist() == pytest.approx([1 - 1 / 2**n for n in range(5, 13)], rel=1e-12)
    lightning = _fixed_decays("lightning", 64, torch.device("cpu"), torch.float64)
    assert lightning[7].item() == pytest.approx(-(2.0**-1), rel=1e-12)
    assert math.isclose(lightning[63].item(), -(2.0**-8))
