"""export_native(model, folder, format): a model in the released layout of a transformers class, checked by a reload.

Written are config.json, weights (in shards above 5 GB), the tokenizer, generation settings and a model card. Before the
folder takes its place, a fresh process loads it with transformers, and its logits are compared with ours.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybridnas.arch.model import HybridLM
from hybridnas.errors import ConfigError, ExportError
from hybridnas.export.card import model_card
from hybridnas.export.folder import generation_settings, refuse_foreign, whole_folder, write_text
from hybridnas.export.hf.fitting import chosen, restated
from hybridnas.export.hf.weights import as_on_hub, in_class
from hybridnas.export.layout import CARD, CONFIG, GENERATION, INDEX, OWN_KEY, WEIGHTS, home, make_config, probe_ids

if TYPE_CHECKING:
    from hybridnas.data.tokenizers import Tokenizer

SHARD_BYTES = 5_000_000_000
TOLERANCE = 1e-4  # of logits in float32, relative to the largest


@dataclass(frozen=True)
class Reloaded:
    """What transformers' class computed from the folder: largest errors relative to our largest logit.

    ``chunked`` is None where the class disagrees with itself: it does not go on from a cache with several tokens.
    """

    class_name: str
    transformers: str
    prefill: float
    chunked: float | None
    decoded: float

    def words(self) -> str:
        """Return the errors in words."""
        chunks = (
            "prefill in chunks: the class disagrees with itself"
            if self.chunked is None
            else f"in chunks {self.chunked:.1e}"
        )
        return f"largest relative error of logits: prefill {self.prefill:.1e}, {chunks}, decoding {self.decoded:.1e}"


@dataclass(frozen=True)
class NativeExport:
    """A folder that was written: where, in which format, and what reloading it gave (None: it was not checked)."""

    folder: Path
    format: str
    reloaded: Reloaded | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        found = {"model": str(self.folder), "format": self.format}
        return {**found, "reloaded": None if self.reloaded is None else asdict(self.reloaded)}


def export_native(
    model: HybridLM,
    folder: str | Path,
    *,
    format: str = "auto",
    tokenizer: Tokenizer | None = None,
    card: Mapping[str, Any] | None = None,
    check: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> NativeExport:
    """Write the model as a folder of a transformers class: ``format`` is its model type, or ``auto``.

    The folder appears whole or not at all. ``check`` loads it in a fresh process, in float32 on the CPU, and compares
    prefill, prefill in two chunks and 32 decoded tokens with ours.

    Raises ConfigError for a format that cannot hold the architecture (which option, in which layer, and the formats
    that can) and where transformers is not installed; ExportError for a foreign folder, a full disk, or logits that
    differ.
    """
    fitted = chosen(model.arch, format)
    if check and find_spec("transformers") is None:
        raise ConfigError(
            f"format={fitted.name} is checked with transformers, which is not installed: pip install 'hybridnas[hf]'",
            field="format",
            got=fitted.name,
            allowed=("hybridnas",),
        )
    target = home(folder)
    refuse_foreign(target)
    facts = make_config(model.arch, dict(card or {}), str(model.embedding.weight.dtype).removeprefix("torch."))
    separator = None if tokenizer is None else tokenizer.separator
    tokens = {"bos_token_id": separator, "eos_token_id": separator, "pad_token_id": None}
    settings = fitted.family.settings(fitted.config)
    own = restated(model, fitted)
    tensors = as_on_hub(in_class(fitted.family.pieces(settings, fitted.arch), own), fitted.family.hub)
    with whole_folder(target) as partial:
        config = {
            "architectures": [fitted.family.class_name],
            **fitted.config,
            **tokens,
            "dtype": facts["dtype"],
            OWN_KEY: {
                "version": facts["hybridnas_version"],
                "fingerprint": facts["fingerprint"],
                "pattern": facts["hybrid_layer_pattern"],
            },
        }
        write_text(partial / CONFIG, json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        _write_shards(partial, tensors, shard_bytes)
        write_text(partial / GENERATION, json.dumps({**generation_settings(), **tokens}, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(partial)
        text = model_card(
            model.arch, facts, target.name, has_tokenizer=tokenizer is not None, class_name=fitted.family.class_name
        )
        write_text(partial / CARD, text)
        reloaded = check_reloaded(model, partial, fitted.family.unused) if check else None
    return NativeExport(target, fitted.name, reloaded)


def _write_shards(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """Write one file, or several of at most ``shard_bytes`` and their index, with transformers' names."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
    stem = WEIGHTS.partition(".")[0]
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
        (folder / name).chmod((folder / CONFIG).stat().st_mode)
    if count > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def check_reloaded(model: HybridLM, folder: Path, derived: Sequence[str] = ()) -> Reloaded:
    """Return how far the folder's logits in transformers are from the model's; raises ExportError as ``compared``."""
    ((facts, theirs),) = in_fresh_process([(folder, probe_ids(model.arch.vocab_size))])
    return compared(model, facts, theirs, derived)


