"""How fast an architecture runs on this machine: measured alone, in a process of its own, and remembered.

``tokens_per_second``: reading, a forward pass over a batch of full contexts. ``ms_per_token``: writing, one token at a
time with the decoder of ``generate``, one sequence, after a full context. Both are medians, of untrained weights. They
are kept in ``STUDY/measured/`` by architecture, machine and settings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.arch.arch import Arch
from hybridnas.errors import StudyError
from hybridnas.files import locked, write_json
from hybridnas.hardware import describe_machine, pick_device
from hybridnas.search.lines import received, send
from hybridnas.search.storage.folder_store import LEASES

if TYPE_CHECKING:
    from hybridnas.arch.model import HybridLM
    from hybridnas.search.config import SearchConfig

FIGURES = ("tokens_per_second", "ms_per_token")
FOLDER = "measured"
PATIENCE = 120.0  # seconds to wait for other workers to finish what they train; then it is measured beside them
TIMEOUT = 600.0  # seconds that one architecture may take
_WARM_SECONDS, _SECONDS = 0.3, 1.5  # of each figure
_LEAST, _WRITTEN = 5, 32  # repetitions; tokens that are written in one of them


@dataclasses.dataclass(frozen=True)
class Setting:
    """What, besides the architecture and the machine, a figure depends on."""

    seq_len: int
    batch_size: int
    device: str

    @classmethod
    def of(cls, config: SearchConfig) -> Setting:
        """Return the shape in which a search trains, on the device that it trains on."""
        budget = config.budget
        return cls(config.state_length or budget.seq_len, budget.batch_size, str(pick_device(config.device)))


def measure(study: Path, arch: Arch, config: SearchConfig) -> dict[str, float]:
    """Return an architecture's figures on this machine, from memory where they were measured before.

    Raises StudyError when the process that measures fails or takes too long.
    """
    setting = Setting.of(config)
    path = study / FOLDER / f"{key(arch, setting)}.json"
    known = _read(path)
    if known is not None:
        return known
    with alone(study) as isolated:
        found = _in_a_process(arch, setting)
    path.parent.mkdir(exist_ok=True)
    about = {"pattern": str(arch.pattern), "fingerprint": arch.fingerprint(), "machine": describe_machine()}
    write_json(path, {"figures": found, "isolated": isolated, **about, "setting": dataclasses.asdict(setting)})
    return found


def key(arch: Arch, setting: Setting) -> str:
    """Return the name under which a figure is remembered: of the architecture, the machine and the settings."""
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


def _read(path: Path) -> dict[str, float] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["figures"]
        return {name: float(found[name]) for name in FIGURES}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _in_a_process(arch: Arch, setting: Setting) -> dict[str, float]:
    orders = json.dumps({"arch": arch.to_dict(), **dataclasses.asdict(setting)}) + "\n"
    command = [sys.executable, "-m", "hybridnas.search.latency"]
    try:
        done = subprocess.run(command, input=orders, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise StudyError(
            f"{arch.pattern} was not measured within {TIMEOUT:.0f} s; leave tokens_per_second, ms_per_token and "
            f"max_latency_ms out of this search, or make the budget smaller",
            field="objectives",
        ) from None
    answers = [found for found in received(io.StringIO(done.stdout)) if set(FIGURES) <= set(found)]
    if not answers:
        why = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise StudyError(f"{arch.pattern} could not be measured on this machine: {why}", field="objectives")
    return {name: float(answers[-1][name]) for name in FIGURES}


def speeds(model: HybridLM, setting: Setting) -> dict[str, float]:
    """Measure a model that lies on its device: tokens read per second, and milliseconds for each token written.

    Writing is what :meth:`HybridLM.generate` does: the prompt is read once, then the decoder takes token by token, on a
    cache that was made for all of them.
    """
    import torch

    from hybridnas.arch.decode import Decoder

    device = torch.device(setting.device)
    ids_BL = torch.zeros(setting.batch_size, setting.seq_len, dtype=torch.long, device=device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.inference_mode():
        reading = _median(lambda: _timed(lambda: model(ids_BL), wait))
        state = model(ids_BL[:1], state=model.init_state(1)).state
        ids_B = ids_BL[:1, 0]

        def write() -> float:
            decode = Decoder(model, state)
            decode(ids_B)  # enlarges the caches, once for all tokens that follow
            return _timed(lambda: [decode(ids_B) for _ in range(_WRITTEN)], wait)

        writing = _median(write)
    return {"tokens_per_second": ids_BL.numel() / reading, "ms_per_token": 1000 * writing / _WRITTEN}


def _timed(call: Callable[[], Any], wait: Callable[[], None]) -> float:
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def _median(once: Callable[[], float]) -> float:
    """Return the median of the times that a call returns [s], after a warm-up."""
    began = time.perf_counter()
    while time.perf_counter() - began < _WARM_SECONDS:
        once()
    times: list[float] = []
    while len(times) < _LEAST or sum(times) < _SECONDS:
        times.append(once())
    return statistics.median(times)


def _main() -> None:
    from hybridnas.arch.model import HybridLM

    orders = next(received(sys.stdin))
    setting = Setting(orders["seq_len"], orders["batch_size"], orders["device"])
    model = HybridLM(Arch.from_dict(orders["arch"]), seed=0).to(setting.device).eval()
    send(sys.stdout, speeds(model, setting))


if __name__ == "__main__":
    _main()
