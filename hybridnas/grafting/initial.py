"""How a new block starts: from the weights of the old one in its place where there is a way, else drawn or silent.

    zero     drawn, with an output projection of zeros: the layer adds nothing at first
    random   drawn as for a training from the start
    copy     the same block with other settings: what both have is copied; of new widths, states and heads the part that
             the output reads is zero; of more experts each is a copy of an old one, of fewer each a mean (merged)
    qkv      attention to a recurrence (M, N, G, K, L, W): its queries, keys, values and output become C, B, x and the
             output projection (MOHAWK, 2408.10189; Mamba-in-Llama, 2408.15237)
    upcycle  an MLP to experts: each expert a copy of it with noise (2212.05055)
    split    an MLP to experts: each expert a share of its neurons
    merge    experts to an MLP: side by side where the width is theirs together, else their mean

Each takes the old block and the new one, and changes the new one alone. Whether the function is preserved is measured
(:func:`difference`), not claimed.

Shapes: D d_model, H heads, P channels of a head, E experts, F hidden width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from hybridnas.blocks.attention import Attention
from hybridnas.blocks.mamba import Mamba
from hybridnas.blocks.mamba2 import Mamba2
from hybridnas.blocks.mlp import Mlp
from hybridnas.blocks.moe import Moe
from hybridnas.blocks.rwkv7 import Rwkv7
from hybridnas.layers.block import Block
from hybridnas.layers.linear_recurrence import LinearRecurrence

EXACT = 1e-9  # largest relative difference in float64 that counts as the same function


class Group(NamedTuple):
    """Channels of one kind along a dimension of a tensor: ``units`` (heads, experts) of ``size`` channels."""

    units: int
    size: int
    silent: bool = False  # of a wider block: zeros where it is new, since its output reads them
    label: str = ""  # groups of one label are narrowed by the same choice of channels


Layout = dict[str, tuple[tuple[Group, ...], ...]]  # tensor -> for each dimension its groups


@dataclass(frozen=True)
class Start:
    """A way to start a new block: why it does not apply to a pair of blocks (empty: it does), and what it does."""

    why_not: Callable[[Block, Block], str]
    run: Callable[[Block, Block, float], None]


def silence(block: Block) -> bool:
    """Set what the block's output is linear in to zero; returns whether there is such a weight."""
    found = False
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if any(name == output or name.startswith((f"{output}.", f"{output}_")) for output in block.outputs):
                parameter.zero_()
                found = True
    return found


@torch.no_grad()
def difference(old: Block, new: Block) -> float:
    """Return the largest difference of two blocks' outputs on random input over the largest output, in float64."""
    generator = torch.Generator().manual_seed(0)
    x_BLD = torch.randn(2, 24, old.config.d_model, generator=generator, dtype=torch.float64)
    ys = [copy.deepcopy(block).to("cpu", torch.float64).eval()(x_BLD).y_BLD for block in (old, new)]
    return float((ys[0] - ys[1]).abs().max() / ys[0].abs().max().clamp(min=1e-30))


def starts_for(old: Block | None, new: Block) -> list[str]:
    """Return the names of the starts that apply, in the order in which ``auto`` prefers them unmeasured."""
    if old is None:
        return ["zero", "random"]
    return [name for name, start in STARTS.items() if not start.why_not(old, new)]


def start(name: str, old: Block | None, new: Block, noise: float = 0.0) -> str:
    """Start a new block as ``name`` says, from its drawn weights; returns why not, empty where it was done."""
    if old is None and name not in ("zero", "random"):
        return "it is inserted, so there is no old block to start from"
    why = STARTS[name].why_not(old if old is not None else new, new)
    if not why:
        STARTS[name].run(old if old is not None else new, new, noise)
    return why


def _fits(old: Block, new: Block) -> str:
    if type(old) is not type(new) and not isinstance(new, type(old)) and not isinstance(old, type(new)):
        return f"{old.name} and {new.name} are different blocks"
    ours, theirs = (_shapes(block) for block in (old, new))
    if ours == theirs:
        return ""
    if isinstance(old, Moe) and isinstance(new, Moe):
        fewer, other = new.config.n_experts < old.config.n_experts, new.config.hidden != old.config.hidden
        if fewer and other:
            return f"fewer experts of another width, d_expert={new.config.hidden}; change one after the other"
    layouts = layout(old), layout(new)
    if layouts[0] is None or layouts[1] is None:
        return f"there is no map between widths of {new.name} with these settings"
    for name in theirs:
        if name in ours and [len(d) for d in layouts[0][name]] != [len(d) for d in layouts[1][name]]:
            return f"{name} of {new.name} is made of other parts"
    return ""


