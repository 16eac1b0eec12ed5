"""One run on several devices: ``DistributedDataParallel`` over nccl on GPUs and gloo on processors.

Two ways lead in. Under torchrun (``torchrun --nproc-per-node=2 -m hybridnas.train ... train.devices=2``, on one host or
several) every process joins the group that torchrun's environment describes. Anywhere else the calling process becomes
rank 0 and starts the other ranks itself, so that callbacks remain Python objects of the caller's process.

Rank 0 owns the folder and the callbacks, measures, saves and decides; its decisions are broadcast. Each rank computes
its part of every batch, with ``no_sync`` while it accumulates. Losses are scaled so that the averaged gradients are
those of one process with ``accumulate`` times ``devices`` smaller passes: equal within float error, and a mixture of
experts balances and drops within each part. Buffers are rank 0's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from hybridnas.errors import ConfigError

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

    from hybridnas.train.config import TrainConfig
    from hybridnas.train.objective import Objective

LOG = "ranks.log"  # standard error of the ranks that were started here
GRACE_SECONDS = 60.0  # for the other ranks to leave after the last step
TIMEOUT = timedelta(hours=2)  # of a rank that waits, e.g. for rank 0 to measure


class RankLostError(RuntimeError):
    """Another process of the run ended before its time."""


class Group:
    """The processes of one run, seen from one of them; this one is alone."""

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this process owns the run's folder and its callbacks."""
        return self.rank == 0

    def parallel(self, objective: Objective) -> nn.Module:
        """Return the module whose backward pass averages gradients over the ranks."""
        return objective

    def accumulating(self) -> AbstractContextManager[object]:
        """Return a context in which backward passes only add to this rank's own gradients."""
        return contextlib.nullcontext()

    def leave(self) -> None:
        """Wait for all ranks at the end of a run that none of them has left early."""

    def sum_figures(self, sums: dict[str, Tensor]) -> None:
        """Sum scalars over the ranks, in place."""

    def sum_counts(self, counts: dict[str, Tensor]) -> None:
        """Sum tensors of integers over the ranks, in place."""

    def share(self, value: Any) -> Any:
        """Return rank 0's value everywhere."""
        return value


class Ranks(Group):
    """The processes of torch's default process group."""

    def __init__(self, device: torch.device) -> None:
        import torch.distributed as dist

        self._dist = dist
        self._device = device
        self._parallel: DistributedDataParallel | None = None
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def parallel(self, objective: Objective) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        from hybridnas.arch.model import HybridLM

        # Every weight of a HybridLM takes part in every pass, idle experts included; heads and other modules may not.
        some_unused = not isinstance(objective.model, HybridLM) or len(objective.heads) > 0
        ids = [self._device.index] if self._device.type == "cuda" else None
        self._parallel = DistributedDataParallel(objective, device_ids=ids, find_unused_parameters=some_unused)
        return self._parallel

    def accumulating(self) -> AbstractContextManager[object]:
        assert self._parallel is not None
        return self._parallel.no_sync()

    def leave(self) -> None:
        self._dist.barrier()

    def sum_figures(self, sums: dict[str, Tensor]) -> None:
        names = sorted(sums)
        figures = torch.stack([sums[name].detach().double() for name in names])
        self._dist.all_reduce(figures)
        sums.update(zip(names, figures.unbind(), strict=True))

    def sum_counts(self, counts: dict[str, Tensor]) -> None:
        if counts:
            names = sorted(counts)
            flat = torch.cat([counts[name].detach().flatten().long() for name in names])
            self._dist.all_reduce(flat)
            parts = torch.split(flat, [counts[name].numel() for name in names])
            counts.update({name: part.view(counts[name].shape) for name, part in zip(names, parts, strict=True)})

    def share(self, value: Any) -> Any:
        held = [value]
        self._dist.broadcast_object_list(held, src=0, device=self._device)
        return held[0]


