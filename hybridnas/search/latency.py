"""How fast an architecture runs on this machine: measured alone, once, and remembered.

``train_tokens_per_second``: optimizer steps as ``fit`` takes them. ``prefill_tokens_per_second`` (formerly
``tokens_per_second``): a forward pass over prompts. ``decode_tokens_per_second`` and ``ms_per_token``: one token at a
time with the decoder of ``generate``, after a full context. Each is a median, of untrained weights, with its 95 %
interval, and is repeated until that is narrow or its time is up. Figures are kept in ``STUDY/measured/`` by
architecture, machine and setting.

A process of its own measures (:class:`Meter`): it is started with the search, so that no draw waits for its imports.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hybridnas.arch.arch import Arch
from hybridnas.errors import StudyError
from hybridnas.files import locked, write_json
from hybridnas.hardware import describe_machine, pick_device
from hybridnas.search.lines import received, send
from hybridnas.search.storage.folder_store import LEASES
from hybridnas.study.objectives import LIMITS, MEASURED, OBJECTIVES

if TYPE_CHECKING:
    from hybridnas.arch.model import HybridLM
    from hybridnas.search.config import SearchConfig

FOLDER = "measured"
PATIENCE = 120.0  # seconds to wait for other workers to finish what they train; then it is measured beside them
TIMEOUT = 600.0  # seconds that one architecture may take
_SOME, _LEAST = 3, 6  # repetitions where they are long, and where they are short
_WRITTEN = 16  # tokens that are generated in one of them
_NARROW = 0.03  # half an interval over the median, at which it is known well enough [1]


class Figure(NamedTuple):
    """A measured figure: the median, and the 95 % interval of it."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured, and what besides the architecture and the machine it depends on."""

    figures: tuple[str, ...]
    length: int  # of prompts, and of the context before a token is generated [tokens]
    prefill_batch: int  # prompts that are read at once [count]
    decode_batch: int  # sequences that are generated together, for decode_tokens_per_second [count]
    train_batch: int  # sequences of a training step [count]
    train_length: int  # [tokens]
    device: str
    seconds: float = 0.5  # of each figure: then its interval is what it is [s]

    @classmethod
    def of(cls, config: SearchConfig) -> Setting:
        """Return what a search wants to know, in the shapes that it is asked for, on the device that it trains on."""
        budget = config.budget
        asked = (*config.objectives, *(LIMITS[name] for name in config.limits))
        return cls(
            figures=tuple(dict.fromkeys(name for name in asked if OBJECTIVES[name].kind == MEASURED)),
            length=config.state_length or budget.seq_len,
            prefill_batch=config.speed_batch or budget.batch_size,
            decode_batch=config.speed_batch or 1,
            train_batch=budget.batch_size,
            train_length=budget.seq_len,
            device=str(pick_device(config.device)),
        )

    def words(self, name: str) -> str:
        """Return the shape at which a figure is measured, in words."""
        if name == "train_tokens_per_second":
            return f"steps of {self.train_batch} sequences of {self.train_length:,} tokens"
        if name in ("prefill_tokens_per_second", "tokens_per_second"):
            return f"{self.prefill_batch} prompts of {self.length:,} tokens at once"
        batch = 1 if name == "ms_per_token" else self.decode_batch
        return f"{batch} {'sequence' if batch == 1 else 'sequences together'} after {self.length:,} tokens"


