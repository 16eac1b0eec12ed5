"""The selective scan on a GPU: the host's side of ``triton_kernels.py``, as a differentiable operator.

Imports triton at its top: import this module where a CUDA tensor, or the interpreter, asks for it.
The same bits in every run on one machine: no atomics, and the tuner's choice of a tile, which the order of sums over
channels depends on, is remembered on disk. A row's result does not depend on its batch.

Shapes: B batch, L length, D channels, N state size.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridnas.kernels._inputs import boundaries
from hybridnas.kernels._register import register_differentiable_op
from hybridnas.kernels._triton.launch import Tile, launch, near_rows
from hybridnas.kernels._triton.shapes import CHUNK, GROUP, power_of_two, scan_parts
from hybridnas.kernels.selective_scan import triton_kernels as kernels
from hybridnas.kernels.selective_scan.reference import Inputs

_UNROLL = 2  # steps of the forward whose loads are in flight together
_BLOCK = 256  # (n, d) pairs of one program of the chain over chunks
_Optional = Tensor | None

# channels, warps
_TILES = ((32, 1), (64, 2), (16, 1), (8, 1), (4, 1), (32, 2), (8, 2), (4, 2), (32, 4), (8, 4), (4, 4), (8, 8), (4, 8))
# what a thread may use: left alone, ptxas aims at 128 for some tiles and spills; found by the report
_REGISTERS = {"forward": 208, "backward": 208, "backward, more warps": 255}


def tiles(size: int, *, backward: bool) -> list[Tile]:
    """Return the tiles to choose from for states of ``size`` numbers, the likely best first.

    A thread holds at most 16 numbers of a state forward, 8 backward.
    """
    block, most = power_of_two(size), 8 if backward else 16
    fitting = [(D1, w) for D1, w in _TILES if 32 * w <= block * D1 <= most * 32 * w]
    if backward and block > 4:  # sums over N and over channels: lanes along both
        fitting.sort(key=lambda tile: (tile[1], tile[0] > 8))
    return [
        Tile.of(w, _REGISTERS["forward" if not backward else "backward" if w == 1 else "backward, more warps"], D1=D1)
        for D1, w in fitting[:3]
    ]


class Launcher(NamedTuple):
    """The arguments of a scan as the kernels read them: last dimensions contiguous, ``reset`` (B, L) uint8 or None."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: _Optional
    z: _Optional
    bias: _Optional
    initial: _Optional
    reset: _Optional
    softplus: bool
    chunk: int
    only: Tile | None  # this tile instead of the tuner's choice

    @classmethod
    def of(cls, *tensors: _Optional, softplus: bool, chunk: int = CHUNK, only: Tile | None = None) -> Launcher:
        """Copy only what must be."""
        strided = (0, 1, 3, 4, 6)  # u, delta, B, C, z
        ready: list[Any] = [
            None if t is None else near_rows(t) if i in strided else t.contiguous() for i, t in enumerate(tensors)
        ]
        return cls._make([*ready, softplus, chunk, only])

    @property
    def chunks(self) -> int:
        return -(-self.u.shape[1] // self.chunk)

    def buffer(self, *shape: int) -> Tensor:
        return self.u.new_empty(shape, dtype=torch.float32)

    def states(self) -> Tensor:
        """Return an empty (B, C, N, D), one state a chunk; channels last, as lanes lie."""
        return self.buffer(self.u.shape[0], self.chunks, self.A.shape[1], self.u.shape[2])

    def tiles(self, backward: bool) -> list[Tile]:
        return [self.only] if self.only is not None else tiles(self.A.shape[1], backward=backward)

    def scratch(self, programs: int, states: int) -> Tensor:
        """Return an empty buffer in which every program of the backward keeps ``states`` of its widest tile."""
        widest = max(dict(tile.constants)["D1"] for tile in self.tiles(True))
        return self.buffer(programs, states, power_of_two(self.A.shape[1]), widest)

    def strides(self, *names: str, **others: _Optional) -> dict[str, int]:
        """Return u_b, u_l and so on: steps of batch and time in numbers."""
        given = {name: getattr(self, "delta" if name == "dt" else name) for name in names} | others
        pairs = {name: (0, 0) if t is None else t.stride()[:2] for name, t in given.items()}
        return {f"{name}_{letter}": step for name, two in pairs.items() for letter, step in zip("bl", two, strict=True)}

    def sizes(self) -> dict[str, int]:
        return {"L": self.u.shape[1], "D": self.u.shape[2], "N": self.A.shape[1], "CHUNKS": self.chunks}

    def run(self, kernel: Any, per_tile: int, arguments: dict[str, Any], *, backward: bool = False) -> None:
        """Launch a kernel whose programs each take a tile of channels of one of ``per_tile`` chunks."""
        size, channels = self.A.shape[1], self.u.shape[2]
        launch(
            kernel, lambda tile: per_tile * (1 if backward else -(-channels // tile["D1"])), self.tiles(backward),
            ("D", "N"), self.u.device, **self.sizes(), **arguments, SOFTPLUS=self.softplus, BN=power_of_two(size),
        )  # fmt: skip

    def run_chain(self, kernel: Any, **arguments: Any) -> None:
        """Launch a kernel that walks over the chunks, one program for _BLOCK numbers of the state."""
        numbers = self.A.numel()
        launch(
            kernel, lambda _: self.u.shape[0] * -(-numbers // _BLOCK), [Tile.of(4, BLOCK=_BLOCK)], (), self.u.device,
            A=self.A, reset=self.reset, **self.sizes(), **arguments, T=self.chunk,
        )  # fmt: skip


def scan_forward(inputs: Launcher) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, L, D) in u's dtype, the final state (B, D, N) float32 and the states (B, C, N, D) of the backward.

    ``inputs`` must have at least one number: an empty scan is the caller's.
    """
    ins, (batch, _, channels) = inputs, inputs.u.shape
    y_BLD = torch.empty_like(ins.u, memory_format=torch.contiguous_format)
    final_BDN, states, sums = ins.buffer(batch, *ins.A.shape), ins.states(), ins.buffer(batch, ins.chunks, channels)
    shared: dict[str, Any] = {name: getattr(ins, name) for name in ("u", "delta", "A", "B", "bias", "reset")}
    time = {"states": states, "T": ins.chunk, "U": _UNROLL}
    if ins.chunks > 1:
        ins.run(
            kernels.chunk_states,
            batch * (ins.chunks - 1),
            shared | time | {"sums": sums} | ins.strides("u", "dt", "B"),
        )
    ins.run_chain(kernels.pass_states, initial=ins.initial, states=states, sums=sums)
    outputs = {"C": ins.C, "skip": ins.D, "z": ins.z, "y": y_BLD, "final": final_BDN}
    ins.run(kernels.chunk_outputs, batch * ins.chunks, shared | time | outputs | ins.strides("u", "dt", "B", "C", "z"))
    return y_BLD, final_BDN, states


def scan_backward(inputs: Launcher, states: Tensor, dy_BLD: Tensor, dfinal_BDN: _Optional) -> tuple[Tensor, ...]:
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias, initial_state; z's is empty without z.

    Each has its input's dtype, float32 where there is no such input. ``states`` are what ``scan_forward`` returned.
    """
    ins, (batch, length, channels), size = inputs, inputs.u.shape, inputs.A.shape[1]
    dy, final = near_rows(dy_BLD), None if dfinal_BDN is None else dfinal_BDN.contiguous()
    carry, sums = ins.states(), ins.buffer(batch, ins.chunks, channels)
    shared: dict[str, Any] = {name: getattr(ins, name) for name in ("delta", "A", "C", "z", "bias", "reset")}
    shared["dy"] = dy
    if ins.chunks > 1:
        ins.run(
            kernels.chunk_gradients,
            batch * (ins.chunks - 1),
            shared | {"carry": carry, "sums": sums, "T": ins.chunk, "U": _UNROLL} | ins.strides("dt", "C", "z", dy=dy),
        )
    ins.run_chain(kernels.pass_gradients, dfinal=final, carry=carry, sums=sums)
    parts, width = scan_parts(channels)
    empty = partial(torch.empty_like, memory_format=torch.contiguous_format)
    du, ddelta, dz = empty(ins.u), empty(ins.delta), ins.u.new_empty(0) if ins.z is None else empty(ins.z)
    dA, dB, dC = ins.states(), ins.buffer(parts, batch, length, size), ins.buffer(parts, batch, length, size)
    dskip, dbias = torch.empty_like(sums), torch.empty_like(sums)
    dinitial = ins.buffer(batch, channels, size)
    group = min(GROUP, ins.chunk)
    outputs = {"du": du, "ddelta": ddelta, "dz": dz, "dA": dA, "dB": dB, "dC": dC, "dskip": dskip, "dbias": dbias}
    outputs["dinitial"], outputs["scratch"] = (
        dinitial,
        ins.scratch(batch * ins.chunks * parts, ins.chunk // group + group),
    )
    ins.run(
        kernels.chunk_inputs_gradients,
        batch * ins.chunks * parts,
        shared
        | {"u": ins.u, "B": ins.B, "skip": ins.D, "states": states, "carry": carry}
        | {"BATCH": batch, "PARTS": parts, "WIDTH": width, "K": ins.chunk // group, "S": group}
        | outputs
        | ins.strides("u", "dt", "B", "C", "z", dy=dy),
        backward=True,
    )

    def as_input(gradient: Tensor, tensor: _Optional) -> Tensor:
        return gradient if tensor is None else gradient.to(tensor.dtype)

    return (
        du, ddelta, as_input(dA.sum((0, 1)).t().contiguous(), ins.A), as_input(dB.sum(0), ins.B),
        as_input(dC.sum(0), ins.C), as_input(dskip.sum((0, 1)), ins.D), dz, as_input(dbias.sum((0, 1)), ins.bias),
        as_input(dinitial, ins.initial),
    )  # fmt: skip


_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? reset, bool softplus"
)


def _state_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    return (u.shape[0], -(-u.shape[1] // CHUNK), A.shape[1], u.shape[2])


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, softplus = args
    u, A, initial = tensors[0], tensors[2], tensors[8]
    if u.numel() and A.numel():
        return scan_forward(Launcher.of(*tensors, softplus=softplus))
    final = u.new_zeros(u.shape[0], *A.shape, dtype=torch.float32) if initial is None else initial.float().clone()
    return torch.zeros_like(u), final, u.new_zeros(_state_shape(u, A), dtype=torch.float32)


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, A = args[0], args[2]
    final = u.new_empty(u.shape[0], *A.shape, dtype=torch.float32)
    return u.new_empty(u.shape), final, u.new_empty(_state_shape(u, A), dtype=torch.float32)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    *tensors, softplus, states, dy, dfinal = args
    if dy.numel() and tensors[2].numel():
        return scan_backward(Launcher.of(*tensors, softplus=softplus), states, dy, dfinal)
    gradients = tuple(torch.zeros_like(g) for g in _gradients_like(*tensors))
    if dfinal is not None:  # nothing was scanned: the state's gradient passes through
        gradients[-1].copy_(dfinal)
    return gradients


def _gradients_like(*tensors: Any) -> list[Tensor]:
    """Return tensors of the nine gradients' shapes and dtypes."""
    u, delta, A, B, C, D, z, bias, initial = tensors[:9]
    vector = u.new_empty(u.shape[2], dtype=torch.float32)
    state = u.new_empty(u.shape[0], *A.shape, dtype=torch.float32)
    rest = (vector if D is None else D, u.new_empty(0) if z is None else z, vector if bias is None else bias)
    likes = [u, delta, A, B, C, *rest, state if initial is None else initial]
    return [torch.empty_like(like, memory_format=torch.contiguous_format) for like in likes]


register_differentiable_op(
    "selective_scan_triton",
    _INPUTS,
    3,
    forward=_forward,
    fake=_fake,
    backward=_backward,
    fake_gradients=lambda *args: tuple(_gradients_like(*args[:9])),
    gradients=9,
    differentiable=2,
)


def scan_triton(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) in u's dtype and the final state (B, D, N) in float32, both differentiable."""
    reset = None if inputs.seq_idx is None else boundaries(inputs.seq_idx).to(torch.uint8)
    op = torch.ops.hybridnas.selective_scan_triton
    y_BLD, final_BDN, _ = op(*inputs.floating, reset, inputs.delta_softplus)
    return y_BLD, final_BDN