def _shapes(block: Block) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}


@torch.no_grad()
def _copy(old: Block, new: Block, noise: float) -> None:
    ours, theirs = old.state_dict(), new.state_dict()
    if _shapes(old) == _shapes(new):
        new.load_state_dict(ours)
        return
    old_layout, new_layout = cast(Layout, layout(old)), cast(Layout, layout(new))
    chosen = _chosen(old, new)
    for name, tensor in theirs.items():
        if name not in ours:
            if name.endswith("bias"):
                tensor.zero_()
            continue
        dims = list(zip(old_layout[name], new_layout[name], strict=True))
        places = [_places(a, b, chosen) for a, b in dims]
        for dim, (_, b) in enumerate(dims):
            fresh = _fresh_and_silent(b, places[dim][1])
            tensor.index_fill_(dim, fresh, 0.0)
        tensor[torch.meshgrid(*(p[1] for p in places), indexing="ij")] = ours[name][
            torch.meshgrid(*(p[0] for p in places), indexing="ij")
        ].to(tensor.dtype)
    if isinstance(old, Moe) and isinstance(new, Moe) and old.config.n_experts != new.config.n_experts:
        _renumber_experts(old, new, noise)


def _places(old: tuple[Group, ...], new: tuple[Group, ...], chosen: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the indices along a dimension, in the old tensor and in the new one, that stand for the same channels."""
    froms, tos, start_old, start_new = [], [], 0, 0
    for a, b in zip(old, new, strict=True):
        count, size = min(a.units, b.units), min(a.size, b.size)
        taken = chosen.get(a.label) if a.label else None
        inner = torch.arange(size) if taken is None or len(taken) != size else taken
        units = torch.arange(count)[:, None]
        froms.append((start_old + units * a.size + inner).flatten())
        tos.append((start_new + units * b.size + torch.arange(size)).flatten())
        start_old, start_new = start_old + a.units * a.size, start_new + b.units * b.size
    return torch.cat(froms), torch.cat(tos)


def _fresh_and_silent(groups: tuple[Group, ...], filled: Tensor) -> Tensor:
    """Return the indices of a dimension's silent groups that nothing is copied to."""
    known, found, start_ = set(filled.tolist()), [], 0
    for group in groups:
        end = start_ + group.units * group.size
        if group.silent:
            found += [i for i in range(start_, end) if i not in known]
        start_ = end
    return torch.tensor(found, dtype=torch.long)


def _chosen(old: Block, new: Block) -> dict[str, Tensor]:
    """Return, of a narrower MLP, the hidden channels to keep: those whose weights in and out are the largest."""
    if not isinstance(old, Mlp) or not isinstance(new, Mlp) or new.config.hidden >= old.config.hidden:
        return {}
    up = old.ff.up_proj.weight.detach().float()
    up = up.view(-1, old.config.hidden, up.shape[1]).square().sum((0, 2))
    down = old.ff.down_proj.weight.detach().float().square().sum(0)
    return {"hidden": (up * down).topk(new.config.hidden).indices.sort().values}


@torch.no_grad()
def _renumber_experts(old: Moe, new: Moe, noise: float) -> None:
    """Make more experts of copies, or fewer of means; the new block holds the old experts' weights already.

    Of r times as many experts, of which a token chooses as many or r times as many, the second matrices are scaled so
    that the chosen gates of the copies add up to the gate of the original.
    """
    before, after = old.config.n_experts, new.config.n_experts
    names = [name for name in new.state_dict() if name.startswith("routed.")]
    source, target = old.state_dict(), new.state_dict()
    if after > before:
        owner = torch.arange(after) % before
        factor = _gate_factor(old.config, new.config)
        for name in names:
            grown = target[name][owner].clone()
            if name.startswith("routed.experts.down_proj"):
                grown *= factor
            if noise and "bias" not in name:
                spread = noise * grown.float().std(unbiased=False)
                grown[before:] += spread.to(grown.dtype) * torch.randn_like(grown[before:])
            target[name].copy_(grown)
        return
    cluster = _clusters(source["routed.router.weight"].float(), after)
    for name in names:
        target[name].copy_(torch.stack([source[name][members].mean(0) for members in cluster]))


def _gate_factor(old: Moe.Config, new: Moe.Config) -> float:
    """Return what the outputs of copied experts are scaled by, so that their chosen gates add up to the original's."""
    times, chosen = new.n_experts / old.n_experts, new.top_k / old.top_k
    if new.renormalize or times != int(times):
        return 1.0
    return (times if new.scores == "softmax" else 1.0) / chosen


def _clusters(router_ED: Tensor, count: int) -> list[list[int]]:
    """Return the experts in ``count`` clusters: the two whose mean routers point the most alike are joined first."""
    found = [[number] for number in range(len(router_ED))]
    while len(found) > count:
        means = nn.functional.normalize(torch.stack([router_ED[members].mean(0) for members in found]), dim=-1)
        alike = (means @ means.T).fill_diagonal_(-math.inf)
        i, j = sorted(divmod(int(alike.argmax()), len(found)))
        found[i] += found.pop(j)
    return found


def layout(block: Block) -> Layout | None:
    """Return what the dimensions of a block's tensors are made of; None for a block without a map between widths."""
    known: dict[str, tuple[tuple[Group, ...], ...]]
    d = (Group(1, block.config.d_model),)
    if isinstance(block, Mlp):
        known = _feed_forward("ff.", block.config.hidden, block.config.gated, d)
    elif isinstance(block, Moe):
        known = _moe(block, d)
    elif isinstance(block, Attention) and block.latent is None:
        known = _attention(block, d)
    elif isinstance(block, Mamba) and not block.config.inner:
        known = _mamba(block, d)
    elif isinstance(block, Mamba2):
        known = _mamba2(block, d)
    elif isinstance(block, LinearRecurrence) and getattr(block.config, "kind", "") != "hgrn2":
        known = _recurrence(block, d)
    else:
        return None
    return {name: known[name] for name in block.state_dict()} if set(block.state_dict()) <= set(known) else None


def _feed_forward(prefix: str, hidden: int, gated: bool, d: tuple[Group, ...]) -> Layout:
    first = (Group(1, hidden, label="hidden"),) * (2 if gated else 1)
    return {
        f"{prefix}up_proj.weight": (first, d),
        f"{prefix}up_proj.bias": (first,),
        f"{prefix}down_proj.weight": (d, (Group(1, hidden, silent=True, label="hidden"),)),
        f"{prefix}down_proj.bias": (d,),
    }


def _moe(block: Moe, d: tuple[Group, ...]) -> Layout:
    config: Moe.Config = block.config
    experts, hidden = (Group(config.n_experts, 1),), Group(1, config.hidden)
    first = (hidden,) * (2 if config.gated else 1)
    name = "gate_up_proj" if config.gated else "up_proj"
    return {
        "routed.router.weight": (experts, d),
        "routed.correction_bias": (experts,),
        f"routed.experts.{name}": (experts, d, first),
        f"routed.experts.{name}_bias": (experts, first),
        "routed.experts.down_proj": (experts, (hidden._replace(silent=True),), d),
        "routed.experts.down_proj_bias": (experts, d),
        "shared_gate.weight": ((Group(1, 1),), d),
        **_feed_forward("shared.", config.d_shared, config.gated, d),
    }


def _attention(block: Attention, d: tuple[Group, ...]) -> Layout:
    config: Attention.Config = block.config
    heads, keys = Group(config.heads, config.head_width), Group(config.kv_heads, config.head_width)
    qkv, channel = (heads, keys, keys), (Group(1, config.head_width),)
    norms = {"all": ((heads,), (keys,))}.get(config.qk_norm, (channel, channel))
    gates = (heads,) if config.gate == "elementwise" else (Group(config.heads, 1),)
    return {
        "qkv_proj.weight": (qkv, d),
        "qkv_proj.bias": (qkv,),
        "q_norm.weight": (norms[0],),
        "k_norm.weight": (norms[1],),
        "gate_proj.weight": (gates, d),
        "gate_proj.bias": (gates,),
        "sinks": ((Group(config.heads, 1),),),
        "out_proj.weight": (d, (heads._replace(silent=True),)),
        "out_proj.bias": (d,),
    }


def _mamba(block: Mamba, d: tuple[Group, ...]) -> Layout:
    config: Mamba.Config = block.config
    inner, states = Group(1, config.width), Group(1, config.d_state)
    parts = {"dt": Group(1, config.rank, silent=True), "B": states, "C": states._replace(silent=True)}
    read = inner._replace(silent=True)
    both, one = (inner, inner), (Group(1, 1),)
    return {
        "A_log": ((inner,), (states,)),
        "D": ((inner,),),
        "B": ((states,),),
        "C": ((states._replace(silent=True),),),
        "in_proj.weight": (both, d),
        "in_proj.bias": (both,),
        "conv1d.weight": ((inner,), one, (Group(1, config.d_conv),)),
        "conv1d.bias": ((inner,),),
        "x_proj.weight": (tuple(parts[part] for part in config.selected), (read,)),
        "dt_layernorm.weight": ((parts["dt"]._replace(silent=False),),),
        "b_layernorm.weight": ((states,),),
        "c_layernorm.weight": ((states,),),
        "dt_proj.weight": ((inner,), (Group(1, config.rank),)),
        "dt_proj.bias": ((inner,),),
        "out_proj.weight": (d, (read,)),
        "out_proj.bias": (d,),
    }


def _mamba2(block: Mamba2, d: tuple[Group, ...]) -> Layout:
    config: Mamba2.Config = block.config
    inner, heads = Group(config.heads, config.head_width), Group(config.heads, 1)
    states = Group(config.n_groups, config.d_state)
    mixed = (inner, states, states._replace(silent=True))
    rows = (inner, *mixed, heads)
    return {
        "in_proj.weight": (rows, d),
        "in_proj.bias": (rows,),
        "conv1d.weight": (mixed, (Group(1, 1),), (Group(1, config.d_conv),)),
        "conv1d.bias": (mixed,),
        **dict.fromkeys(("dt_bias", "A_log", "D"), ((heads,),)),
        "norm.weight": ((inner,),),
        "out_proj.weight": (d, (inner._replace(silent=True),)),
        "out_proj.bias": (d,),
    }


def _recurrence(block: LinearRecurrence, d: tuple[Group, ...]) -> Layout:
    shape = block.shape
    keys, values = Group(shape.key_heads, shape.key_dim), Group(shape.value_heads, shape.value_dim)
    mixed = (keys, keys, values)
    _, gate, decay, beta = shape.columns
    per_head = Group(shape.value_heads, 1)
    gates = (Group(1, gate),) if shape.gate_rank else (values,)
    decays = (Group(1, decay),) if decay != shape.value_heads else (per_head,)
    rows = (*mixed, *(gates if gate else ()), *(decays if decay else ()), *((per_head,) if beta else ()))
    key_rows = (Group(shape.value_heads, shape.key_dim),)
    norm = (values,) if shape.norm == "whole" else (Group(1, shape.value_dim),)
    vectors = {
        name: ((per_head,) if tensor.numel() == shape.value_heads else key_rows,)
        for name, tensor in block.state_dict().items()
        if name in ("A_log", "dt_bias")
    }
    return {
        **vectors,
        "in_proj.weight": (rows, d),
        "conv1d.weight": (mixed, (Group(1, 1),), (Group(1, shape.taps),)),
        "conv1d.bias": (mixed,),
        "gate_proj.weight": ((values,), (Group(1, shape.gate_rank),)),
        "decay_proj.weight": (key_rows, (Group(1, decay),)),
        "decay_proj.bias": (key_rows,),
        "norm.weight": (norm,),
        "out_proj.weight": (d, (values._replace(silent=True),)),
    }


class _Heads(NamedTuple):
    """What an attention block computes, head by head: queries, keys, values (P, D) and output (D, P)."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    out: list[Tensor]


def _why_no_qkv(old: Block, new: Block) -> str:
    if not isinstance(old, Attention):
        return f"{old.name} has no queries, keys and values"
    if old.latent is not None:
        return "latent attention has its queries, keys and values in factors"
    if isinstance(new, LinearRecurrence):
        kind = getattr(new.config, "kind", "")
        return "hgrn2 has no keys of its own" if kind == "hgrn2" else ""
    if isinstance(new, (Mamba2, Rwkv7)):
        return ""
    if isinstance(new, Mamba):
        needed = new.config.d_model + old.config.heads * old.config.head_width
        if new.config.inner or set(new.config.selected) != {"dt", "B", "C"}:
            return "mamba needs dense projections and selective dt, B and C to take queries and keys"
        if new.config.width < needed:
            return f"mamba d_inner={new.config.width} has no room for values and the block's input, {needed} channels"
        return ""
    return f"{new.name} has no queries, keys and values to take"


@torch.no_grad()
def _qkv(old: Block, new: Block, noise: float) -> None:
    heads = _heads(cast(Attention, old))
    if isinstance(new, LinearRecurrence):
        shape = new.shape
        keys = _keys(heads, shape.key_heads, shape.key_dim)
        values = _values(heads, shape.value_heads, shape.value_dim)
        count = shape.key_heads * shape.key_dim
        weight = new.in_proj.weight
        for number, (q, k) in enumerate(keys):
            at = number * shape.key_dim
            weight[at : at + len(q)] = q.to(weight.dtype)
            weight[count + at : count + at + len(k)] = k.to(weight.dtype)
        _place_values(values, weight[2 * count : 2 * count + shape.inner], new.out_proj.weight, shape.value_dim)
        if new.conv1d is not None:
            _pass_through(new.conv1d)
    elif isinstance(new, Mamba2):
        config = new.config
        weight, wide = new.in_proj.weight, config.n_groups * config.d_state
        first = 2 * config.width
        for number, (q, k) in enumerate(_keys(heads, config.n_groups, config.d_state)):
            at = first + number * config.d_state
            weight[at : at + len(k)] = k.to(weight.dtype)  # B, what is written by
            weight[at + wide : at + wide + len(q)] = q.to(weight.dtype)  # C, what is read by
        values = _values(heads, config.heads, config.head_width)
        _place_values(values, weight[config.width : first], new.out_proj.weight, config.head_width)
        _pass_through(new.conv1d)
    elif isinstance(new, Rwkv7):
        size, count = new.config.size, new.config.width // new.config.size
        for number, (q, k) in enumerate(_keys(heads, count, size)):
            at = number * size
            new.receptance.weight[at : at + len(q)] = q.to(new.receptance.weight.dtype)
            new.key.weight[at : at + len(k)] = k.to(new.key.weight.dtype)
        _place_values(_values(heads, count, size), new.value.weight, new.output.weight, size)
        for name in ("x_r", "x_k", "x_v"):  # read the token itself, and nothing of the one before
            new.get_parameter(name).zero_()
    else:
        _mamba_from(heads, cast(Mamba, new))


def _mamba_from(heads: _Heads, new: Mamba) -> None:
    """Let the first inner channels hold the values of all heads and the next ones the block's input.

    B and C are made of the latter: keys and queries of all heads together, at the rank of the state.
    """
    config = new.config
    weight, d = new.in_proj.weight, config.d_model  # type: ignore[union-attr]
    value = torch.cat(heads.v)
    weight[: len(value)] = value.to(weight.dtype)
    weight[len(value) : len(value) + d] = torch.eye(d, dtype=weight.dtype)
    (q, k), *_ = _keys(heads, 1, config.d_state)
    x_proj, n = new.x_proj.weight, config.d_state  # type: ignore[union-attr]
    own = slice(len(value), len(value) + d)
    for row, found in ((config.rank, k), (config.rank + n, q)):
        x_proj[row : row + n] = 0.0
        x_proj[row : row + len(found), own] = found.to(x_proj.dtype)
    out = new.out_proj.weight  # type: ignore[union-attr]
    out[:, own] = 0.0
    out[:, : len(value)] = torch.cat(heads.out, dim=1).to(out.dtype)
    _pass_through(new.conv1d)


def _heads(old: Attention) -> _Heads:
    config: Attention.Config = old.config
    width, groups = config.head_width, config.heads // config.kv_heads
    sizes = [config.heads * width, config.kv_heads * width, config.kv_heads * width]
    weight = old.qkv_proj.weight.detach()
    q, k, v = ([head.double() for head in torch.split(part, width)] for part in torch.split(weight, sizes))
    out = [head.double() for head in torch.split(old.out_proj.weight.detach(), width, dim=1)]
    return _Heads(q, [one for one in k for _ in range(groups)], [one for one in v for _ in range(groups)], out)


def _keys(heads: _Heads, count: int, width: int) -> list[tuple[Tensor, Tensor]]:
    """Return queries and keys of ``count`` heads: those of the old heads that each stands for, at the rank of width.

    Where a head stands for one of the same width these are its own; else the factors of the nearest matrix of that rank
    to the mean of q^T k, by singular values.
    """
    found = []
    for members in _members(len(heads.q), count):
        if len(members) == 1 and len(heads.q[members[0]]) == width:
            found.append((heads.q[members[0]], heads.k[members[0]]))
        else:
            mean = sum(heads.q[h].T @ heads.k[h] for h in members) / len(members)
            q, k = _factors(cast(Tensor, mean), width)
            found.append((q.T, k))
    return found


def _values(heads: _Heads, count: int, width: int) -> list[tuple[Tensor, Tensor]]:
    """Return values (V, D) and output (D, V) of ``count`` heads: together they write what the old heads write.

    Fewer heads write the sum of several; of more heads than before several share the singular values of one.
    """
    owners = _members(len(heads.v), count)
    shares = [owners.index(members) for members in owners]  # the first head with the same members
    found = []
    for number, members in enumerate(owners):
        if len(members) == 1 and len(heads.v[members[0]]) == width and owners.count(members) == 1:
            found.append((heads.v[members[0]], heads.out[members[0]]))
            continue
        written = cast(Tensor, sum(heads.out[h] @ heads.v[h] for h in members))
        sharing = owners.count(members)
        out, v = _factors(written, width * sharing, number - shares[number], sharing)
        found.append((v, out))
    return found


def _members(old: int, new: int) -> list[list[int]]:
    """Return for each of ``new`` heads the old ones that it stands for."""
    if new >= old:
        return [[number * old // new] for number in range(new)]
    return [list(range(number * old // new, (number + 1) * old // new)) for number in range(new)]


def _factors(matrix_DD: Tensor, rank: int, first: int = 0, step: int = 1) -> tuple[Tensor, Tensor]:
    """Return (D, r) and (r, D) whose product is nearest to the matrix; of r each ``step``-th from ``first`` on."""
    u, s, vh = torch.linalg.svd(matrix_DD)
    taken = torch.arange(first, min(rank, len(s)), step)
    root = s[taken].sqrt()
    return u[:, taken] * root, root[:, None] * vh[taken]


def _place_values(values: list[tuple[Tensor, Tensor]], rows_VD: Tensor, out_DV: Tensor, width: int) -> None:
    for number, (v, out) in enumerate(values):
        at = number * width
        rows_VD[at : at + len(v)] = v.to(rows_VD.dtype)
        out_DV[:, at : at + width] = 0.0
        out_DV[:, at : at + len(v)] = out.to(out_DV.dtype)


def _pass_through(conv: nn.Conv1d) -> None:
    """Let a causal convolution hand on the present token alone."""
    conv.weight.zero_()
    conv.weight[..., -1] = 1.0
    if conv.bias is not None:
        conv.bias.zero_()


def _experts_apart(old: Block, new: Block) -> str:
    if not (isinstance(old, Mlp) and isinstance(new, Moe)):
        return f"{old.name} to {new.name} is not an MLP that becomes experts"
    for name in ("activation", "gated"):
        if getattr(old.config, name) != getattr(new.config, name):
            return f"{name}={getattr(new.config, name)} of the experts is not the MLP's {getattr(old.config, name)}"
    return ""


def _why_no_upcycle(old: Block, new: Block) -> str:
    why = _experts_apart(old, new)
    if why or old.config.hidden in (new.config.hidden, new.config.d_shared):
        return why
    return f"d_expert={new.config.hidden} is not the MLP's d_ff={old.config.hidden}"


def _why_no_split(old: Block, new: Block) -> str:
    why = _experts_apart(old, new)
    if why or new.config.n_experts * new.config.hidden == old.config.hidden:
        return why
    experts = f"n_experts * d_expert = {new.config.n_experts * new.config.hidden}"
    return f"{experts} is not the MLP's d_ff={old.config.hidden}"


@torch.no_grad()
def _upcycle(old: Block, new: Block, noise: float) -> None:
    ff, config = cast(Mlp, old).ff, cast(Moe.Config, new.config)
    moe = cast(Moe, new)
    moe.routed.router.weight.mul_(noise)  # nearly even gates: the mixture is the MLP
    if moe.shared is not None and config.d_shared == old.config.hidden and not config.shared_gate:
        for name, tensor in moe.shared.state_dict().items():
            tensor.copy_(ff.state_dict()[name])
        for name, parameter in moe.routed.experts.named_parameters():
            if name.startswith("down_proj"):
                parameter.zero_()
        return
    _fill_experts(moe, ff, [torch.arange(old.config.hidden)] * config.n_experts, 1 / config.top_k, noise)


@torch.no_grad()
def _split(old: Block, new: Block, noise: float) -> None:
    ff, config = cast(Mlp, old).ff, cast(Moe.Config, new.config)
    moe = cast(Moe, new)
    moe.routed.router.weight.mul_(noise)
    shares = list(torch.arange(old.config.hidden).chunk(config.n_experts))
    _fill_experts(moe, ff, shares, config.n_experts / config.top_k, 0.0)


def _fill_experts(moe: Moe, ff: nn.Module, shares: list[Tensor], weight: float, noise: float) -> None:
    """Give each expert a share of an MLP's hidden channels, so that k chosen ones at even gates sum to its output.

    ``weight``: what one chosen expert has to add, of its own share of the MLP's output.
    """
    config: Moe.Config = moe.config
    gate = 1 / config.top_k if config.renormalize else 1 / config.n_experts if config.scores == "softmax" else 0.5
    gate *= config.routed_scale
    experts, own = moe.routed.experts.state_dict(), ff.state_dict()
    name = "gate_up_proj" if config.gated else "up_proj"
    branches = 2 if config.gated else 1
    up = own["up_proj.weight"].view(branches, -1, config.d_model)
    for number, share in enumerate(shares):
        first = up[:, share].flatten(0, 1).T
        second = own["down_proj.weight"][:, share].T * (weight / gate)
        for target, source in ((experts[name], first), (experts["down_proj"], second)):
            spread = noise * source.float().std(unbiased=False) if number else 0.0
            target[number].copy_(source + spread * torch.randn_like(source))
        if config.bias and "up_proj.bias" in own:
            experts[f"{name}_bias"][number].copy_(own["up_proj.bias"].view(branches, -1)[:, share].flatten())
            experts["down_proj_bias"][number].copy_(own["down_proj.bias"] / (gate * config.top_k))


def _why_no_merge(old: Block, new: Block) -> str:
    if not (isinstance(old, Moe) and isinstance(new, Mlp)):
        return f"{old.name} to {new.name} is not experts that become an MLP"
    why = _experts_apart(new, old)
    hidden, count = old.config.hidden, old.config.n_experts
    if why or new.config.hidden in (hidden, count * hidden):
        return why
    return f"d_ff={new.config.hidden} is neither d_expert={hidden} nor {count} of them, {count * hidden}"


@torch.no_grad()
def _merge(old: Block, new: Block, noise: float) -> None:
    moe, ff, config = cast(Moe, old), cast(Mlp, new).ff, cast(Moe.Config, old.config)
    own = moe.routed.experts.state_dict()
    name = "gate_up_proj" if config.gated else "up_proj"
    branches = 2 if config.gated else 1
    up = own[name].view(config.n_experts, config.d_model, branches, config.hidden)  # E D b F
    gate = config.routed_scale * (1 / config.top_k if config.renormalize else 0.5)
    chosen = config.top_k * gate  # what the gates of a token sum to
    down = own["down_proj"]  # E F D
    if new.config.hidden == config.hidden:
        up, down = up.mean(0, keepdim=True), down.mean(0, keepdim=True)
    else:
        chosen /= config.n_experts
    ff.up_proj.weight.copy_(up.permute(2, 0, 3, 1).reshape(-1, config.d_model))
    ff.down_proj.weight.copy_(chosen * down.permute(2, 0, 1).reshape(config.d_model, -1))


def _none(old: Block, new: Block) -> str:
    return ""


def _why_not_silent(old: Block, new: Block) -> str:
    named = [name for name, _ in new.named_parameters()]
    if any(name == o or name.startswith((f"{o}.", f"{o}_")) for name in named for o in new.outputs):
        return ""
    return f"{new.name} names no output projection in Block.outputs"


def _silent(old: Block, new: Block, noise: float) -> None:
    silence(new)


def _drawn(old: Block, new: Block, noise: float) -> None:
    pass


# In the order in which auto prefers them where nothing is measured.
STARTS: dict[str, Start] = {
    "copy": Start(_fits, _copy),
    "qkv": Start(_why_no_qkv, _qkv),
    "upcycle": Start(_why_no_upcycle, _upcycle),
    "split": Start(_why_no_split, _split),
    "merge": Start(_why_no_merge, _merge),
    "random": Start(_none, _drawn),
    "zero": Start(_why_not_silent, _silent),
}
