"""State-space duality on a GPU: launches of ``triton_kernels.py``, as a differentiable operator.

Imports triton at its top: import this module where a CUDA tensor, or the interpreter, asks for it. The same bits in
every run on one machine: no atomics, and the tuner's choice of tiles is remembered. A row's result does not depend on
its batch.

Shapes: B batch, L length, H heads, P channels of a head, G groups, N state size, C chunks of T steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from hybridnas.kernels._inputs import boundaries
from hybridnas.kernels._register import register_differentiable_op
from hybridnas.kernels._triton.launch import Tile, launch, near_rows, operand_dtype
from hybridnas.kernels._triton.shapes import SSD_CHUNKS, SSD_ROWS, blocks_of, power_of_two
from hybridnas.kernels.ssd import triton_kernels as kernels
from hybridnas.kernels.ssd.reference import Inputs

_BLOCK = 256  # numbers of a state that one program of the chain over chunks has
_CHANNELS = 1024  # of one program of the gate's backward
_STATES = 64  # of one program of the gradients of B and C
_Optional = Tensor | None

# warps and block sizes to choose from, the likely best first; float32 products take three TF32 ones and more registers
_HALF: dict[str, tuple[tuple[int, dict[str, int]], ...]] = {
    "ssd_scores": ((4, {"BN": 64}), (8, {"BN": 64})),
    "ssd_states": ((4, {"BP": 64, "BN": 64}), (8, {"BP": 64, "BN": 128}), (4, {"BP": 32, "BN": 64})),
    "ssd_outputs": ((4, {"BP": 64, "BN": 64}), (8, {"BP": 64, "BN": 64}), (4, {"BP": 32, "BN": 64})),
    "ssd_inputs_gradients": ((8, {"BP": 64, "BN": 64}), (8, {"BP": 64, "BN": 32}), (8, {"BP": 32, "BN": 64})),
    "ssd_scores_gradients": ((8, {"BP": 64}), (8, {"BP": 32})),
    "ssd_maps_gradients": ((4, {"BP": 64}), (8, {"BP": 64}), (4, {"BP": 32})),
}
_FLOAT: dict[str, tuple[tuple[int, dict[str, int]], ...]] = {
    "ssd_scores": ((4, {"BN": 32}), (2, {"BN": 32})),
    "ssd_states": ((4, {"BP": 32, "BN": 64}), (4, {"BP": 64, "BN": 64})),
    "ssd_outputs": ((4, {"BP": 64, "BN": 32}), (4, {"BP": 32, "BN": 32})),
    "ssd_inputs_gradients": ((8, {"BP": 64, "BN": 32}), (8, {"BP": 32, "BN": 32})),
    "ssd_scores_gradients": ((4, {"BP": 32}), (2, {"BP": 32})),
    "ssd_maps_gradients": ((4, {"BP": 32}), (8, {"BP": 32})),
}
_NARROW = {"ssd_scores_gradients": ((8, {"BP": 16}), (2, {"BP": 16}))}  # float32, width 16: 4 warps spill on sm_90


def side(number: int) -> int:
    """Return the side of a block of a matrix product that holds ``number``: 16 at least."""
    return max(16, power_of_two(number))


def tiles(kernel: str, width: int, size: int, *, half: bool) -> list[Tile]:
    """Return the tiles to choose from for heads of ``width`` channels and states of ``size``, without repetition."""
    most = {"BP": side(width), "BN": side(size)}
    narrow = not half and most["BP"] == 16 and kernel in _NARROW
    sizes = _NARROW[kernel] if narrow else (_HALF if half else _FLOAT)[kernel]
    return list(dict.fromkeys(Tile.of(w, **{k: min(v, most[k]) for k, v in blocks.items()}) for w, blocks in sizes))


class Launcher(NamedTuple):
    """The arguments as the kernels read them: (B, L, HP) or (B, L, GN), last dimension contiguous; document (B, CT)."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: _Optional
    z: _Optional
    bias: _Optional
    initial: _Optional
    document: _Optional
    softplus: bool
    chunk: int
    rows: int
    width: int
    size: int
    half: bool  # precision of the products' operands

    @classmethod
    def of(cls, *tensors: _Optional, softplus: bool, chunk: int, rows: int | None = None) -> Launcher:
        """Copy only what must be."""
        x, B = tensors[0], tensors[3]
        assert x is not None and B is not None
        strided = (0, 1, 3, 4, 6)
        ready: list[Any] = [
            t if t is None else near_rows(t.flatten(2)) if i in strided else t.contiguous()
            for i, t in enumerate(tensors)
        ]
        half = operand_dtype(*(t for i, t in enumerate(ready) if i in (0, 3, 4))) != tl.float32
        rows = min(rows or (SSD_ROWS if half else SSD_ROWS // 2), chunk)
        return cls._make([*ready, softplus, chunk, rows, x.shape[3], B.shape[3], half])

    @property
    def heads(self) -> int:
        return self.A.shape[0]

    @property
    def groups(self) -> int:
        return self.B.shape[2] // self.size

    @property
    def chunks(self) -> int:
        return blocks_of(self.chunk, self.x.shape[1])

    def buffer(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)

    def lines(self, *before: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an empty (..., B, H, CT): a number for every head and step."""
        return self.x.new_empty(*before, self.x.shape[0], self.heads, self.chunks * self.chunk, dtype=dtype)

    def states(self) -> Tensor:
        return self.buffer(self.x.shape[0], self.chunks, self.heads, self.width, self.size)

    def strides(self, **tensors: _Optional) -> dict[str, int]:
        """Return x_b, x_l and so on: steps of batch and time in numbers."""
        pairs = {name: (0, 0) if t is None else t.stride()[:2] for name, t in tensors.items()}
        return {f"{name}_{letter}": step for name, two in pairs.items() for letter, step in zip("bl", two, strict=True)}

    def run(self, kernel: Any, across: str, per_chunk: int, blocks: int | str, **arguments: Any) -> None:
        """Launch a matrix product: one program per chunk, head or group (``across``) and block of the tile's sizes."""
        name = kernel.__name__
        sizes: dict[str, Any] = {
            "L": self.x.shape[1],
            "H": self.heads,
            "G": self.groups,
            "R": self.heads // self.groups,
        }
        sizes |= {"P": self.width, "N": self.size, "CHUNKS": self.chunks, "T": self.chunk, "BT": self.rows}
        sizes |= {"LINE": self.x.shape[0] * self.heads * self.chunks * self.chunk}
        sizes |= {"DOT": operand_dtype(self.x, self.B, self.C), "PRECISION": None}
        first = self.x.shape[0] * self.chunks * (self.heads if across == "H" else self.groups)

        def programs(tile: dict[str, int]) -> tuple[int, ...]:
            counts = {"BP": lambda: blocks_of(tile["BP"], self.width), "BN": lambda: blocks_of(tile["BN"], self.size)}
            number = blocks if isinstance(blocks, int) else 1
            for letter in blocks.split() if isinstance(blocks, str) else ():
                number *= counts[letter]()
            return first, per_chunk * number

        known = {k: v for k, v in sizes.items() if k in kernel.arg_names}
        key = tuple(k for k in ("P", "N", "R") if k in known)
        launch(
            kernel,
            programs,
            tiles(name, self.width, self.size, half=self.half),
            key,
            self.x.device,
            **known,
            **arguments,
        )

    def run_steps(self, kernel: Any, **arguments: Any) -> None:
        """Launch a kernel over (chunk, heads)."""
        heads = min(max(1, 1024 // self.chunk), power_of_two(self.heads))
        launch(
            kernel, lambda _: self.x.shape[0] * self.chunks * blocks_of(heads, self.heads), [Tile.of(4, BH=heads)],
            (), self.x.device, dt=self.dt, A=self.A, bias=self.bias, L=self.x.shape[1], H=self.heads,
            CHUNKS=self.chunks, SOFTPLUS=self.softplus, T=self.chunk, **self.strides(dt=self.dt), **arguments,
        )  # fmt: skip

    def run_chain(self, kernel: Any, **arguments: Any) -> None:
        """Launch a kernel that walks over the chunks, one program for _BLOCK numbers of a head's state."""
        numbers = self.width * self.size
        launch(
            kernel, lambda _: self.x.shape[0] * self.heads * blocks_of(_BLOCK, numbers), [Tile.of(4, BLOCK=_BLOCK)],
            (), self.x.device, document=self.document, H=self.heads, NUMBERS=numbers, CHUNKS=self.chunks,
            T=self.chunk, **arguments,
        )  # fmt: skip


class Kept(NamedTuple):
    """What the forward keeps for the backward: steps, hi, lo (B, H, CT), scores, start states, y before the gate."""

    steps: Tensor
    hi: Tensor
    lo: Tensor
    scores: Tensor
    states: Tensor
    ungated: Tensor

    def weights(self) -> dict[str, Tensor]:
        return {"steps": self.steps, "hi": self.hi, "lo": self.lo}


def ssd_forward(inputs: Launcher) -> tuple[Tensor, Tensor, Kept]:
    """Return y (B, L, HP) in x's dtype, the final state (B, H, P, N) float32 and what the backward needs."""
    ins, (batch, length, channels), rows = inputs, inputs.x.shape, inputs.chunk // inputs.rows
    y = ins.x.new_empty(batch, length, channels)
    kept = Kept(
        ins.lines(), ins.lines(), ins.lines(), ins.buffer(batch, ins.chunks, ins.groups, ins.chunk, ins.chunk),
        ins.states(), torch.empty_like(y) if ins.z is not None else y.new_empty(0),
    )  # fmt: skip
    final = ins.buffer(batch, ins.heads, ins.width, ins.size)
    ins.run_steps(kernels.ssd_steps, **kept.weights())
    of_scores = ins.strides(B=ins.B, C=ins.C)
    ins.run(kernels.ssd_scores, "G", rows * rows, 1, B=ins.B, C=ins.C, scores=kept.scores, **of_scores)
    shared = kept.weights() | {"document": ins.document, "states": kept.states, "x": ins.x}
    _chunk_states(ins, shared | {"B": ins.B}, start=False)
    ins.run_chain(kernels.ssd_pass_states, initial=ins.initial, states=kept.states, final=final, hi=kept.hi, lo=kept.lo)
    ins.run(
        kernels.ssd_outputs, "H", rows, "BP", **shared, C=ins.C, scores=kept.scores, skip=ins.D, z=ins.z, y=y,
        ungated=kept.ungated, **ins.strides(x=ins.x, C=ins.C, z=ins.z),
    )  # fmt: skip
    return y, final, kept


def _chunk_states(ins: Launcher, tensors: dict[str, Any], *, start: bool) -> None:
    strides = ins.strides(x=tensors["x"], B=tensors["B"])
    ins.run(kernels.ssd_states, "H", 1, "BP BN", **tensors, **strides, START=start)


def ssd_backward(inputs: Launcher, kept: Kept, dy: Tensor, dfinal: _Optional) -> tuple[Tensor, ...]:
    """Return the gradients of x, dt, A, B, C, D, z, dt_bias, initial_state, channels flat; z's is empty without z.

    Each has its input's dtype, float32 where there is no such input.
    """
    ins, (batch, length, channels) = inputs, inputs.x.shape
    g, dz = _gate_gradients(ins, kept, near_rows(dy))
    carry, dinitial = ins.states(), ins.buffer(batch, ins.heads, ins.width, ins.size)
    weights = kept.weights() | {"document": ins.document}
    _chunk_states(ins, weights | {"x": g, "B": ins.C, "states": carry}, start=True)
    through = ins.buffer(blocks_of(_BLOCK, ins.width * ins.size), batch, ins.heads, ins.chunks)
    ins.run_chain(
        kernels.ssd_pass_gradients, dfinal=None if dfinal is None else dfinal.contiguous(), states=kept.states,
        carry=carry, dinitial=dinitial, through=through, hi=kept.hi, lo=kept.lo,
    )  # fmt: skip
    rows, across = ins.chunk // ins.rows, blocks_of(min(_STATES, side(ins.size)), ins.size)
    dx, direct, ending = ins.x.new_empty(batch, length, channels), ins.lines(), ins.lines()
    dskip = ins.buffer(batch, ins.chunks, rows, ins.heads)
    ins.run(
        kernels.ssd_inputs_gradients, "H", rows, 1, **weights, x=ins.x, B=ins.B, g=g, scores=kept.scores, carry=carry,
        skip=ins.D, dx=dx, direct=direct, ending=ending, dskip=dskip, **ins.strides(x=ins.x, B=ins.B, g=g),
    )  # fmt: skip
    dscores, (by_i, by_j) = torch.empty_like(kept.scores), (ins.lines(rows, dtype=torch.float64) for _ in range(2))
    ins.run(
        kernels.ssd_scores_gradients, "G", rows * rows, 1, **weights, x=ins.x, g=g, scores=kept.scores,
        dscores=dscores, by_i=by_i, by_j=by_j, **ins.strides(x=ins.x, g=g),
    )  # fmt: skip
    starting = ins.lines(across)
    maps = weights | {"dscores": dscores, "starting": starting, "BN": min(_STATES, side(ins.size))}
    dC = _map_gradients(ins, maps, v=g, other=ins.B, own=ins.C, states=kept.states, later=False)
    dB = _map_gradients(ins, maps, v=ins.x, other=ins.C, own=ins.B, states=carry, later=True)
    ddt = ins.dt.new_empty(ins.dt.shape)
    dA, dbias = ins.buffer(batch, ins.chunks, ins.heads), ins.buffer(batch, ins.chunks, ins.heads)
    ins.run_steps(
        kernels.ssd_steps_gradients, steps=kept.steps, direct=direct, ending=ending, by_i=by_i, by_j=by_j,
        starting=starting, through=through, ddt=ddt, dA=dA, dbias=dbias, LINE=direct.numel(),
        BLOCKS=through.shape[0], ACROSS=across, BT=ins.rows,
    )  # fmt: skip
    return dx, ddt, dA.sum((0, 1)), dB, dC, dskip.sum((0, 1, 2)), dz, dbias.sum((0, 1)), dinitial


def _gate_gradients(ins: Launcher, kept: Kept, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs' gradient before the gate and z's, which is empty without z."""
    if ins.z is None:
        return dy, dy.new_empty(0)
    (batch, length, channels), z = ins.x.shape, ins.z
    g, dz = dy.new_empty(dy.shape), z.new_empty(z.shape)
    launch(
        kernels.ssd_gate_gradients, lambda _: batch * length * blocks_of(_CHANNELS, channels),
        [Tile.of(4, BLOCK=_CHANNELS)], (), dy.device, dy=dy, z=z, ungated=kept.ungated, dz=dz, g=g, L=length,
        D=channels, **ins.strides(dy=dy, z=z),
    )  # fmt: skip
    return g, dz


def _map_gradients(
    ins: Launcher, maps: dict[str, Any], *, v: Tensor, other: Tensor, own: Tensor, states: Tensor, later: bool
) -> Tensor:
    out = own.new_empty(own.shape)
    ins.run(
        kernels.ssd_maps_gradients, "G", ins.chunk // ins.rows, blocks_of(maps["BN"], ins.size), **maps, v=v,
        other=other, own=own, states=states, out=out, LATER=later, **ins.strides(v=v, other=other, own=own),
    )  # fmt: skip
    return out


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? document, bool softplus, int chunk"
)


def _final_of(x: Tensor, B: Tensor, initial: _Optional) -> Tensor:
    """Return the state after no step."""
    final = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=torch.float32)
    return final if initial is None else final.copy_(initial)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    *tensors, softplus, chunk = args
    x, B, initial = tensors[0], tensors[3], tensors[8]
    if x.numel() and B.numel():
        y, final, kept = ssd_forward(Launcher.of(*tensors, softplus=softplus, chunk=chunk))
        return y.view(x.shape), final, *kept
    y, _, *kept_ = _shapes(*args)
    return y.zero_(), _final_of(x, B, initial), *(t.zero_() for t in kept_)


def _shapes(*args: Any) -> tuple[Tensor, ...]:
    x, B, z, chunk = args[0], args[3], args[6], args[-1]
    (batch, length, heads, width), (groups, size) = x.shape, B.shape[2:]
    chunks = (length + chunk - 1) // chunk

    def buffer(*shape: int) -> Tensor:
        empty: Tensor = x.new_empty(shape, dtype=torch.float32)
        return empty

    lines = (buffer(batch, heads, chunks * chunk) for _ in range(3))
    scores, states = buffer(batch, chunks, groups, chunk, chunk), buffer(batch, chunks, heads, width, size)
    ungated = x.new_empty(0) if z is None else x.new_empty(batch, length, heads * width)
    return x.new_empty(x.shape), buffer(batch, heads, width, size), *lines, scores, states, ungated


def _backward(*args: Any) -> tuple[Tensor, ...]:
    tensors, softplus, chunk, kept, dy, dfinal = args[:10], args[10], args[11], Kept(*args[12:18]), *args[18:]
    likes = _gradients_like(*tensors)
    if dy.numel() and tensors[3].numel():
        found = ssd_backward(Launcher.of(*tensors, softplus=softplus, chunk=chunk), kept, dy.flatten(2), dfinal)
        return tuple(g.to(like.dtype).view(like.shape) for g, like in zip(found, likes, strict=True))
    if dfinal is not None:  # nothing was scanned: the state's gradient passes through
        likes[-1] = dfinal.to(likes[-1].dtype, copy=True)
    return *(like.zero_() for like in likes[:-1]), likes[-1] if dfinal is not None else likes[-1].zero_()


def _gradients_like(*tensors: Any) -> list[Tensor]:
    """Return tensors of the nine gradients' shapes and dtypes."""
    x, dt, A, B, C, D, z, bias, initial = tensors[:9]
    vector = x.new_empty(A.shape, dtype=torch.float32)
    state = x.new_empty(x.shape[0], *x.shape[2:], B.shape[3], dtype=torch.float32)
    rest = (vector if D is None else D, x.new_empty(0) if z is None else z, vector if bias is None else bias)
    likes = [x, dt, A, B, C, *rest, state if initial is None else initial]
    return [torch.empty_like(like, memory_format=torch.contiguous_format) for like in likes]


register_differentiable_op(
    "ssd_triton",
    _INPUTS,
    8,
    forward=_forward,
    fake=_shapes,
    backward=_backward,
    fake_gradients=lambda *args: tuple(_gradients_like(*args[:9])),
    gradients=9,
    differentiable=2,
)


def chunk_of(chunk_size: int) -> int:
    """Return the steps of a chunk that run for a ``chunk_size`` that was asked for."""
    least, most = SSD_CHUNKS
    return min(max(least, power_of_two(chunk_size)), most)


def documents(seq_idx_BL: Tensor, chunk: int) -> Tensor:
    """Return each step's document (B, CT) int32, counted from 0 in its row; what the last chunk lacks is the last."""
    number_BL = boundaries(seq_idx_BL).cumsum(1, dtype=torch.int32)
    missing = -seq_idx_BL.shape[1] % chunk
    return torch.cat([number_BL, number_BL[:, -1:].expand(-1, missing)], 1)


def ssd_triton(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (B, L, H, P) in x's dtype and the final state (B, H, P, N) in float32, both differentiable."""
    chunk = chunk_of(inputs.chunk_size)
    document = None if inputs.seq_idx is None else documents(inputs.seq_idx, chunk)
    y, final, *_ = torch.ops.hybridnas.ssd_triton(*inputs.floating, document, inputs.dt_softplus, chunk)
    return y, final
