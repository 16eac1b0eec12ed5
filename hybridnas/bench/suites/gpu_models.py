"""The gpu suite's whole models: training steps, decoding with and without a CUDA graph, and a short search.

Shapes: B batch, L length.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.arch.presets import preset
from hybridnas.bench import models, peers
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Form, measure
from hybridnas.bench.result import Result, Table
from hybridnas.data.source import Batch
from hybridnas.errors import ConfigError, HybridNASError
from hybridnas.layers.block import map_state
from hybridnas.layers.mode import evaluating
from hybridnas.search.config import SearchConfig
from hybridnas.search.named import named_budget, named_data, named_space
from hybridnas.search.runner import Search
from hybridnas.train.config import TrainConfig
from hybridnas.train.evaluate import autocast
from hybridnas.train.objective import Objective
from hybridnas.train.optim import make_optimizer

# Dense bfloat16 products, from NVIDIA's data sheets [FLOP/s]: a name contains the key.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
PRESETS = ("mamba", "transformer", "moe_mamba", "mamba_100m", "moe_mamba_100m")
_BACKWARD = 3  # of a training step's FLOPs to the forward pass's
_PLAIN, _GRAPH, _PEER = "ours", "ours, CUDA graph", "transformers' generate"
_SMALL = {"d_model": 32, "n_blocks": 2, "vocab_size": 64, "n_experts": 4}


def measure_models(
    config: BenchConfig,
    result: Result,
    device: torch.device,
    settle: Callable[[], None] | None,
    keep: Callable[[], None],
) -> None:
    """Measure on a device; what does not fit or fails is said in its row, and ``keep`` is called after each part."""
    for part in (_training, _decoding, _search):
        try:
            part(config, result, device, settle or _nothing, keep)
        except (HybridNASError, RuntimeError, ImportError) as error:
            result.notes.append(f"{part.__name__.strip('_')} failed: {_words(error)}")
        keep()


def _training(
    config: BenchConfig, result: Result, device: torch.device, settle: Callable[[], None], keep: Callable[[], None]
) -> None:
    batch, length, steps = (2, 32, 1) if config.tiny else (16, 1024, config.pick(20, 8, 1))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
    peak = next((rate for key, rate in PEAKS.items() if key in name), None)
    columns = ("preset", "active params", "tokens/s", "s/step", "GiB", "share of bf16 peak", "losses", "note")
    table = Table(f"training steps, batch {batch}, L {length}, {name}", columns, [])
    result.tables.append(table)
    for one in PRESETS:
        arch = _sized(one, tiny=config.tiny)
        row: list[Any] = [one, arch.cost().active_params]
        try:
            seconds, losses = _steps(arch, device, batch, length, steps, settle)
            rate = batch * length / seconds
            flops = _BACKWARD * arch.cost(seq_len=length).flops_per_token
            memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
            row += [
                round(rate),
                seconds,
                memory,
                peak and rate * flops / peak,
                " ".join(f"{x:.3f}" for x in losses),
                "",
            ]
        except (HybridNASError, RuntimeError) as error:  # memory is among them: a row says so, and the next one runs
            row += [None, None, None, None, "", _words(error)]
        table.rows.append(row)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        keep()


def _steps(
    arch: Arch, device: torch.device, batch: int, length: int, steps: int, settle: Callable[[], None]
) -> tuple[float, list[float]]:
    """Return the mean seconds of a step and the losses before and after them, on one batch drawn at random."""
    model = HybridLM(arch, device=device)
    objective = Objective(model)
    optimizer = make_optimizer(objective, TrainConfig(lr=1e-3))
    around = autocast("auto", device)
    ids_BL = torch.randint(arch.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0)).to(device)
    one = Batch(ids_BL[:, :-1], ids_BL[:, 1:])

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with around():
            found = objective(one)
        loss: Tensor = found.total / one.targets_BL.numel()
        sum(found.losses.values(), start=loss).backward()
        optimizer.step()
        return loss.detach()

    losses = [float(step()) for _ in range(3)]  # kernels are compiled and tuned here
    settle()
    began = time.perf_counter()
    last = [step() for _ in range(steps)][-1]
    settle()
    return (time.perf_counter() - began) / steps, [*losses, float(last)]


def _decoding(
    config: BenchConfig, result: Result, device: torch.device, settle: Callable[[], None], keep: Callable[[], None]
) -> None:
    count = config.pick(64, 32, 4)
    for name in ("mamba", "moe_mamba", "transformer"):
        arch = _sized(name, tiny=config.tiny)
        case = f"a token, batch 1, {name}"
        model = HybridLM(arch, device=device).eval()
        ids_BL = torch.zeros(1, 64, dtype=torch.long, device=device)
        forms = [Form(_PLAIN, _per_token(partial(model.generate, ids_BL, count, temperature=0), count, settle))]
        try:
            forms.append(Form(_GRAPH, _per_token(_graph(model, ids_BL, count), count, settle)))
        except (HybridNASError, RuntimeError) as error:
            result.missing(case, _GRAPH, _words(error))
        why = peers.absent("transformers") if name == "mamba" else "transformers has no such model"
        if why:
            result.missing(case, _PEER, why)
        else:
            sizes = models.Sizes(len(arch.layers), arch.d_model, arch.vocab_size)
            peer = models.hf_mamba(sizes, use_mambapy=False).to(device).eval()
            call = partial(peer.generate, ids_BL, max_new_tokens=count, min_new_tokens=count, do_sample=False)
            forms.append(Form(_PEER, _per_token(call, count, settle)))
        result.add(case, measure(forms, config.pick(5, 3, 1)))
        for form in forms[1:]:
            result.ratio(case, form.name, _PLAIN)
        keep()


def _per_token(call: Callable[[], Any], count: int, settle: Callable[[], None]) -> Callable[[], float]:
    def run() -> float:
        settle()
        began = time.perf_counter()
        call()
        settle()
        return (time.perf_counter() - began) / count

    return run


@torch.no_grad()
def _graph(model: HybridLM, ids_BL: Tensor, count: int) -> Callable[[], None]:
    """Return what draws ``count`` tokens one after another by one CUDA graph over a state of fixed size.

    Raises ConfigError where there can be none, RuntimeError for operations that cannot be captured.
    """
    if ids_BL.device.type != "cuda":
        raise ConfigError("a CUDA graph needs a CUDA device")
    if any(block.role == "attention" for block in model.blocks()):
        raise ConfigError("the state of attention grows, and a CUDA graph has fixed shapes")
    with evaluating(model):
        output = model(ids_BL, state=model.init_state(ids_BL.shape[0]))
        assert output.state is not None
        held = [map_state(lambda tensor: tensor.clone(), own) for own in output.state]
        token_B1 = output.logits[:, -1:].argmax(-1)

        def step() -> None:
            found = model(token_B1, state=tuple(held))
            token_B1.copy_(found.logits[:, -1:].argmax(-1))
            for kept, new in zip(held, found.state or (), strict=True):
                for old, tensor in zip(kept, new, strict=True):
                    old.copy_(tensor)

        warm = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):  # outside of the capture, as torch asks
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

    def run() -> None:
        for _ in range(count):
            graph.replay()

    return run


def _search(
    config: BenchConfig, result: Result, device: torch.device, settle: Callable[[], None], keep: Callable[[], None]
) -> None:
    budget = {**named_budget("smoke"), "minutes": None}
    if config.tiny:
        budget |= {"n_trials": 2, "d_model": 16, "depth": 2, "tokens_per_active_param": 0.2, "valid_tokens": 256}
    with tempfile.TemporaryDirectory() as folder:
        search = Search(
            SearchConfig.from_dict(
                {
                    "space": named_space("mamba_moe"),
                    "data": named_data("stdlib"),
                    "budget": budget,
                    "study": "gpu",
                    "runs": Path(folder),
                    "tracking": "off",
                    "device": str(device),
                }
            )
        )
        found = search.run()
    trained = sum(one.tokens for one in found.records)
    columns = ("trials", "seconds", "trials per hour", "tokens per second", "best", "loss", "ended")
    best = ("", None) if found.best is None else (found.best.pattern, found.best.valid_loss)
    hourly = 3600 * len(found.records) / found.seconds
    row = [len(found.records), found.seconds, hourly, trained / found.seconds, *best, found.ended]
    result.tables.append(Table("a search of budget=smoke, one worker", columns, [row]))


def _sized(name: str, *, tiny: bool) -> Arch:
    own = {} if not tiny else {key: value for key, value in _SMALL.items() if key != "n_experts" or "moe" in name}
    return preset(name, **own)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _nothing() -> None:
    """Wait for nothing: a processor is done when a call returns."""