class Meter:
    """The process that measures, kept from one architecture to the next."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()

    def start(self) -> None:
        """Start the process, where there is none; its imports take seconds, so this is done early."""
        if self._child is not None and self._child.poll() is None:
            return
        command = [sys.executable, "-m", "hybridnas.search.latency"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # In a session of its own: Ctrl-C is for the search, whose end closes the pipe that this process reads.
        self._child = subprocess.Popen(command, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]
        self._answers = queue.Queue()
        threading.Thread(target=self._listen, args=(self._child, self._answers), daemon=True).start()

    def ask(self, arch: Arch, setting: Setting) -> dict[str, Figure]:
        """Measure an architecture; raises StudyError when that fails or takes too long."""
        self.start()
        assert self._child is not None and self._child.stdin is not None
        send(self._child.stdin, {"arch": arch.to_dict(), "setting": dataclasses.asdict(setting)})
        try:
            found = self._answers.get(timeout=TIMEOUT)
        except queue.Empty:
            self.close()
            raise StudyError(
                f"{arch.pattern} was not measured within {TIMEOUT:.0f} s; leave {' and '.join(setting.figures)} out of "
                f"this search's objectives and limits, or make the budget smaller",
                field="objectives",
            ) from None
        if "figures" not in found:
            self.close()
            raise StudyError(
                f"{arch.pattern} could not be measured on this machine: {found.get('error')}", field="objectives"
            )
        return {name: Figure(*values) for name, values in found["figures"].items()}

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for stream in (self._child.stdin, self._child.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
            self._child = None

    @staticmethod
    def _listen(child: subprocess.Popen[str], answers: queue.Queue[dict[str, Any]]) -> None:
        assert child.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # closed while it is read
            for message in received(child.stdout):
                answers.put(message)
        answers.put({"error": f"the measuring process ended with code {child.wait()}"})


def measure(study: Path, arch: Arch, setting: Setting, meter: Meter) -> dict[str, Figure]:
    """Return an architecture's figures on this machine, from memory where they were measured before.

    Raises StudyError when the process that measures fails or takes too long.
    """
    path = study / FOLDER / f"{key(arch, setting)}.json"
    known = _read(path, setting)
    if known is not None:
        return known
    with alone(study) as isolated:
        found = meter.ask(arch, setting)
    path.parent.mkdir(exist_ok=True)
    about = {"pattern": str(arch.pattern), "fingerprint": arch.fingerprint(), "machine": describe_machine()}
    write_json(path, {"figures": found, "isolated": isolated, **about, "setting": dataclasses.asdict(setting)})
    return found


def key(arch: Arch, setting: Setting) -> str:
    """Return the name under which figures are remembered: of the architecture, the machine and the setting."""
    text = json.dumps([arch.fingerprint(), describe_machine(), dataclasses.asdict(setting)])
    return f"{arch.short}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@contextlib.contextmanager
def training(study: Path) -> Iterator[None]:
    """Hold off measurements on this host while a trial trains; a measurement that waits is let in first."""
    with locked(study / LEASES / "measure-gate"):
        pass
    with locked(study / LEASES / "measure", shared=True):
        yield


@contextlib.contextmanager
def alone(study: Path) -> Iterator[bool]:
    """Keep other workers of this host from starting a trial, and wait for those that train; False when it took long."""
    with locked(study / LEASES / "measure-gate"):
        end = time.monotonic() + PATIENCE
        while True:
            with locked(study / LEASES / "measure", wait=False) as taken:
                if taken or time.monotonic() > end:
                    yield taken
                    return
            time.sleep(0.1)


def _read(path: Path, setting: Setting) -> dict[str, Figure] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["figures"]
        return {name: Figure(*map(float, found[name])) for name in setting.figures}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def speeds(model: HybridLM, setting: Setting) -> dict[str, Figure]:
    """Measure a model that lies on its device: the figures that a setting asks for.

    Generating is what :meth:`HybridLM.generate` does: the prompt is read once, then the decoder takes token by token,
    on a cache that was made for all of them.
    """
    import torch

    device = torch.device(setting.device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found: dict[str, Figure] = {}
    for name in setting.figures:
        if name == "train_tokens_per_second":
            tokens = setting.train_batch * setting.train_length
            found[name] = _rate(tokens, _median(_training(model, setting, wait), setting.seconds))
        elif name in ("prefill_tokens_per_second", "tokens_per_second"):
            ids_BL = _ids(setting.prefill_batch, setting.length, device)

            def read(ids_BL: torch.Tensor = ids_BL) -> float:
                with torch.inference_mode():
                    return _timed(lambda: model(ids_BL), wait)

            found[name] = _rate(ids_BL.numel(), _median(read, setting.seconds))
        else:
            batch = 1 if name == "ms_per_token" else setting.decode_batch
            seconds = _median(_writing(model, batch, setting.length, wait), setting.seconds)
            if name == "ms_per_token":
                found[name] = Figure(*(1000 * value / _WRITTEN for value in seconds))
            else:
                found[name] = _rate(batch * _WRITTEN, seconds)
    return found


def _writing(model: HybridLM, batch: int, length: int, wait: Callable[[], None]) -> Callable[[], float]:
    """Return what generates some tokens after a context, and returns the time [s]."""
    import torch

    from hybridnas.arch.decode import Decoder
    from hybridnas.layers.block import map_state

    ids_BL = _ids(batch, length, next(model.parameters()).device)
    with torch.inference_mode():
        state = model(ids_BL, state=model.init_state(batch)).state

    def write() -> float:
        with torch.inference_mode():
            own = tuple(map_state(torch.clone, one) for one in state)  # the decoder overwrites it
            decode = Decoder(model, own)
            decode(ids_BL[:, 0])  # enlarges the caches, once for all tokens that follow
            return _timed(lambda: [decode(ids_BL[:, 0]) for _ in range(_WRITTEN)], wait)

    return write


def _training(model: HybridLM, setting: Setting, wait: Callable[[], None]) -> Callable[[], float]:
    """Return what takes one step of training as ``fit`` does, and returns the time [s]."""
    import torch

    from hybridnas.data.source import Batch
    from hybridnas.train.config import TrainConfig
    from hybridnas.train.objective import Objective
    from hybridnas.train.optim import make_optimizer

    objective = Objective(model.train(), vocab_size=model.arch.vocab_size)
    optimizer = make_optimizer(objective, TrainConfig())
    ids_BL = _ids(setting.train_batch, setting.train_length + 1, next(model.parameters()).device)
    batch = Batch(ids_BL[:, :-1], ids_BL[:, 1:])

    def step() -> None:
        optimizer.zero_grad()
        loss = objective(batch)
        extra = sum(loss.losses.values(), start=loss.total.new_zeros(()))
        (loss.total / batch.inputs_BL.numel() + extra).backward()
        torch.nn.utils.clip_grad_norm_(list(objective.parameters()), 1.0, foreach=True)
        optimizer.step()

    return lambda: _timed(step, wait)


def _ids(batch: int, length: int, device: Any) -> Any:
    import torch

    return torch.zeros(batch, length, dtype=torch.long, device=device)


def _rate(tokens: int, seconds: Figure) -> Figure:
    return Figure(tokens / seconds.value, tokens / seconds.high, tokens / seconds.low)


def _timed(call: Callable[[], Any], wait: Callable[[], None]) -> float:
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def _median(once: Callable[[], float], seconds: float) -> Figure:
    """Return the median of the times that a call returns [s], after one that is not counted, and its interval.

    Where single calls are long, three have to do: the interval is their range.
    """
    once()
    times: list[float] = []
    began = time.perf_counter()
    while True:
        times.append(once())
        late = time.perf_counter() - began > seconds
        if len(times) < (_SOME if late else _LEAST):
            continue
        found = interval(times)
        if late or found.high - found.low < 2 * _NARROW * found.value:
            return found


def interval(times: list[float]) -> Figure:
    """Return the median of measurements and its 95 % interval: the order statistics that hold it so often."""
    ordered, n = sorted(times), len(times)
    below, out = 0.0, 0
    while out < n // 2:
        below += math.comb(n, out) / 2**n
        if below > 0.025:
            break
        out += 1
    out = max(out, 1)  # of fewer than six measurements all are within
    return Figure(statistics.median(ordered), ordered[out - 1], ordered[n - out])


def _answer(orders: Mapping[str, Any]) -> dict[str, Any]:
    from hybridnas.arch.model import HybridLM

    setting = Setting(**{**orders["setting"], "figures": tuple(orders["setting"]["figures"])})
    model = HybridLM(Arch.from_dict(orders["arch"]), seed=0).to(setting.device).eval()
    return {"figures": speeds(model, setting)}


def _main() -> None:
    import hybridnas.arch.model
    import hybridnas.train.optim  # noqa: F401

    for orders in received(sys.stdin):
        try:
            answer = _answer(orders)
        except Exception as error:  # whatever it is, the search says it and ends
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        if not send(sys.stdout, answer):
            return


if __name__ == "__main__":
    _main()
