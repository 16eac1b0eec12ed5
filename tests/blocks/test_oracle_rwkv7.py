"""RWKV-7 against its authors' equations, written here in float64 as their code has them; a whole model; documents."""

import pytest
import torch
import torch.nn.functional as F
from oracles import randomize, relative, relative_errors
from torch import nn

import hybridnas
from hybridnas.arch.presets import PRESETS
from hybridnas.blocks.mlp import Mlp
from hybridnas.blocks.rwkv7 import Rwkv7
from hybridnas.errors import ConfigError

WIDTH, HEAD = 24, 8
RANKS = {"w": 5, "a": 4, "v": 3, "g": 6}


class TimeMix(nn.Module):
    """RWKV_Tmix_x070 of BlinkDL/RWKV-LM, RWKV-v7/rwkv_v7_demo.py, which is equations 3 to 21 of arXiv 2503.14456."""

    def __init__(self, width, head, ranks, first):
        super().__init__()
        self.heads, self.first = width // head, first
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a"):
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, width)))
        if not first:
            self.v0 = nn.Parameter(torch.zeros(1, 1, width))
        for name, rank in ranks.items():
            if name != "v" or not first:
                self.register_parameter(f"{name}1", nn.Parameter(torch.zeros(width, rank)))
                self.register_parameter(f"{name}2", nn.Parameter(torch.zeros(rank, width)))
        self.r_k = nn.Parameter(torch.zeros(self.heads, head))
        self.receptance, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.ln_x = nn.GroupNorm(self.heads, width, eps=64e-5)

    def forward(self, x, v_first=None):
        B, T, C = x.shape
        H, N = self.heads, C // self.heads
        xx = F.pad(x, (0, 0, 1, -1)) - x
        r, k = self.receptance(x + xx * self.x_r), self.key(x + xx * self.x_k)
        v = self.value(x + xx * self.x_v)
        w = -F.softplus(-(self.w0 + torch.tanh((x + xx * self.x_w) @ self.w1) @ self.w2)) - 0.5
        if self.first:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + ((x + xx * self.x_v) @ self.v1) @ self.v2)
        a = torch.sigmoid(self.a0 + ((x + xx * self.x_a) @ self.a1) @ self.a2)
        g = torch.sigmoid((x + xx * self.x_g) @ self.g1) @ self.g2
        kk = F.normalize((k * self.k_k).view(B, T, H, -1), dim=-1, p=2.0)
        k = k * (1 + (a - 1) * self.k_a)
        r, k, v, w, a = (t.view(B, T, H, N) for t in (r, k, v, w, a))
        state, out = x.new_zeros(B, H, N, N), []
        for t in range(T):
            read = state @ -kk[:, t, :, :, None] @ (kk * a)[:, t, :, None, :]
            state = state * torch.exp(-torch.exp(w[:, t, :, None, :])) + read + v[:, t, :, :, None] @ k[:, t, :, None]
            out.append((state @ r[:, t, :, :, None]).flatten(1))
        y = self.ln_x(torch.stack(out, 1).view(B * T, C)).view(B, T, C)
        y = y + ((r * k * self.r_k).sum(dim=-1, keepdim=True) * v).view(B, T, C)
        return self.output(y * g), v_first


class ChannelMix(nn.Module):
    """RWKV_CMix_x070."""

    def __init__(self, width, hidden):
        super().__init__()
        self.x_k = nn.Parameter(torch.zeros(1, 1, width))
        self.key, self.value = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.value(torch.relu(self.key(x + (F.pad(x, (0, 0, 1, -1)) - x) * self.x_k)) ** 2)


