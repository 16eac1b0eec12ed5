"""Checkpoints: one safetensors file that is whole or absent, and the one before it; no pickle.

``checkpoint.safetensors`` holds weights, task heads, AdamW moments and, as JSON in its header, the position of the run,
what run it is, and a checksum over all tensors. Data order and dropout are pure functions of seed and step, so the
position is all that a generator's state would say.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor, nn

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.errors import CheckpointError
from hybridnas.train.records import FORMAT_VERSION, disk_error, read_run

NEWEST, PREVIOUS = "checkpoint.safetensors", "checkpoint.prev.safetensors"
STABLE = "checkpoint.stable.safetensors"  # of schedule wsd: the state before the decay under way, or the last one
MODULE = "module"  # the key of a foreign module's class in a run's identity, in the place of an architecture
_TEMPORARY = ".checkpoint"
_HEADER = "hybridnas"
_MODEL, _HEADS, _OPTIMIZER = "model.", "heads.", "optimizer."


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: ``header`` (identity, position), tensors by name on the CPU, and a note for people."""

    header: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    heads: dict[str, Tensor] = field(default_factory=dict)  # of the task, empty for most
    note: str = ""  # why the previous one was taken, or empty


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> weight or persistent buffer, each shared tensor once, under its first name."""
    kept = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in kept.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


@torch.no_grad()
def restore_model(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy stored weights into the model; raises CheckpointError when names or shapes disagree."""
    own = model_tensors(model)
    for name in dict.fromkeys((*own, *tensors)):
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            raise CheckpointError(
                f"{path} does not fit this model at tensor {name!r}; it was written by another version of hybridnas: "
                f"delete it to train from the start"
            )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def save(
    folder: Path,
    header: dict[str, Any],
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    heads: dict[str, Tensor] | None = None,
    *,
    name: str = NEWEST,
) -> None:
    """Write a checkpoint beside the newest one, then let it take its place; the newest becomes the previous.

    ``name``: NEWEST, or STABLE, which has no previous one. Raises TrainingError when the disk refuses; the checkpoints
    that were there stay as they were.
    """
    tensors = {_MODEL + name: _plain(tensor) for name, tensor in model.items()}
    tensors.update({_HEADS + name: _plain(tensor) for name, tensor in (heads or {}).items()})
    tensors.update({_OPTIMIZER + name: _plain(tensor) for name, tensor in optimizer.items()})
    header = {**header, "format": FORMAT_VERSION, "crc32": _checksum(tensors)}
    temporary = folder / f"{_TEMPORARY}.{os.getpid()}.tmp"
    try:
        _write(temporary, tensors, {_HEADER: json.dumps(header)})
        if name == NEWEST and (folder / NEWEST).exists():
            (folder / NEWEST).replace(folder / PREVIOUS)
        temporary.replace(folder / name)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(error, folder / name, f"the checkpoint of step {header['progress']['step']}") from None


def load(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None when there is none at all.

    A damaged newest one costs the way back to the previous one, and a note says so; CheckpointError when both, or the
    only one, are damaged.
    """
    notes = []
    for name in (NEWEST, PREVIOUS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = _read(path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            notes.append(f"{path} is damaged ({error or type(error).__name__})")
            continue
        step = found.header["progress"]["step"]
        note = f"{notes[0]}; going on from {name} of step {step:,}" if notes else ""
        return replace(found, note=note)
    if notes:
        raise CheckpointError(f"{' and '.join(notes)}; delete {folder} to train from the start")
    return None


def load_stable(folder: Path) -> Checkpoint:
    """Return the state before a run's last decay; raises CheckpointError where it is absent or damaged."""
    path = folder / STABLE
    try:
        return _read(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}, from which training goes on after a decay, cannot be read ({error or type(error).__name__}); "
            f"delete {folder} to train from the start",
            field="folder",
            got=str(path),
        ) from None


def remove(folder: Path, *, names: tuple[str, ...] = (NEWEST, PREVIOUS, STABLE)) -> None:
    """Delete checkpoints, and what writes that were cut off left behind."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for left in folder.glob(f"{_TEMPORARY}.*.tmp"):
        left.unlink(missing_ok=True)


def load_model(folder: str | Path, *, device: str = "cpu") -> HybridLM:
    """Return the model of a run, with the weights of its newest checkpoint, in evaluation mode.

    Raises CheckpointError when the folder holds no run or its weights were not kept.
    """
    where = Path(folder)
    run = read_run(where)
    found = load(where)
    if run is None or found is None:
        raise CheckpointError(f"{where} has no {NEWEST}: the run was made elsewhere or did not keep its weights")
    if MODULE in found.header["architecture"]:
        raise CheckpointError(
            f"{where} holds the weights of a {found.header['architecture'][MODULE]}, which only its own code can "
            f"build; build it and call hybridnas.fit on this folder again, or read {NEWEST} with safetensors",
            field="folder",
            got=str(where),
        )
    model = HybridLM(Arch.from_dict(found.header["architecture"]))
    restore_model(model, found.model, where / NEWEST)
    return model.to(device).eval()


def load_heads(folder: str | Path, heads: nn.ModuleDict) -> nn.ModuleDict:
    """Fill a task's heads with the weights that a run trained beside its model, and return them.

    Raises CheckpointError when the folder holds no run, its weights were not kept, or its heads are others.
    """
    where = Path(folder)
    found = load(where)
    if found is None:
        raise CheckpointError(f"{where} has no {NEWEST}: the run was made elsewhere or did not keep its weights")
    restore_model(heads, found.heads, where / NEWEST)
    return heads.eval()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    # Serialized in memory and written here: safetensors' own writer reports a full disk as text, without an errno.
    with path.open("wb") as file:
        file.write(serialized(tensors, metadata=metadata))
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {})[_HEADER])
        # Copies: pages mapped from the file may be unaligned, which changes the last bits of a product.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if header["format"] != FORMAT_VERSION:
        raise ValueError(f"format {header['format']}, this hybridnas reads {FORMAT_VERSION}")
    if header["crc32"] != _checksum(tensors):
        raise ValueError("its checksum does not agree with its tensors")

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    return Checkpoint(header, part(_MODEL), part(_OPTIMIZER), part(_HEADS))


def _checksum(tensors: dict[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return value
