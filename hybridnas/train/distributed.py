"""One run on several devices: ``train.devices=2`` starts one process for each under torchrun.

The run's owner, which called :func:`hybridnas.train.run`, stays outside and trains nothing. Rank 0 holds the folder,
measures, saves, and asks the owner what ``on_eval`` says; all ranks hear the answer. Each rank reads its part of every
batch and gradients are summed, so losses are those of one process with ``accumulate`` times ``devices`` smaller passes:
equal within float error, and a mixture of experts balances and drops within each part.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybridnas.errors import ConfigError, HybridNASError, TrainingError
from hybridnas.files import write_json
from hybridnas.train.records import Eval, TrainResult, read_evals, read_run

if TYPE_CHECKING:
    from hybridnas.arch.arch import Arch
    from hybridnas.data.source import Source
    from hybridnas.train.config import TrainConfig
    from hybridnas.train.progress import Progress
    from hybridnas.train.trainer import OnEval

JOB, LOG = "distributed.json", "distributed.log"
GRACE_SECONDS = 60.0  # for the ranks to save and leave
PATIENCE_MINUTES = 120  # of a rank that waits for rank 0 to measure


class Group:
    """The processes of one run, seen from one of them; this one is alone."""

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this process owns the run's folder."""
        return self.rank == 0

    def reduce(self, parameters: Sequence[Tensor], sums: dict[str, Tensor], stop: bool) -> bool:
        """Sum gradients and figures over the processes, in place; returns whether any of them was asked to stop."""
        return stop

    def share(self, value: Any) -> Any:
        """Return rank 0's value, of plain JSON types, everywhere."""
        return value


class Ranks(Group):
    """The processes that torchrun started."""

    def __init__(self, device: torch.device) -> None:
        from datetime import timedelta

        import torch.distributed as dist

        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=PATIENCE_MINUTES))
        self._dist = dist
        self._device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def reduce(self, parameters: Sequence[Tensor], sums: dict[str, Tensor], stop: bool) -> bool:
        """One message for all: gradients, which of them exist, figures, and the wish to stop."""
        names = sorted(sums)
        absent = [p.grad is None for p in parameters]
        flags = torch.tensor([*(0.0 if gone else 1.0 for gone in absent), float(stop)], device=self._device)
        figures = [sums[name].detach().reshape(1).float() for name in names]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([flags, *figures, *(grad.reshape(-1).float() for grad in grads)])
        self._dist.all_reduce(flat)
        head = [len(flags), len(names)]
        flags, values, rest = torch.split(flat, [*head, len(flat) - sum(head)])
        sums.update(zip(names, values.unbind(), strict=True))
        exists = flags[:-1].tolist()
        for parameter, part, there in zip(
            parameters, torch.split(rest, [p.numel() for p in parameters]), exists, strict=True
        ):
            # A weight that no rank has used keeps no gradient: the optimizer passes it over, as in one process.
            parameter.grad = part.view_as(parameter).to(parameter.dtype) if there else None
        return bool(flags[-1] > 0)

    def share(self, value: Any) -> Any:
        data = json.dumps(value).encode() if self.first else b""
        length = torch.tensor([len(data)], device=self._device)
        self._dist.broadcast(length, 0)
        text = torch.zeros(int(length), dtype=torch.uint8, device=self._device)
        if self.first:
            text.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self._dist.broadcast(text, 0)
        return json.loads(bytes(text.cpu().tolist()))

    def close(self) -> None:
        """Leave the group."""
        self._dist.destroy_process_group()


