"""Twenty patterns drawn from spaces, one per class of transformers, by all formats: which hold them, and how exactly.

Every cell that fits is written, loaded by transformers in a process of its own, and its logits are compared: a prompt,
the prompt in two pieces, and 32 tokens one after another. Of the others the first reason is kept.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.result import Result, Table
from hybridnas.errors import ExportError, HybridNASError
from hybridnas.export.hf.family import FAMILIES
from hybridnas.export.hf.fitting import exportable, formats
from hybridnas.export.hf.writing import compared, export_native, in_fresh_process
from hybridnas.export.layout import probe_ids
from hybridnas.search_spaces.space import Scale, Space

_SCALE = Scale(d_model=64, depth=4, vocab_size=64, multiple=8, seq_len=64)
_DRAWS = 200
# What may be drawn: pieces of the motif, and what a class needs that has no default of ours.
_LATENT = {"A.kv_rank": [16], "A.n_heads": [2]}
_PIECES: dict[str, tuple[Sequence[str], dict[str, Any]]] = {
    "llama": ("AF", {}),
    "mistral": ("SF", {"S.window": [16, 32]}),
    "mixtral": ("AE", {}),
    "mamba": ("M", {}),
    "mamba2": ("N", {}),
    "falcon_mamba": ("M", {}),
    "nemotron_h": ("NAFE", {}),
    "granitemoehybrid": ("NAE", {}),
    "jamba": ("MAFE", {}),
    "bamba": ("NAF", {}),
    "deepseek_v3": ("AFE", _LATENT),
    "falcon_h1": (("[N,A]", "F"), {}),
    "kimi_linear": ("KAFE", _LATENT),
    "lfm2": ("CAF", {}),
    "lfm2_moe": ("CAFE", {}),
    "minimax": ("LAE", {}),
    "olmo_hybrid": ("GAF", {}),
    "qwen3_5_moe_text": ("GAE", {}),
    "qwen3_5_text": ("GAF", {}),
    "qwen3_next": ("GAFE", {}),
}


@dataclass
class _Dice:
    """Uniform draws from a seed."""

    random: random.Random
    seen: dict[str, Any] = field(default_factory=dict)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.seen.setdefault(name, self.random.choice(list(choices)))

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float:
        assert step is not None
        steps = int((high - low) / step + 1e-9)
        return float(self.seen.setdefault(name, low + step * self.random.randint(0, steps)))


def found(name: str) -> Arch:
    """Return the drawn architecture of a format's space with the most kinds of blocks; raises ExportError for none."""
    pieces, fields = _PIECES[name]
    routed = {"E.n_experts": [4], "E.router": ["top_k"], "E.top_k": [1, 2]} if "E" in pieces else {}
    settings = {"name": name, "letters": list(pieces), "motif_length": [4], "exportable": name, "match": False}
    space = Space.from_mapping({**settings, **routed, **fields})
    wanted = {letter for piece in pieces for letter in piece if letter.isalpha()}
    best: Arch | None = None
    for seed in range(_DRAWS):
        try:
            arch = space.propose(_Dice(random.Random(seed)), _SCALE).arch
        except HybridNASError:
            continue
        if best is None or _letters(arch) > _letters(best):
            best = arch
        if _letters(best) >= min(len(wanted), _SCALE.depth - 1):
            break
    if best is None:
        raise ExportError(f"no draw of {_DRAWS} from the space of {name} fits it", field="exportable", got=name)
    return best


def _letters(arch: Arch) -> int:
    return len({slot.letter for slot in arch.pattern.slots})


def built(arch: Arch) -> HybridLM:
    """Return a model with weights that differ from their first values, so that norms and biases count."""
    model = HybridLM(arch)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def run(config: BenchConfig) -> Result:
    """Fill the matrix."""
    result = Result("interop")
    names = formats()[:2] if config.tiny else formats()
    models = {name: built(found(name)) for name in names}
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        folders: dict[tuple[str, str], Path] = {}
        for row, model in models.items():
            for name, reason in exportable(model.arch).items():
                cells[row, name] = {"why_not": reason} if reason else {}
                if not reason:
                    written = export_native(model, Path(place, f"{row}-{name}"), format=name, check=False)
                    folders[row, name] = written.folder
        loaded = in_fresh_process([(folder, probe_ids(_SCALE.vocab_size)) for folder in folders.values()])
    for (row, name), (facts, theirs) in zip(folders, loaded, strict=True):
        try:
            got = compared(models[row], facts, theirs, FAMILIES.get(name).unused)
            cells[row, name] = {"prefill": got.prefill, "chunked": got.chunked, "decoded": got.decoded}
        except ExportError as error:
            cells[row, name] = {"failed": str(error)}
    rows, patterns = [], {row: str(model.arch.pattern) for row, model in models.items()}
    for row in models:
        held = [name for name in formats() if "prefill" in cells[row, name]]
        failed = [name for name in formats() if "failed" in cells[row, name]]
        errors = [value for name in held for value in cells[row, name].values() if value is not None]
        worst = f"{max(errors):.1e}" if errors else ""
        rows.append([row, patterns[row], ", ".join(held), worst, ", ".join(failed)])
    columns = ("space of", "pattern", "exported and reloaded as", "largest relative error", "failed")
    result.tables.append(Table("Patterns by formats of transformers, logits in float32", columns, rows))
    matrix = {row: {name: cells[row, name] for name in formats()} for row in models}
    result.facts["interop"] = {"patterns": patterns, "formats": list(formats()), "cells": matrix}
    return result