class Goose(nn.Module):
    """RWKV of the same file; layer 0 has no v0, v1 and v2, which the released files leave out."""

    def __init__(self, width, layers, vocabulary, head, ranks):
        super().__init__()
        self.emb, self.ln0 = nn.Embedding(vocabulary, width), nn.LayerNorm(width)
        self.ln1, self.ln2 = (nn.ModuleList(nn.LayerNorm(width) for _ in range(layers)) for _ in range(2))
        self.att = nn.ModuleList(TimeMix(width, head, ranks, i == 0) for i in range(layers))
        self.ffn = nn.ModuleList(ChannelMix(width, 4 * width) for _ in range(layers))
        self.ln_out, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        x, v_first = self.ln0(self.emb(ids)), None
        for ln1, att, ln2, ffn in zip(self.ln1, self.att, self.ln2, self.ffn, strict=True):
            y, v_first = att(ln1(x), v_first)
            x = x + y
            x = x + ffn(ln2(x))
        return self.head(self.ln_out(x))


def flat(weight):
    return weight.flatten()


def turned(weight):
    return weight.T


def time_mix_pairs(first, ours="", theirs=""):
    """Return which parameter of ours is which of theirs."""
    found = [(f"x_{x}", f"x_{x}", flat) for x in "rwkvag"] + [(name, name, flat) for name in ("k_k", "k_a", "r_k")]
    found += [(f"{name}.weight", f"{name}.weight", None) for name in ("receptance", "key", "value", "output")]
    found += [(f"norm.{kind}", f"ln_x.{kind}", None) for kind in ("weight", "bias")]
    for name, letter in (("decay", "w"), ("rate", "a"), ("mix", "v"), ("gate", "g")):
        if letter == "v" and first:
            continue
        found += [(f"{name}.down.weight", f"{letter}1", turned), (f"{name}.up.weight", f"{letter}2", turned)]
        if letter != "g":
            found.append((f"{name}.up.bias", f"{letter}0", flat))
    return [(ours + own, None, theirs + other, transform) for own, other, transform in found]


def config(first=True, **more):
    ranks = {"decay_rank": RANKS["w"], "rate_rank": RANKS["a"], "gate_rank": RANKS["g"]}
    return Rwkv7.Config(d_model=WIDTH, head_dim=HEAD, value_rank=0 if first else RANKS["v"], **ranks, **more)