def check_devices(config: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError unless the batch can be divided and the devices are there."""
    rows = config.batch_size
    if rows % config.devices:
        raise ConfigError(f"train batch_size={rows} cannot be divided by devices={config.devices}; choose a multiple")
    if device.type == "cuda" and config.devices > torch.cuda.device_count():
        raise ConfigError(f"train devices={config.devices}: this machine has {torch.cuda.device_count()} CUDA devices")


def launch(
    arch: Arch,
    source: Source,
    config: TrainConfig,
    *,
    folder: Path,
    device: str,
    on_eval: OnEval | None,
    shown: Progress,
    max_seconds: float | None,
    impl: str,
    keep_checkpoint: bool,
) -> TrainResult:
    """Run the job under torchrun and answer rank 0's questions; returns what it left, without the model.

    Raises KeyboardInterrupt after Ctrl-C, when the ranks have saved, and TrainingError where rank 0 did.
    """
    if source.config is None:
        raise TrainingError("devices > 1 needs data that other processes can open, by hybridnas.data.open_source")
    job = {
        "arch": arch.to_dict(),
        "data": source.config.to_dict(),
        "train": config.to_dict(),
        "device": device,
        "impl": impl,
        "max_seconds": max_seconds,
        "keep_checkpoint": keep_checkpoint,
    }
    write_json(folder / JOB, job)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.devices}"),
        *("-m", "hybridnas.train.distributed", str(folder.absolute())),
    ]
    threads = str(max(1, torch.get_num_threads() // config.devices))
    with (folder / LOG).open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            start_new_session=True,
        )
    try:
        ended = _answer(process, on_eval, shown, config.tokens)
    finally:
        _end(process)
    return _result(folder, ended, process.returncode)


def _answer(
    process: subprocess.Popen[str], on_eval: OnEval | None, shown: Progress, total: int
) -> dict[str, Any] | None:
    """Talk with rank 0 until it ends; returns its last word, or None when it died without one."""
    assert process.stdout is not None and process.stdin is not None
    ended = None
    for line in process.stdout:
        try:
            message = json.loads(line)
        except ValueError:
            continue  # a library's own print
        if "eval" in message:
            value = Eval.from_dict(message["eval"])
            if message["new"]:
                shown.measured(value, total)
            said = on_eval(value) if on_eval is not None else None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(said) + "\n")
                process.stdin.flush()
        elif "note" in message:
            shown.note(message["note"])
        elif "ended" in message:
            ended = message
    return ended


def _end(process: subprocess.Popen[str]) -> None:
    """Close the pipe, which is rank 0's word to save and leave, and see that all have left."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def _result(folder: Path, ended: dict[str, Any] | None, code: int) -> TrainResult:
    from hybridnas import errors

    if ended is not None and "error" in ended:
        name, text = ended["error"]
        raise getattr(errors, name, TrainingError)(text)
    evals = read_evals(folder)
    if ended is None:
        said = (folder / LOG).read_text(errors="replace")
        lines = [line for line in said.splitlines() if "Error" in line] or [f"exit code {code}"]
        reason = f"one of its processes ended: {lines[0][:200]} (see {folder / LOG})"
        return TrainResult("failed", reason, evals, None, folder)
    if ended["ended"] == "interrupted":
        raise KeyboardInterrupt
    run = read_run(folder) or {}
    return TrainResult(run["status"], run["reason"], evals, None, folder, run.get("tokens_per_second", 0.0))


def main(folder: str) -> int:
    """Be one rank: torchrun's environment says which."""
    from hybridnas.arch.arch import Arch
    from hybridnas.data import open_source, source_config
    from hybridnas.train.config import TrainConfig
    from hybridnas.train.loop import run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    job = json.loads((Path(folder) / JOB).read_text())
    device = torch.device(job["device"] if job["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    group = Ranks(device)
    answers, sys.stdout = sys.stdout, sys.stderr
    known = len(read_evals(Path(folder)))

    def say(**message: Any) -> None:
        if group.first:
            with contextlib.suppress(OSError):
                print(json.dumps(message), file=answers, flush=True)

    words = _Owner() if group.first else None
    seen = 0

    def ask(value: Eval) -> Any:
        nonlocal seen
        seen += 1
        say(eval=asdict(value), new=seen > known)
        return words.hear() if words is not None else None

    try:
        result = run(
            Arch.from_dict(job["arch"]),
            open_source(source_config(job["data"])),
            TrainConfig.from_dict(job["train"]),
            folder=folder,
            device=str(device),
            on_eval=ask,
            progress=(lambda text: None),
            max_seconds=job["max_seconds"],
            keep_checkpoint=job["keep_checkpoint"],
            impl=job["impl"],
            group=group,
        )
    except KeyboardInterrupt:
        say(ended="interrupted")
        return 0
    except HybridNASError as error:
        say(ended="error", error=[type(error).__name__, str(error)])
        return 3
    say(ended=result.status)
    if result.status == "failed" and not (read_run(Path(folder)) or {}).get("final"):
        os._exit(3)  # out of memory here alone: torchrun ends the others, which wait for us
    group.close()
    return 0


class _Owner:
    """Rank 0's ear: answers of the owner by line; the end of the pipe is a Ctrl-C."""

    def __init__(self) -> None:
        import queue

        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in sys.stdin:
                self._lines.put(line)
        self._lines.put("null")  # whoever waits for an answer goes on to where the interrupt is seen
        os.kill(os.getpid(), signal.SIGINT)

    def hear(self) -> Any:
        return json.loads(self._lines.get())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