def in_fresh_process(cells: Sequence[tuple[Path, Tensor]]) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Return facts and logits of folders on ids (B, L), from one process that loads them with transformers."""
    with tempfile.TemporaryDirectory() as place:
        paths = []
        for i, (folder, ids_BL) in enumerate(cells):
            ids_path, out = Path(place, f"ids{i}.safetensors"), Path(place, f"logits{i}.safetensors")
            save_file({"ids": ids_BL}, ids_path)
            paths += [str(folder), str(ids_path), str(out)]
        command = [sys.executable, "-m", "hybridnas.export.hf.reload", *paths]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or len(lines) != len(cells):
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise ExportError(f"the process that loads the folder with transformers failed: {last[0][:300]}")
        facts = [json.loads(line) for line in lines]
        outs = paths[2::3]
        return [(f, {} if "error" in f else load_file(out)) for f, out in zip(facts, outs, strict=True)]


@torch.no_grad()
def compared(
    model: HybridLM, facts: Mapping[str, Any], theirs: Mapping[str, Tensor], derived: Sequence[str] = ()
) -> Reloaded:
    """Return how far logits of transformers' class are from the model's on the probe ids, in float32 on the CPU.

    ``derived``: regular expressions of tensors that the class makes from its config. Raises ExportError above
    ``TOLERANCE``, where the class could not load the folder, lacks weights, or does not know some that were written.
    """
    if "error" in facts:
        raise ExportError(
            f"transformers could not load or run the folder ({facts['error']}), so nothing was exported",
            field="format",
            got=facts["error"],
        )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [name for name in facts[key] if not any(re.match(pattern, name) for pattern in derived)]
        if names:
            raise ExportError(
                f"{facts['class']} reports {key} {', '.join(names[:3])}, so nothing was exported",
                field=key,
                got=tuple(names),
            )
    ids_BL = probe_ids(model.arch.vocab_size)
    wanted_BLV = copy.deepcopy(model).to("cpu", torch.float32).eval()(ids_BL).logits
    if not torch.isfinite(wanted_BLV).all():
        raise ExportError("the model's logits are not finite, so there is nothing to export; its training diverged")
    largest, half = wanted_BLV.abs().max(), ids_BL.shape[1] // 2
    errors = {
        name: ((theirs[name] - wanted).abs().max() / largest).item()
        for name, wanted in (("prefill", wanted_BLV), ("chunked", wanted_BLV), ("decoded", wanted_BLV[:, half:]))
    }
    own_gap = ((theirs["chunked"] - theirs["prefill"]).abs().max() / largest).item()
    itself = errors["prefill"] <= TOLERANCE < own_gap
    for name, error in errors.items():
        if not error <= TOLERANCE and not (name == "chunked" and itself):
            raise ExportError(
                f"{facts['class']} gives logits that differ from ours by {error:.2g} of the largest ({name}), more "
                f"than {TOLERANCE:g}, so nothing was exported",
                field=name,
                got=error,
                allowed=TOLERANCE,
            )
    chunked = None if itself else errors["chunked"]
    return Reloaded(facts["class"], facts["transformers"], errors["prefill"], chunked, errors["decoded"])