@pytest.mark.parametrize("impl", ["auto", "reference", "torch"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_outputs_and_gradients_equal_the_authors_time_mix(dtype, most, first, impl):
    torch.manual_seed(0)
    theirs = TimeMix(WIDTH, HEAD, RANKS, first).to(dtype)
    randomize(theirs)
    ours = Rwkv7(config(first), impl=impl).to(dtype)
    values = None if first else torch.randn(2, 31, WIDTH, generator=torch.Generator().manual_seed(2), dtype=dtype)
    x = torch.randn(2, 31, WIDTH, generator=torch.Generator().manual_seed(1), dtype=dtype)
    output, gradients = relative_errors(
        ours, theirs, time_mix_pairs(first), x,
        run_ours=lambda block, x: block(x, first_BLX=values).y_BLD,
        run_theirs=lambda block, x: block(x, values)[0],
    )  # fmt: skip
    assert output <= most
    assert gradients <= most


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_outputs_and_gradients_equal_the_authors_channel_mix(dtype, most):
    torch.manual_seed(0)
    theirs = ChannelMix(WIDTH, 40).to(dtype)
    randomize(theirs)
    ours = Mlp(Mlp.Config(d_model=WIDTH, d_ff=40, activation="relu2", bias=False, token_shift=True)).to(dtype)
    pairs = [
        ("x_k", None, "x_k", flat),
        ("ff.up_proj.weight", None, "key.weight", None),
        ("ff.down_proj.weight", None, "value.weight", None),
    ]
    x = torch.randn(2, 31, WIDTH, generator=torch.Generator().manual_seed(1), dtype=dtype)
    output, gradients = relative_errors(ours, theirs, pairs, x, run_ours=lambda block, x: block(x).y_BLD)
    assert output <= most
    assert gradients <= most


def goose(dtype, layers=3):
    """Return our model, theirs and the pairs of parameters."""
    arch = hybridnas.preset(
        "rwkv7_0_1b", d_model=WIDTH, n_blocks=layers, vocab_size=40, F={"d_ff": 4 * WIDTH},
        W={"head_dim": HEAD, "decay_rank": RANKS["w"], "rate_rank": RANKS["a"], "value_rank": RANKS["v"],
           "gate_rank": RANKS["g"]},
    )  # fmt: skip
    ours = hybridnas.HybridLM(arch).to(dtype).eval()
    torch.manual_seed(0)
    theirs = Goose(WIDTH, layers, 40, HEAD, RANKS).to(dtype)
    randomize(theirs)
    pairs = [("embedding.weight", None, "emb.weight", None), ("head.weight", None, "head.weight", None)]
    norms = [("embedding_norm", "ln0"), ("final_norm", "ln_out")]
    for i in range(layers):
        norms += [(f"layers.{2 * i}.norm", f"ln1.{i}"), (f"layers.{2 * i + 1}.norm", f"ln2.{i}")]
        pairs += time_mix_pairs(i == 0, f"layers.{2 * i}.branches.0.0.", f"att.{i}.")
        mlp = f"layers.{2 * i + 1}.branches.0.0."
        pairs += [(f"{mlp}x_k", None, f"ffn.{i}.x_k", flat)]
        pairs += [(f"{mlp}ff.{p}_proj.weight", None, f"ffn.{i}.{q}.weight", None) for p, q in
                  (("up", "key"), ("down", "value"))]  # fmt: skip
    for kind in ("weight", "bias"):
        pairs += [(f"{own}.{kind}", None, f"{other}.{kind}", None) for own, other in norms]
    return ours, theirs, pairs


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_logits_and_gradients_of_a_whole_model_equal_theirs(dtype, most):
    ours, theirs, pairs = goose(dtype)
    ids = torch.randint(40, (2, 29), generator=torch.Generator().manual_seed(1))
    output, gradients = relative_errors(ours, theirs, pairs, ids, run_ours=lambda model, ids: model(ids).logits)
    assert output <= most
    assert gradients <= most


def test_chunks_tokens_documents_and_decoding_of_a_whole_model_are_its_forward():
    ours, theirs, pairs = goose(torch.float64)
    relative_errors(ours, theirs, pairs, torch.zeros(1, 2, dtype=torch.long), run_ours=lambda m, ids: m(ids).logits)
    ids = torch.randint(40, (2, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = theirs(ids)
        for size in (1, 5, 23):
            state, parts = ours.init_state(2), []
            for piece in ids.split(size, 1):
                logits, _, state, _ = ours(piece, state=state)
                parts.append(logits)
            assert relative(torch.cat(parts, 1), whole) <= 1e-11
        segments = torch.tensor([[0] * 9 + [1] * 14, [0] * 3 + [2] * 20])
        packed = ours(ids, segments=segments).logits
        for row, end in ((0, 9), (1, 3)):
            assert relative(packed[row : row + 1, :end], theirs(ids[row : row + 1, :end])) <= 1e-11
            assert relative(packed[row : row + 1, end:], theirs(ids[row : row + 1, end:])) <= 1e-11
        greedy = ours.generate(ids, 6, temperature=0)
        for place in range(23, 29):
            assert torch.equal(theirs(greedy[:, :place])[:, -1].argmax(-1), greedy[:, place])


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("rwkv7")])
def test_the_authors_modules_have_as_many_parameters_as_the_release(name):
    release = PRESETS.get(name).release
    with torch.device("meta"):
        ranks = dict(zip("wavg", release.ranks, strict=True))
        theirs = Goose(release.d_model, release.n_blocks, release.vocab_size, 64, ranks)
    assert sum(p.numel() for p in theirs.parameters()) == release.total


@pytest.mark.parametrize(
    ("pattern", "field", "got"),
    [
        ("W{value_rank=4}W", "value_rank", "W{value_rank=4}"),
        ("W{d_inner=16}W{value_rank=4}", "d_inner", 32),
        ("AW{value_rank=4}", "value_rank", "W{value_rank=4}"),
    ],
)
def test_values_cannot_be_mixed_with_those_of_no_first_block(pattern, field, got):
    with pytest.raises(ConfigError) as caught:
        hybridnas.Arch.from_pattern(pattern, d_model=32, vocab_size=16)
    assert (caught.value.field, caught.value.got) == (field, got)