def check_devices(config: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError unless the batch can be divided and the devices are there."""
    rows = config.batch_size
    if rows % config.devices:
        raise ConfigError(
            f"train batch_size={rows} cannot be divided by devices={config.devices}; choose a multiple",
            field="batch_size",
            got=rows,
            allowed=f"a multiple of {config.devices}",
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", config.devices))
    if device.type == "cuda" and local > torch.cuda.device_count():
        raise ConfigError(
            f"train devices={config.devices}: this machine has {torch.cuda.device_count()} CUDA devices",
            field="devices",
            got=config.devices,
            allowed=f"<= {torch.cuda.device_count()}",
        )


def launched() -> bool:
    """Whether this process belongs to a group already: started by torchrun, or torch.distributed is initialised."""
    return torch.distributed.is_initialized() or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def local_rank(group: Group) -> int:
    """Return a rank's number on its host."""
    return int(os.environ.get("LOCAL_RANK", group.rank))


def leads() -> bool:
    """Whether this process prints and writes for its run: rank 0 of torchrun's, or one that torchrun did not start."""
    return int(os.environ.get("RANK", "0")) == 0


def end_follower() -> NoReturn:
    """End this rank of torchrun's at once: rank 0 has work left.

    torch 2.13 keeps gloo's threads after ``destroy_process_group``, and an interpreter that exits with them aborts now
    and then; torchrun would then end rank 0, too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def own_device(device: torch.device, rank: int) -> torch.device:
    """Return the device of a rank on its host, made the current one."""
    if device.type != "cuda":
        return device
    own = torch.device("cuda", rank)
    torch.cuda.set_device(own)
    return own


@contextlib.contextmanager
def join(config: TrainConfig, device: torch.device) -> Iterator[Group]:
    """Join the group that torchrun, or the caller's own ``init_process_group``, describes.

    Raises ConfigError where it has another size than ``config.devices``.
    """
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        if dist.get_world_size() != config.devices:
            raise ConfigError(
                f"train devices={config.devices} but {dist.get_world_size()} processes were started; set "
                f"train.devices={dist.get_world_size()}",
                field="devices",
                got=config.devices,
                allowed=dist.get_world_size(),
            )
        yield Ranks(device)
    finally:
        if ours:
            dist.destroy_process_group()


@contextlib.contextmanager
def start(config: TrainConfig, device: torch.device, job: dict[str, Any], folder: Path | None) -> Iterator[Group]:
    """Become rank 0 and start the other ranks on this host; they are gone when the context is left.

    ``job``: what :func:`hybridnas.train.rank.main` reads. Raises RankLostError when a rank has ended before its time.
    """
    import torch.distributed as dist

    meeting = Path(tempfile.mkdtemp(prefix="hybridnas-ranks-"))  # the ranks find each other by files in it
    threads = torch.get_num_threads()
    share = max(1, threads // config.devices)
    log = (folder / LOG).open("w") if folder is not None else None
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "hybridnas.train.rank"],
            stdin=subprocess.PIPE,
            stdout=log or subprocess.DEVNULL,
            stderr=log or subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(share)},
            start_new_session=True,  # Ctrl-C is rank 0's to answer
        )
        for _ in range(1, config.devices)
    ]
    sound = False
    try:
        for rank, worker in enumerate(workers, start=1):
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                json.dump({**job, "rank": rank, "meeting": str(meeting), "device": device.type}, worker.stdin)
                worker.stdin.close()
        torch.set_num_threads(share)
        _await(meeting, workers)
        meet(meeting, device, 0, config.devices)
        try:
            ranks = Ranks(device)
            yield ranks
            ranks.leave()
            sound = True
        finally:
            dist.destroy_process_group()
    except RuntimeError as error:
        lost = _lost(workers)
        if not lost:
            raise
        words = f" (see {folder / LOG})" if folder is not None else ""
        raise RankLostError(f"one of its processes ended with exit code {lost}{words}") from error
    finally:
        torch.set_num_threads(threads)
        _end(workers, GRACE_SECONDS if sound else 0.0)
        shutil.rmtree(meeting, ignore_errors=True)
        if log is not None:
            log.close()


def meet(meeting: Path, device: torch.device, rank: int, size: int) -> None:
    """Make the process group of the ranks that know this folder."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    method = (meeting / "store").as_uri()
    torch.distributed.init_process_group(backend, init_method=method, rank=rank, world_size=size, timeout=TIMEOUT)


def _await(meeting: Path, workers: list[subprocess.Popen[str]]) -> None:
    """Return when all ranks are up; raises RankLostError when one has failed before."""
    for rank, worker in enumerate(workers, start=1):
        while not (meeting / str(rank)).exists():
            if worker.poll() is not None:
                raise RankLostError
            time.sleep(0.02)


def _lost(workers: list[subprocess.Popen[str]]) -> int:
    """Return the exit code of a rank that has failed, or 0; a broken connection comes a moment before the exit."""
    patience = time.monotonic() + 3.0
    while time.monotonic() < patience:
        codes = [worker.poll() for worker in workers]
        if any(codes):
            return next(code for code in codes if code)
        time.sleep(0.05)
    return 0


def _end(workers: list[subprocess.Popen[str]], seconds: float) -> None:
    for worker in workers:
        try:
            worker.wait(seconds)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
