"""Gated linear recurrences on a GPU: launches of ``triton_kernels.py``, as a differentiable operator.

Imports triton at its top: import this module where a CUDA tensor, or the interpreter, asks for it. The same bits in
every run on one machine: no atomics, and the tuner's choice of tiles is remembered. A row's result does not depend on
its batch. The forward keeps r and the states that chunks start from; the backward computes the rest again.

Shapes: B batch, L length, G groups, H heads, K channels of a key, V channels of a value, C chunks of T steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from hybridnas.kernels._register import register_differentiable_op
from hybridnas.kernels._triton.launch import Tile, launch, near_rows, operand_dtype
from hybridnas.kernels._triton.shapes import GATED_DELTA_CHUNK, blocks_of, power_of_two
from hybridnas.kernels.gated_delta import triton_kernels as kernels
from hybridnas.kernels.gated_delta.reference import Inputs

_ROWS = 16  # steps of a block inside a chunk
_Optional = Tensor | None
_Choices = dict[str, tuple[tuple[int, dict[str, int]], ...]]

# warps and block sizes to choose from, the likely best first; float32 products take three TF32 ones and more registers
_HALF: _Choices = {
    "gd_operands": ((4, {"BK": 64}), (8, {"BK": 64}), (4, {"BK": 32})),
    "gd_head_pairs": ((4, {"BK": 64}), (8, {"BK": 64})),
    "gd_channel_pairs": ((4, {"BK": 16}), (2, {"BK": 32})),
    "gd_mix": ((4, {"BX": 64}), (8, {"BX": 128})),
    "gd_outputs": ((4, {"BK": 64, "BV": 64}), (8, {"BK": 64, "BV": 128})),
    "gd_pairs_gradients": ((4, {"BV": 32}), (8, {"BV": 32})),
    "gd_states_gradients": ((8, {"BK": 64, "BV": 32}), (4, {"BK": 32, "BV": 64})),
    "gd_head_gradients": ((8, {"BK": 64}),),  # one BK: it counts the partial sums
    "gd_channel_gradients": ((4, {"BK": 32}), (8, {"BK": 64})),
    "gd_channel_decays": ((4, {"BK": 64}), (4, {"BK": 32})),
}
_FLOAT: _Choices = {
    "gd_operands": ((4, {"BK": 64}), (4, {"BK": 32})),
    "gd_head_pairs": ((4, {"BK": 32}), (4, {"BK": 64})),
    "gd_channel_pairs": ((4, {"BK": 32}), (2, {"BK": 32})),
    "gd_mix": ((4, {"BX": 64}), (4, {"BX": 32})),
    "gd_outputs": ((4, {"BK": 32, "BV": 64}), (4, {"BK": 32, "BV": 32})),
    "gd_pairs_gradients": ((4, {"BV": 16}),),
    "gd_states_gradients": ((4, {"BK": 32, "BV": 16}), (8, {"BK": 64, "BV": 16})),
    "gd_head_gradients": ((4, {"BK": 16}),),
    "gd_channel_gradients": ((4, {"BK": 32}), (8, {"BK": 32})),
    "gd_channel_decays": ((4, {"BK": 64}), (4, {"BK": 32})),
}
_NARROW: _Choices = {"gd_channel_gradients": ((4, {"BK": 16}),)}  # keys of 16 channels: 8 warps spill on sm_90
# of the chains over chunks, which hold a state's BK >= K rows, for keys of at most so many channels
_CHAINS: dict[bool, dict[int, tuple[tuple[int, dict[str, int]], ...]]] = {
    True: {
        64: ((4, {"BV": 32}), (4, {"BV": 16}), (8, {"BV": 32})),
        128: ((4, {"BV": 32}), (8, {"BV": 16})),
        256: ((8, {"BV": 16}), (4, {"BV": 16})),
    },
    False: {64: ((4, {"BV": 16}), (8, {"BV": 16})), 128: ((8, {"BV": 16}),)},
}


def side(number: int) -> int:
    """Return the side of a block of a matrix product that holds ``number``: 16 at least."""
    return max(16, power_of_two(number))


def tiles(kernel: str, size: int, width: int, *, half: bool) -> list[Tile]:
    """Return the tiles to choose from for keys of ``size`` and values of ``width`` channels, without repetition."""
    most = {"BK": side(size), "BV": side(width), "BX": max(32, side(max(size, width)))}
    if kernel in ("gd_pass_states", "gd_pass_gradients"):
        sizes = next(choices for channels, choices in _CHAINS[half].items() if size <= channels)
    else:
        choices = _HALF if half else _FLOAT
        sizes = (choices | _NARROW if most["BK"] == 16 else choices)[kernel]
    return list(dict.fromkeys(Tile.of(w, **{k: min(v, most[k]) for k, v in blocks.items()}) for w, blocks in sizes))


class Launcher(NamedTuple):
    """The arguments as the kernels read them: (B, H, L, X) views, last dimension contiguous, or (B, H, L)."""

    v: Tensor
    q: Tensor
    k: Tensor
    log: Tensor
    beta: _Optional
    initial: _Optional
    scale: float
    chunk: int
    half: bool  # precision of the products' operands

    @classmethod
    def of(cls, *tensors: _Optional, scale: float, chunk: int) -> Launcher:
        """Copy only what must be."""
        *rows, initial = tensors
        ready: list[Any] = [None if t is None else near_rows(t).transpose(1, 2) for t in rows]
        half = operand_dtype(*ready[:3]) != tl.float32
        return cls._make([*ready, None if initial is None else initial.contiguous(), scale, chunk, half])

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, H, L, K, V."""
        return (*self.v.shape[:3], self.k.shape[3], self.v.shape[3])

    @property
    def chunks(self) -> int:
        return blocks_of(self.chunk, self.v.shape[2])

    @property
    def channel(self) -> bool:
        return self.log.dim() == 4

    def buffer(self, *shape: int, narrow: bool = False) -> Tensor:
        """Return an empty tensor in float32, or with ``narrow`` in the precision of the products' operands."""
        return self.v.new_empty(shape, dtype=self.v.dtype if narrow and self.half else torch.float32)

    def rows(self, channels: int, *, narrow: bool = False) -> Tensor:
        """Return an empty (B, H, CT, X)."""
        batch, heads, *_ = self.sizes
        return self.buffer(batch, heads, self.chunks * self.chunk, channels, narrow=narrow)

    def lines(self, *before: int) -> Tensor:
        """Return an empty (..., B, H, CT): a number for every head and step."""
        batch, heads, *_ = self.sizes
        return self.buffer(*before, batch, heads, self.chunks * self.chunk)

    def outputs(self, like: Tensor, channels: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return an empty (B, H, L, X), or (B, H, L), that is contiguous as (B, L, H, X)."""
        batch, heads, length, *_ = self.sizes
        shape = (batch, length, heads) if channels is None else (batch, length, heads, channels)
        return like.new_empty(shape, dtype=dtype).transpose(1, 2)

    def states(self) -> Tensor:
        batch, heads, _, size, width = self.sizes
        return self.buffer(batch, self.chunks, heads, size, width)

    def run(self, kernel: Any, blocks: str = "", *, tile: Tile | None = None, rows: int = 1, **arguments: Any) -> None:
        """Launch a kernel: one program per chunk and head, per block of the tile's size ``blocks``, per row block."""
        batch, heads, length, size, width = self.sizes
        known: dict[str, Any] = {"L": length, "H": heads, "R": heads // self.q.shape[1], "K": size, "V": width}
        known |= {"CHUNKS": self.chunks, "T": self.chunk, "LINE": batch * heads * self.chunks * self.chunk}
        known |= {"DOT": operand_dtype(self.q, self.k, self.v), "PRECISION": None, "scale": self.scale}
        across = {"BK": size, "BV": width, "BX": arguments.get("X", 0), "": 0}[blocks]
        chain = kernel in (kernels.gd_pass_states, kernels.gd_pass_gradients)
        for name, tensor in list(arguments.items()):  # steps of batch, head and time where the kernel asks for them
            for letter, axis in zip("bhl", range(3), strict=True):
                known[f"{name}_{letter}"] = (
                    tensor.stride(axis) if isinstance(tensor, Tensor) and tensor.dim() > 2 else 0
                )
        if chain:
            known["BK"] = side(size)

        def programs(constants: dict[str, int]) -> tuple[int, ...]:
            number = blocks_of(constants[blocks], across) if blocks else 1
            if chain:
                return (batch * heads * number,)
            return batch * self.chunks * heads, rows * number

        launch(
            kernel,
            programs,
            [tile] if tile else tiles(kernel.__name__, size, width, half=self.half),
            tuple(name for name in ("K", "V", "X", "R") if name in kernel.arg_names),
            self.v.device,
            **{name: value for name, value in known.items() if name in kernel.arg_names and name not in arguments},
            **arguments,
        )


class Kept(NamedTuple):
    """What the forward keeps for the backward."""

    rest: Tensor  # r (B, H, CT, V), empty without the delta rule
    states: Tensor  # (B, C, H, K, V)


class Chunks(NamedTuple):
    """What both directions need of every chunk."""

    sums: dict[str, Any]  # hi and lo (B, H, CT), None for decays by channel
    operands: dict[str, Any]  # queries, ends (B, H, CT, K) and through (B, C, H, K)
    pairs: Tensor  # P (B, H, CT, T)
    pairs_k: _Optional  # A (B, H, CT, T)
    inverse: _Optional  # J (B, H, CT, T)
    mixed: _Optional  # J (k exp(G)) (B, H, CT, K)


def chunks_of(ins: Launcher) -> Chunks:
    """Return operands, pairs and inverses of all chunks at once."""
    batch, heads, _, size, _ = ins.sizes
    one = Tile.of(1)
    hi = lo = keys = pairs_k = inverse = mixed = None
    if not ins.channel:
        hi, lo = ins.lines(), ins.lines()
        ins.run(kernels.gd_sums, tile=one, log=ins.log, hi=hi, lo=lo)
    operands: dict[str, Any] = {name: ins.rows(size, narrow=True) for name in ("queries", "ends")}
    operands["through"] = ins.buffer(batch, ins.chunks, heads, size)
    pairs = ins.rows(ins.chunk, narrow=True)
    if ins.beta is not None:
        keys, mixed = ins.rows(size, narrow=True), ins.rows(size, narrow=True)
        pairs_k, inverse = ins.rows(ins.chunk), ins.rows(ins.chunk)
    ins.run(
        kernels.gd_operands, "BK", q=ins.q, k=ins.k, log=ins.log, hi=hi, lo=lo, keys=keys, **operands,
        CHANNEL=ins.channel,
    )  # fmt: skip
    if ins.channel:
        rows = ins.chunk // _ROWS
        ins.run(kernels.gd_channel_pairs, rows=rows, q=ins.q, k=ins.k, log=ins.log, P=pairs, A=pairs_k)
    else:
        ins.run(kernels.gd_head_pairs, q=ins.q, k=ins.k, hi=hi, lo=lo, P=pairs, A=pairs_k)
    if keys is not None and mixed is not None and inverse is not None:
        ins.run(
            kernels.gd_inverse, tile=Tile.of(4), A=pairs_k, beta=ins.beta, J=inverse, BLOCKS=ins.chunk // _ROWS
        )  # fmt: skip
        _mix(ins, inverse, keys, mixed)
    return Chunks({"hi": hi, "lo": lo}, operands, pairs, pairs_k, inverse, mixed)


def _mix(
    ins: Launcher, matrices: Tensor, x: Tensor, out: Tensor, *, beta: _Optional = None, turned: bool = False
) -> None:
    ins.run(kernels.gd_mix, "BX", matrices=matrices, x=x, beta=beta, out=out, X=x.shape[3], TRANSPOSED=turned)


def gated_delta_forward(ins: Launcher) -> tuple[Tensor, Tensor, Kept]:
    """Return o (B, H, L, V) in v's dtype, the final state (B, H, K, V) float32 and what the backward needs."""
    batch, heads, _, size, width = ins.sizes
    made = chunks_of(ins)
    o, final, states = ins.outputs(ins.v, width), ins.buffer(batch, heads, size, width), ins.states()
    values, rest = ins.v, ins.buffer(0, narrow=True)
    if made.inverse is not None:
        values, rest = ins.rows(width, narrow=True), ins.rows(width, narrow=True)
        _mix(ins, made.inverse, ins.v, values)
    ins.run(
        kernels.gd_pass_states, "BV", values=values, beta=ins.beta, mixed=made.mixed, ends=made.operands["ends"],
        through=made.operands["through"], initial=ins.initial, rest=rest, states=states, final=final,
    )  # fmt: skip
    ins.run(
        kernels.gd_outputs, "BV", values=ins.v if ins.beta is None else rest, beta=ins.beta, states=states,
        queries=made.operands["queries"], P=made.pairs, o=o,
    )  # fmt: skip
    return o, final, Kept(rest, states)


def gated_delta_backward(ins: Launcher, kept: Kept, do: Tensor, dfinal: _Optional) -> tuple[Tensor, ...]:
    """Return the gradients of v, q, k, log, beta, initial_state, as (B, H, L, X); beta's is empty without beta.

    Those of q and k are summed over the heads of a group; each has its input's dtype.
    """
    batch, heads, _, size, width = ins.sizes
    made, do = chunks_of(ins), near_rows(do).transpose(1, 2)
    delta = ins.beta is not None
    dv, local = ins.outputs(ins.v, width), ins.rows(width, narrow=True)
    du = ins.rows(width, narrow=True) if delta else dv
    _mix(ins, made.pairs, do, local, turned=True)
    carry, dinitial = ins.states(), ins.buffer(batch, heads, size, width)
    ins.run(
        kernels.gd_pass_gradients, "BV", mixed=made.mixed, **made.operands, do=do, local=local, du=du, beta=ins.beta,
        dfinal=None if dfinal is None else dfinal.contiguous(), carry=carry, dinitial=dinitial,
    )  # fmt: skip
    maps: dict[str, Any] = {"dP": ins.rows(ins.chunk), "dA": None}
    of_operands: dict[str, Any] = {"dqueries": ins.rows(size), "dkeys": None, "dends": ins.rows(size)}
    dbeta: _Optional = None
    if made.inverse is not None and ins.beta is not None:
        _mix(ins, made.inverse, du, dv, beta=ins.beta, turned=True)
        maps["dA"], of_operands["dkeys"], dbeta = ins.rows(ins.chunk), ins.rows(size), ins.outputs(ins.beta)
    shared: dict[str, Any] = {
        "values": kept.rest if delta else ins.v,
        "beta": ins.beta,
        "do": do,
        "z": dv if delta else None,
    }
    by: dict[str, Any] = {name: None if ins.channel else ins.lines() for name in ("by_i", "by_j")}
    ins.run(kernels.gd_pairs_gradients, **shared, du=du, P=made.pairs, A=made.pairs_k, **maps, dbeta=dbeta, **by)
    dthrough = torch.empty_like(made.operands["through"])
    ins.run(
        kernels.gd_states_gradients, "BK", **shared, states=kept.states, carry=carry,
        through=made.operands["through"], **of_operands, dthrough=dthrough,
    )  # fmt: skip
    shares = heads != ins.q.shape[1]
    dq, dk = (ins.outputs(t, size, torch.float32 if shares else None) for t in (ins.q, ins.k))
    dlog = ins.outputs(ins.log, size if ins.channel else None)
    given: dict[str, Any] = {"q": ins.q, "k": ins.k, **maps, **of_operands, "dq": dq, "dk": dk}
    if ins.channel:
        sums: dict[str, Any] = {name: ins.rows(size) for name in ("of_sums", "of_ends")}
        ins.run(kernels.gd_channel_gradients, "BK", rows=ins.chunk // _ROWS, **given, **sums, log=ins.log)
        ins.run(kernels.gd_channel_decays, "BK", **sums, dthrough=dthrough, dlog=dlog)
    else:
        (block,) = {dict(tile.constants)["BK"] for tile in tiles("gd_head_gradients", size, width, half=ins.half)}
        parts = blocks_of(block, size)
        sums = {name: ins.lines(parts) for name in ("starting", "ending")}
        ins.run(kernels.gd_head_gradients, "BK", **given, **made.sums, **sums)
        tile = Tile.of(1, BK=side(size))
        ins.run(kernels.gd_head_decays, tile=tile, **by, **sums, dthrough=dthrough, dlog=dlog, PARTS=parts)
    if shares:
        dq, dk = (torch.unflatten(t, 1, (ins.q.shape[1], -1)).sum(2) for t in (dq, dk))
    return dv, dq, dk, dlog, dv.new_empty(0) if dbeta is None else dbeta, dinitial


_INPUTS = "Tensor v, Tensor q, Tensor k, Tensor log_decay, Tensor? beta, Tensor? initial_state, float scale, int chunk"


def _forward(*args: Any) -> tuple[Tensor, ...]:
    *tensors, scale, chunk = args
    v, initial = tensors[0], tensors[5]
    if v.numel():
        o, final, kept = gated_delta_forward(Launcher.of(*tensors, scale=scale, chunk=chunk))
        return o.transpose(1, 2), final, *kept
    o, final, *kept_ = _shapes(*args)
    return o.zero_(), final.zero_() if initial is None else final.copy_(initial), *(t.zero_() for t in kept_)


def _shapes(*args: Any) -> tuple[Tensor, ...]:
    v, q, k, _, beta, *_, chunk = args
    (batch, length, heads, width), size = v.shape, k.shape[3]
    chunks = (length + chunk - 1) // chunk
    narrow = v.dtype if operand_dtype(v, q, k) != tl.float32 else torch.float32
    rest = (0,) if beta is None else (batch, heads, chunks * chunk, width)
    states = (batch, chunks, heads, size, width)
    final = v.new_empty(batch, heads, size, width, dtype=torch.float32)
    return v.new_empty(v.shape), final, v.new_empty(rest, dtype=narrow), v.new_empty(states, dtype=torch.float32)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    tensors, scale, chunk, kept, do, dfinal = args[:6], args[6], args[7], Kept(*args[8:10]), *args[10:]
    likes = _gradients_like(*tensors)
    if do.numel():
        found = gated_delta_backward(Launcher.of(*tensors, scale=scale, chunk=chunk), kept, do, dfinal)
        *rows, dinitial = found
        turned = [g.transpose(1, 2) if g.dim() > 1 else g for g in rows]
        return tuple(g.to(like.dtype).contiguous() for g, like in zip([*turned, dinitial], likes, strict=True))
    if dfinal is not None:  # nothing was scanned: the state's gradient passes through
        likes[-1] = dfinal.to(likes[-1].dtype, copy=True)
    return *(like.zero_() for like in likes[:-1]), likes[-1] if dfinal is not None else likes[-1].zero_()


def _gradients_like(*tensors: Any) -> list[Tensor]:
    """Return tensors of the six gradients' shapes and dtypes."""
    v, q, k, log, beta, initial = tensors
    state = v.new_empty(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
    likes = [v, q, k, log, v.new_empty(0) if beta is None else beta, state if initial is None else initial]
    return [torch.empty_like(like, memory_format=torch.contiguous_format) for like in likes]


register_differentiable_op(
    "gated_delta_triton",
    _INPUTS,
    4,
    forward=_forward,
    fake=_shapes,
    backward=_backward,
    fake_gradients=lambda *args: tuple(_gradients_like(*args[:6])),
    gradients=6,
    differentiable=2,
)


def chunk_of(chunk_size: int, size: int, *, half: bool) -> int:
    """Return the steps of a chunk that run for a ``chunk_size`` that was asked for and keys of ``size`` channels.

    Half as many in float32, and half as many for keys of more than 128 channels, so that shared memory holds a chunk.
    """
    most = GATED_DELTA_CHUNK // (1 if half else 2) // (1 if size <= 128 else 2)
    return min(max(_ROWS, power_of_two(chunk_size)), most)


def gated_delta_triton(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return o (B, L, H, V) in v's dtype and the final state (B, H, K, V) in float32, both differentiable."""
    q, k, v = inputs.q, inputs.k, inputs.v
    log = inputs.log_decay_by_step()
    if log is None:
        log = v.new_zeros(v.shape[2], dtype=torch.float32).expand(v.shape[:3])
    chunk = chunk_of(inputs.chunk_size, k.shape[3], half=operand_dtype(v, q, k) != tl.float32)
    o, final, *_ = torch.ops.hybridnas.gated_delta_triton(
        v, q, k, log, inputs.beta, inputs.initial_state, inputs.query_scale, chunk
    )
    return o, final
