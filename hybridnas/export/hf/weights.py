"""Which tensor of transformers' class holds which rows of ours: the table of a family, and its parts by block.

Names on the hub differ from those in the class (experts and convolutions lie apart there); :func:`as_in_class` joins
them. Shapes: E experts, F hidden width of an expert, D d_model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridnas.arch.arch import Arch, Node
from hybridnas.errors import ExportError, suggest

Loaders = dict[str, Callable[[], Tensor]]  # name -> how to get the tensor, which is read when it is needed


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows (of the first dimension) of one tensor of theirs, which are rows of one of ours."""

    ours: str
    theirs: str
    at: slice | None = None  # rows of ours; None: all
    rows: Tensor | None = None  # rows of theirs, in the order of ours; None: all, as they are
    factor: float | Tensor = 1.0  # what their module multiplies the result by, one factor or one per row of ours
    swapped: bool = False  # ours has the last two dimensions the other way round, as experts do
    shape: tuple[int, ...] | None = None  # of theirs where it has dimensions of size 1 that ours has not

    def value(self, theirs: Tensor) -> Tensor:
        """Return what of their tensor ours holds."""
        found = theirs if self.rows is None else theirs[self.rows]
        if isinstance(self.factor, Tensor):
            found = found * self.factor.to(found.device).view(-1, *[1] * (found.dim() - 1)).to(found.dtype)
        elif self.factor != 1.0:
            found = found * self.factor
        if self.shape is not None:
            found = found.flatten()
        return found.transpose(-1, -2) if self.swapped else found

    def back(self, ours: Tensor) -> Tensor:
        """Return the rows of their tensor that ours holds, in the order of ours: the inverse of :meth:`value`."""
        found = ours if self.at is None else ours[self.at]
        found = found.transpose(-1, -2) if self.swapped else found
        if self.shape is not None:
            found = found.view(self.shape)
        if isinstance(self.factor, Tensor):
            return found / self.factor.view(-1, *[1] * (found.dim() - 1)).to(found.dtype)
        return found if self.factor == 1.0 else found / self.factor


@dataclass(frozen=True, kw_only=True)
class Hub:
    """How released checkpoints name what transformers' class holds under other names: the inverse of the renames."""

    renames: Sequence[tuple[str, str]] = ()  # regular expression of a name of the class -> what is stored
    experts: tuple[str, str, str] | None = (
        "gate_proj",
        "up_proj",
        "down_proj",
    )  # of one expert; None: all in one tensor
    split_convolutions: bool = False  # whether queries, keys and values have convolutions of their own


def renamed(pairs: Mapping[str, str], ours: str, theirs: str) -> Iterator[Piece]:
    """Yield whole tensors, our name -> theirs, each below a prefix."""
    for own, other in pairs.items():
        yield Piece(ours=f"{ours}.{own}", theirs=f"{theirs}.{other}")


def prefix(node: Node) -> str:
    """Return the name of a node's block in our state dict."""
    return f"layers.{node.layer}.branches.{node.branch}.{node.position}"


def surroundings(arch: Arch, embedding: str, norm: str) -> Iterator[Piece]:
    """Yield embedding, final norm, and the head where it is not tied."""
    yield Piece(ours="embedding.weight", theirs=f"{embedding}.weight")
    yield Piece(ours="final_norm.weight", theirs=f"{norm}.weight")
    if not arch.model.tie_embeddings:
        yield Piece(ours="head.weight", theirs="lm_head.weight")


def norm(node: Node, theirs: str) -> Piece:
    """Return the norm of the node's layer that stands before its block, or after it."""
    own = f"around.{node.branch}_{node.position}.norm" if node.config.norm_position == "post" else "norm"
    return Piece(ours=f"layers.{node.layer}.{own}.weight", theirs=f"{theirs}.weight")


