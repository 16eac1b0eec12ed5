"""export(model, folder): write a model as a folder, atomically, and check that it reloads to equal logits."""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hybridnas.arch.model import HybridLM
from hybridnas.errors import ExportError
from hybridnas.export.card import model_card
from hybridnas.export.layout import (
    CARD,
    CONFIG,
    GENERATION,
    OWN_FILES,
    OWN_KEY,
    SHARD,
    WEIGHTS,
    home,
    make_config,
    probe_ids,
    stored_tensors,
)
from hybridnas.export.load import load, read_json, read_ours
from hybridnas.layers.mode import evaluating
from hybridnas.study.locks import FileLock

if TYPE_CHECKING:
    from hybridnas.data.source import Source
    from hybridnas.data.tokenizers import Tokenizer


def export(
    model: HybridLM,
    folder: str | Path,
    *,
    source: Source | None = None,
    tokenizer: Tokenizer | None = None,
    card: Mapping[str, Any] | None = None,
    check: bool = True,
    name: str | None = None,
) -> Path:
    """Write the model as a folder that :func:`hybridnas.load` reads, and return the folder's absolute path.

    ``source`` (or ``tokenizer``) gives the tokenizer, ``card`` the facts of the training for config.json and README.md,
    ``name`` what README.md loads the model by (by default the folder's name).
    The folder appears whole or not at all; an earlier export there is replaced, files that are not ours are kept.
    Raises ExportError for a folder that is not an export, a full disk, or reloaded logits that differ.
    """
    target = home(folder)
    tokenizer = tokenizer if tokenizer is not None or source is None else source.tokenizer
    refuse_foreign(target)
    config = make_config(
        model.arch, dict(card or {}), str(model.embedding.weight.dtype).removeprefix("torch."), model.lineage
    )
    with whole_folder(target) as partial:
        write_text(partial / CONFIG, json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        _write_weights(partial / WEIGHTS, model)
        write_text(partial / GENERATION, json.dumps(generation_settings(), indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(partial)
        ids = "text" if tokenizer is None else tokenizer.kind
        card_text = model_card(model.arch, config, name or target.name, has_tokenizer=tokenizer is not None, ids=ids)
        write_text(partial / CARD, card_text)
        if check:
            check_logits(model, load(partial, device="cpu"))
    return target


@torch.no_grad()
def check_logits(trained: HybridLM, reloaded: HybridLM) -> None:
    """Raise ExportError unless both models give equal logits on random ids, to the bit, on the CPU."""
    on_cpu = all(tensor.device.type == "cpu" for tensor in trained.state_dict().values())
    original = trained if on_cpu else copy.deepcopy(trained).to("cpu")
    ids_BL = probe_ids(trained.arch.vocab_size)
    with evaluating(original):
        wanted_BLV = original(ids_BL).logits
    got_BLV = reloaded.to("cpu").eval()(ids_BL).logits
    if not torch.isfinite(wanted_BLV).all():
        raise ExportError("the model's logits are not finite, so there is nothing to export; its training diverged")
    if not torch.equal(wanted_BLV, got_BLV):
        gap = (wanted_BLV.float() - got_BLV.float()).abs().max().item()
        raise ExportError(
            f"the reloaded model's logits differ from the trained one's by up to {gap:.3g}, so nothing was exported; "
            f"a block of pattern '{trained.arch.pattern}' keeps something that is neither parameter nor buffer"
        )


def refuse_foreign(target: Path) -> None:
    """Raise ExportError for a folder with files that is no export of ours, in our own format or in another."""
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file; give a folder to export into")
    if not target.is_dir() or not any(target.iterdir()):
        return
    try:
        if OWN_KEY not in read_json(target):
            read_ours(target)
    except ExportError as error:
        raise ExportError(f"{target} is not ours: {error}; give an empty or a new folder") from None


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside ``target`` to write into; on success it takes the target's place, else it vanishes."""
    host = socket.gethostname()
    partial = target.parent / f".{target.name}.{host}.{os.getpid()}.partial"
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()  # another process or thread that exports to this folder is waited for
        _sweep(target, host)
        partial.mkdir()
        yield partial
        for path in partial.iterdir():
            _fsync(path)
        _swap(partial, target)
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        kept = "; the earlier export there is untouched" if target.is_dir() else ""
        raise ExportError(
            f"could not write {target} ({why}){kept}; free space there or choose another folder"
        ) from None
    finally:
        if lock.held:
            shutil.rmtree(partial, ignore_errors=True)
            lock.release()


def _swap(partial: Path, target: Path) -> None:
    """Put ``partial`` in the place of ``target``; what is not ours in the old folder (.git, notes) moves along."""
    old = _old(target)
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _fsync(target.parent)
    _discard(old, target)


def _sweep(target: Path, host: str) -> None:
    """Clear what an export that was killed left behind; one killed between the two renames gets its folder back.

    Called with the lock held, so that no other process of this host is at work on a partial folder.
    """
    old = _old(target)
    if old.exists() and not target.exists():
        old.rename(target)
    _discard(old, target)
    for stale in target.parent.iterdir():
        if stale.name.startswith(f".{target.name}.{host}.") and stale.name.endswith(".partial"):
            shutil.rmtree(stale, ignore_errors=True)


def _old(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _discard(old: Path, target: Path) -> None:
    if not old.exists():
        return
    for path in old.iterdir():
        if path.name not in OWN_FILES and not SHARD.fullmatch(path.name) and not (target / path.name).exists():
            path.rename(target / path.name)
    shutil.rmtree(old)


def _write_weights(path: Path, model: HybridLM) -> None:
    tensors: dict[str, Tensor] = {
        name: tensor.detach().to("cpu").contiguous() for name, tensor in stored_tensors(model).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(
        (path.parent / CONFIG).stat().st_mode
    )  # safetensors makes private files; a model is shared like any other


def write_text(path: Path, text: str) -> None:
    """Write a file of the folder that is being made."""
    path.write_text(text, encoding="utf-8")


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def generation_settings() -> dict[str, Any]:
    """The settings that ``python -m hybridnas.generate`` uses by default, in Hugging Face words."""
    return {"do_sample": True, "temperature": 0.8, "top_k": 40, "max_new_tokens": 200}
