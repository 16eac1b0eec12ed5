"""Ahead-of-time compilation for a GPU that need not be here, and its use of registers, spills and shared memory.

Spills show as a stack on NVIDIA, never as local memory: cuobjdump tells its size, ptxas -v how much of it is spilled.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget, Language
from triton.compiler import ASTSource, make_backend

from hybridnas.kernels._triton.launch import OPTIONS, Launch, Tile, precision


class Target(NamedTuple):
    """A GPU architecture and what one program may use of it."""

    backend: str
    arch: int | str
    lanes: int
    registers: int
    shared: int  # bytes

    @property
    def name(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 255, 163 * 1024),  # A100
    "sm_90": Target("cuda", 90, 32, 255, 227 * 1024),  # H100
    "gfx942": Target("hip", "gfx942", 64, 512, 64 * 1024),  # MI300
}


class Compilation(NamedTuple):
    """A launch with one of its tiles: what Triton would compile for it."""

    label: str
    launch: Launch
    tile: Tile


_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Usage(NamedTuple):
    """What one compiled kernel uses; ``spills`` counts bytes on NVIDIA, registers on AMD; ``failed`` is why not."""

    kernel: str
    label: str
    tile: str
    target: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    seconds: float = 0.0
    failed: str = ""

    @property
    def problem(self) -> str:
        """What is over a limit of the target, or empty."""
        target = TARGETS[self.target]
        if self.failed:
            return self.failed
        if self.stack or self.spills:
            return f"spills registers: {self.spills} spilled, {self.stack} bytes of stack"
        if self.registers > target.registers:
            return f"{self.registers} registers, {target.registers} are allowed"
        return f"{self.shared} bytes shared, {target.shared} are allowed" if self.shared > target.shared else ""


def source_of(compilation: Compilation, target: Target) -> ASTSource:
    """Return what is compiled for ``target``, its arguments specialised as a launch does.

    Tensors are aligned to 16 bytes, integers divisible by 16 are known to be, and those that are 1 are constants.
    """
    kernel, arguments = compilation.launch.kernel, dict(compilation.launch.arguments)
    arguments |= dict(compilation.tile.constants)
    if "PRECISION" in kernel.arg_names:
        arguments["PRECISION"] = precision(target.backend == "cuda")
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = _TYPES[value.dtype] if tensor else "i32" if value < 2**31 else "i64"
        if tensor or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def options_of(compilation: Compilation, target: Target) -> dict[str, Any]:
    return OPTIONS | compilation.tile.options(target.backend == "cuda")


def identity(compilation: Compilation, target: Target) -> str:
    """Return what decides the compiled code: two launches with one identity are one kernel."""
    source, options = source_of(compilation, target), options_of(compilation, target)
    return repr((source.name, source.signature, source.constants, source.attrs, sorted(options.items()), target.name))


def compile_for(compilation: Compilation, target: Target) -> Any:
    """Return Triton's compiled kernel for ``target``."""
    gpu = GPUTarget(target.backend, target.arch, target.lanes)
    return triton.compile(source_of(compilation, target), target=gpu, options=options_of(compilation, target))


def intermediate(compilation: Compilation, target: Target) -> str:
    """Return Triton's own intermediate code, functions inlined, without compiling further."""
    backend = make_backend(GPUTarget(target.backend, target.arch, target.lanes))
    context, options = ir.context(), backend.parse_options(options_of(compilation, target))
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, Language.TRITON)
    module = source_of(compilation, target).make_ir(
        GPUTarget(target.backend, target.arch, target.lanes), options, backend.get_codegen_implementation(options),
        backend.get_module_map(), context,
    )  # fmt: skip
    return str(stages["ttir"](module, {}))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has no {pattern!r}: {text[:200]}")
    return int(found.group(1))


def _nvidia(compiled: Any, target: Target) -> dict[str, int]:
    from triton.backends.nvidia.compiler import get_ptxas

    arch = int(target.arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(compiled.asm["cubin"])
        used = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
        stack, spills = _number(r"STACK:(\d+)", used), 0
        if stack:  # what is spilled lies on the stack: without one there is nothing to count, and no need to assemble
            ptx.write_text(compiled.asm["ptx"])
            name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
            out = str(Path(folder) / "out")
            assembled = _output(get_ptxas(arch).path, "-v", f"--gpu-name={name}", str(ptx), "-o", out)
            spills = _number(r"(\d+) bytes spill stores", assembled)
    return {
        "registers": _number(r"REG:(\d+)", used),
        "stack": stack,
        "spills": spills,
        "shared": max(_number(r"SHARED:(\d+)", used), compiled.metadata.shared),
    }


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise ValueError(f"{Path(command[0]).name} failed: {(done.stdout + done.stderr)[:300]}")
    return done.stdout + done.stderr


def _amd(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", text),
        "shared": compiled.metadata.shared,
    }


def _measure(compilation: Compilation, target: Target, pipe: Any) -> None:
    start = time.monotonic()
    try:
        compiled = compile_for(compilation, target)
        used: dict[str, Any] = _nvidia(compiled, target) if target.backend == "cuda" else _amd(compiled)
    except Exception as error:  # whatever the compiler raises belongs into the table
        used = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    pipe.send(used | {"seconds": time.monotonic() - start})


def usage(compilation: Compilation, target: Target, timeout: float = 120.0) -> Usage:
    """Compile in a child process, which is ended after ``timeout`` seconds, and return what the kernel uses."""
    context = multiprocessing.get_context("fork")  # triton is loaded already: a fresh process takes seconds
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(compilation, target, send))
    child.start()
    send.close()
    name = Usage(compilation.launch.kernel.__name__, compilation.label, compilation.tile.label, target.name)
    try:
        if not receive.poll(timeout):
            return name._replace(seconds=timeout, failed=f"did not compile in {timeout:.0f} s")
        return name._replace(**receive.recv())
    except EOFError:
        return name._replace(failed="the compiler's process died")
    finally:
        child.kill()
        child.join()
        receive.close()