def stacked(
    ours: str, parts: Sequence[tuple[str, int]], *, factors: Mapping[str, float] | None = None, start: int = 0
) -> Iterator[Piece]:
    """Yield tensors of theirs, each with its number of rows, that lie below each other in one of ours."""
    for theirs, size in parts:
        factor = (factors or {}).get(theirs, 1.0)
        yield Piece(ours=ours, theirs=theirs, at=slice(start, start + size), factor=factor)
        start += size


def _kinds(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def attention(
    node: Node,
    theirs: str,
    *,
    out: str = "o_proj",
    norms: tuple[str, str] = ("q_norm", "k_norm"),
    key_factor: float = 1.0,
) -> Iterator[Piece]:
    """Yield queries, keys and values, which are one matrix of ours, output, and norms of queries and keys.

    With an output gate a head's rows of ``q_proj`` are its queries and then its gates, as in Qwen3-Next.
    """
    config: Any = node.config
    ours, width = prefix(node), config.head_width
    queries, keys = config.heads * width, config.kv_heads * width
    for kind in _kinds(config.biases[0]):
        at = slice(0, queries)
        if config.gate == "elementwise":
            rows = torch.arange(2 * queries).view(config.heads, 2, width)
            q_proj = f"{theirs}.q_proj.{kind}"
            yield Piece(ours=f"{ours}.qkv_proj.{kind}", theirs=q_proj, at=at, rows=rows[:, 0].flatten())
            yield Piece(ours=f"{ours}.gate_proj.{kind}", theirs=q_proj, rows=rows[:, 1].flatten())
        else:
            yield Piece(ours=f"{ours}.qkv_proj.{kind}", theirs=f"{theirs}.q_proj.{kind}", at=at)
        parts = [(f"{theirs}.k_proj.{kind}", keys), (f"{theirs}.v_proj.{kind}", keys)]
        factors = {parts[0][0]: key_factor}
        yield from stacked(f"{ours}.qkv_proj.{kind}", parts, factors=factors, start=queries)
    for kind in _kinds(config.biases[1]):
        yield Piece(ours=f"{ours}.out_proj.{kind}", theirs=f"{theirs}.{out}.{kind}")
    if config.qk_norm != "none":
        yield from renamed({"q_norm.weight": f"{norms[0]}.weight", "k_norm.weight": f"{norms[1]}.weight"}, ours, theirs)


def latent_attention(node: Node, theirs: str, *, interleaved: bool) -> Iterator[Piece]:
    """Yield multi-head latent attention by DeepSeek's names.

    ``interleaved``: the rotary channels of their checkpoints turn with their neighbors, ours with those half of the
    rotary width apart.
    """
    config: Any = node.config
    shape, ours = config.latent, prefix(node)
    order = torch.arange(shape.rotary)
    if interleaved:
        order = torch.cat([order[::2], order[1::2]])
    per_head = torch.cat([torch.arange(shape.head), shape.head + order])
    query_rows = (torch.arange(shape.heads)[:, None] * (shape.head + shape.rotary) + per_head).flatten()
    key_rows = torch.cat([torch.arange(shape.kv_rank), shape.kv_rank + order])
    first = shape.q_rank or shape.query
    down = f"{ours}.latent.down_proj"
    for kind in _kinds(shape.bias):
        if shape.q_rank is None:
            yield Piece(ours=f"{down}.{kind}", theirs=f"{theirs}.q_proj.{kind}", at=slice(0, first), rows=query_rows)
        else:
            yield Piece(ours=f"{down}.{kind}", theirs=f"{theirs}.q_a_proj.{kind}", at=slice(0, first))
        keys = f"{theirs}.kv_a_proj_with_mqa.{kind}"
        yield Piece(ours=f"{down}.{kind}", theirs=keys, at=slice(first, None), rows=key_rows)
    if shape.q_rank is not None:
        q_up = f"{ours}.latent.q_up_proj.weight"
        yield Piece(ours=q_up, theirs=f"{theirs}.q_b_proj.weight", rows=query_rows)
        yield Piece(ours=f"{ours}.latent.q_norm.weight", theirs=f"{theirs}.q_a_layernorm.weight")
    names = {"latent.kv_norm.weight": "kv_a_layernorm.weight", "latent.kv_up_proj.weight": "kv_b_proj.weight"}
    yield from renamed(names, ours, theirs)
    for kind in _kinds(config.biases[1]):
        yield Piece(ours=f"{ours}.out_proj.{kind}", theirs=f"{theirs}.o_proj.{kind}")


def feed_forward(
    ours: str,
    theirs: str,
    width: int,
    *,
    gated: bool = True,
    bias: bool = False,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    gate_factor: float = 1.0,
) -> Iterator[Piece]:
    """Yield an MLP, whose gate and value are one matrix of ours; without a gate its two matrices."""
    gate, up, down = names
    for kind in _kinds(bias):
        if gated:
            parts = [(f"{theirs}.{gate}.{kind}", width), (f"{theirs}.{up}.{kind}", width)]
            yield from stacked(f"{ours}.up_proj.{kind}", parts, factors={parts[0][0]: gate_factor})
        else:
            yield Piece(ours=f"{ours}.up_proj.{kind}", theirs=f"{theirs}.{up}.{kind}")
        yield Piece(ours=f"{ours}.down_proj.{kind}", theirs=f"{theirs}.{down}.{kind}")


def mlp(node: Node, theirs: str, **own: Any) -> Iterator[Piece]:
    """Yield the MLP of a node; ``own`` as :func:`feed_forward` takes it."""
    config: Any = node.config
    yield from feed_forward(f"{prefix(node)}.ff", theirs, config.hidden, gated=config.gated, bias=config.bias, **own)


def experts(
    node: Node, theirs: str, *, router: str = "gate", shared: str = "", bias: str = "gate.e_score_correction_bias"
) -> Iterator[Piece]:
    """Yield routed experts, (E, F, D) there, their router with its correction bias, and the shared expert."""
    config: Any = node.config
    ours = prefix(node)
    yield Piece(ours=f"{ours}.routed.router.weight", theirs=f"{theirs}.{router}.weight")
    for name in ("gate_up_proj" if config.gated else "up_proj", "down_proj"):
        yield Piece(ours=f"{ours}.routed.experts.{name}", theirs=f"{theirs}.experts.{name}", swapped=True)
    if config.correction_bias:
        yield Piece(ours=f"{ours}.routed.correction_bias", theirs=f"{theirs}.{bias}")
    if shared:
        yield from feed_forward(f"{ours}.shared", f"{theirs}.{shared}", config.d_shared, gated=config.gated)


def mamba(node: Node, theirs: str) -> Iterator[Piece]:
    """Yield a Mamba mixer, whose names are ours."""
    config: Any = node.config
    names = ["in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D"]
    names += ["out_proj.weight", *(["conv1d.bias"] if config.conv_bias else [])]
    names += ["in_proj.bias", "out_proj.bias"] if config.bias else []
    if config.selective_norm == "scaled":
        names += ["dt_layernorm.weight", "b_layernorm.weight", "c_layernorm.weight"]
    yield from renamed({name: name for name in names}, prefix(node), theirs)


def mamba2(node: Node, theirs: str, in_factor: float | Tensor = 1.0) -> Iterator[Piece]:
    """Yield a Mamba-2 mixer, whose names are ours; ``in_factor`` multiplies what its first matrix yields."""
    config: Any = node.config
    ours = prefix(node)
    for kind in _kinds(config.bias):
        yield Piece(ours=f"{ours}.in_proj.{kind}", theirs=f"{theirs}.in_proj.{kind}", factor=in_factor)
    names = [
        "conv1d.weight",
        "dt_bias",
        "A_log",
        "D",
        "out_proj.weight",
        *(["conv1d.bias"] if config.conv_bias else []),
    ]
    names += ["norm.weight"] if config.gated_norm else []
    names += ["out_proj.bias"] if config.bias else []
    yield from renamed({name: name for name in names}, ours, theirs)


_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
_EXPERT_PARTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_CONVOLUTION = re.compile(r"(.+)\.([qkv])_conv1d\.weight")


def as_in_class(stored: Loaders, renames: Iterable[tuple[str, str]]) -> Loaders:
    """Return tensors under the names of transformers' class: renamed, experts stacked, convolutions below each other.

    ``renames``: regular expressions of stored names with what stands for them, applied in this order.
    """
    found: Loaders = {}
    experts: dict[str, dict[str, dict[int, Callable[[], Tensor]]]] = defaultdict(lambda: defaultdict(dict))
    convolutions: dict[str, dict[str, Callable[[], Tensor]]] = defaultdict(dict)
    for name, load in stored.items():
        for pattern, by in renames:
            name = re.sub(pattern, by, name)
        if (match := _EXPERT.fullmatch(name)) and match[3] in _EXPERT_PARTS:
            experts[match[1]][_EXPERT_PARTS[match[3]]][int(match[2])] = load
        elif match := _CONVOLUTION.fullmatch(name):
            convolutions[match[1]][match[2]] = load
        else:
            found[name] = load
    for base, parts in experts.items():
        for part in (parts[name] for name in ({"up", "down"} | set(parts))):
            missing = set(range(max(map(len, parts.values())))) - set(part)
            if missing:
                raise ExportError(
                    f"the weights lack matrices of {base}.{min(missing)}; download the whole model again",
                    field=f"{base}.{min(missing)}",
                )
        first = "gate_up_proj" if "gate" in parts else "up_proj"
        found[f"{base}.{first}"] = _joined(parts.get("gate", {}), parts.get("up", {}))
        found[f"{base}.down_proj"] = _joined({}, parts.get("down", {}))
    for base, thirds in convolutions.items():
        loads = [thirds[letter] for letter in "qkv" if letter in thirds]
        found[f"{base}.conv1d.weight"] = lambda loads=loads: torch.cat([load() for load in loads])  # type: ignore[misc]
    return found


def _joined(gates: Mapping[int, Callable[[], Tensor]], others: Mapping[int, Callable[[], Tensor]]) -> Any:
    """Return how to stack experts' matrices (F, D), each below that of its gate where there is one."""

    def load() -> Tensor:
        return torch.stack(
            [torch.cat([*([gates[i]()] if gates else []), others[i]()]) for i in range(max(len(others), len(gates)))]
        )

    return load


def filled(
    expected: Mapping[str, Tensor], pieces: Iterable[Piece], theirs: Loaders, unused: Sequence[str], where: str | Path
) -> dict[str, Tensor]:
    """Return our tensors made of theirs, each in the dtype that is stored.

    ``expected``: our tensors by name, of which shapes are read alone. ``unused``: regular expressions of names that
    have no part in the function. Raises ExportError naming the first tensor that is missing, of another shape, or not
    known, and for a tensor of ours that is not filled.
    """
    found: dict[str, Tensor] = {}
    rows: dict[str, int] = defaultdict(int)
    used: dict[str, list[int]] = {}
    for piece in pieces:
        if piece.theirs not in theirs:
            raise ExportError(
                f"{where} lacks tensor {piece.theirs!r} that its config asks for{suggest(piece.theirs, theirs)[:200]}; "
                f"download the whole model again",
                field=piece.theirs,
            )
        target = expected[piece.ours]
        size = target.shape[0] if piece.at is None else len(range(*piece.at.indices(target.shape[0])))
        needed = (size, *target.shape[1:])
        try:
            tensor = theirs[piece.theirs]().detach()
            if not tensor.is_floating_point():
                raise ExportError(
                    f"{where} has tensor {piece.theirs!r} of dtype {tensor.dtype}, and quantized weights are not read; "
                    f"give the model in float32 or bfloat16",
                    field=piece.theirs,
                    got=str(tensor.dtype),
                    allowed="a floating point dtype",
                )
            value = piece.value(tensor)
        except (RuntimeError, IndexError) as error:  # fewer rows or dimensions, experts of unequal sizes
            raise _wrong_shape(where, piece, str(error), None, needed) from None
        if value.shape != needed:
            raise _wrong_shape(where, piece, f"shape {tuple(tensor.shape)}", tuple(tensor.shape), needed)
        all_rows = tensor.shape[0] if tensor.dim() else 1
        taken = used.setdefault(piece.theirs, [0, all_rows])
        taken[0] += all_rows if piece.rows is None else len(piece.rows)
        if piece.ours not in found:
            found[piece.ours] = torch.empty(target.shape, dtype=tensor.dtype)
        elif (wide := torch.promote_types(found[piece.ours].dtype, tensor.dtype)) != found[piece.ours].dtype:
            found[piece.ours] = found[piece.ours].to(wide)
        found[piece.ours][slice(None) if piece.at is None else piece.at] = value.to("cpu")
        rows[piece.ours] += size
    for name, (taken_rows, all_rows) in used.items():
        if taken_rows != all_rows:
            raise ExportError(
                f"{where} has tensor {name!r} of {all_rows} rows, its config asks for {taken_rows}",
                field=name,
                got=all_rows,
                allowed=taken_rows,
            )
    for name in theirs:
        if name not in used and not any(re.match(pattern, name) for pattern in unused):
            raise ExportError(
                f"{where} has tensor {name!r} that the model of its config does not have{suggest(name, used)[:200]}",
                field=name,
                got=name,
            )
    unfilled = [name for name, tensor in expected.items() if rows[name] != tensor.shape[0]]
    assert not unfilled, f"the family's table fills not all of {unfilled}"
    return found


def _wrong_shape(where: str | Path, piece: Piece, words: str, got: Any, needed: tuple[int, ...]) -> ExportError:
    return ExportError(
        f"{where} has tensor {piece.theirs!r} that does not give the {needed} of {piece.ours!r} ({words}); the weights "
        f"and the config are of different models",
        field=piece.theirs,
        got=got,
        allowed=needed,
    )


def in_class(pieces: Iterable[Piece], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of transformers' class that hold ours: the inverse of :func:`filled`."""
    parts: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        parts[piece.theirs].append(piece)
    found = {}
    for name, own in parts.items():
        values = [piece.back(ours[piece.ours]) for piece in own]
        if own[0].rows is None:
            found[name] = values[0]
            continue
        found[name] = torch.empty(sum(map(len, values)), *values[0].shape[1:], dtype=values[0].dtype)
        for piece, value in zip(own, values, strict=True):
            found[name][piece.rows] = value
    return found


_STACKED = re.compile(r"(.+\.experts)\.(gate_up_proj|up_proj|down_proj)")
_JOINED_CONVOLUTION = re.compile(r"(.+)\.conv1d\.weight")


def as_on_hub(tensors: Mapping[str, Tensor], hub: Hub) -> dict[str, Tensor]:
    """Return tensors of transformers' class as released checkpoints store them: the inverse of :func:`as_in_class`."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if hub.experts is not None and (match := _STACKED.fullmatch(name)):
            gate, up, down = hub.experts
            names = {"gate_up_proj": (gate, up), "up_proj": (up,), "down_proj": (down,)}[match[2]]
            for i, matrix in enumerate(tensor):
                chunks = matrix.chunk(len(names))
                found |= {f"{match[1]}.{i}.{x}.weight": chunk for x, chunk in zip(names, chunks, strict=True)}
        elif (
            hub.split_convolutions
            and (match := _JOINED_CONVOLUTION.fullmatch(name))
            and f"{match[1]}.q_proj.weight" in tensors
        ):
            sizes = [tensors[f"{match[1]}.{x}_proj.weight"].shape[0] for x in "qkv"]
            thirds = zip("qkv", torch.split(tensor, sizes), strict=True)
            found |= {f"{match[1]}.{x}_conv1d.weight": third for x, third in thirds}
        else:
            found[name] = tensor
    for pattern, by in hub.renames:
        found = {re.sub(pattern, by, name): tensor for name, tensor in found.items()}
    return found
