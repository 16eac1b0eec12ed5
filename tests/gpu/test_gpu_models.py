"""Whole models on a GPU: training steps of every letter and preset, resume, export, generation, packing, a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hybridnas
from hybridnas.arch.presets import list_presets, preset, preset_arguments
from hybridnas.data import Batch
from hybridnas.registry import BLOCKS
from hybridnas.train.config import TrainConfig
from hybridnas.train.evaluate import autocast
from hybridnas.train.objective import Objective
from hybridnas.train.optim import make_optimizer

pytestmark = pytest.mark.gpu

SMALL = {"d_model": 64, "n_blocks": 2, "n_experts": 4, "vocab_size": 64}
TASK = {"kind": "mqar", "vocab_size": 64, "seq_len": 32, "n_pairs": 4}
RUN: dict[str, Any] = {"tokens": 2048, "batch_size": 4, "eval_at": (1024,), "valid_tokens": 256}


def steps(arch: hybridnas.Arch, device: torch.device) -> list[float]:
    """Return the losses of four steps on one batch, in the precision that training takes there."""
    model = hybridnas.HybridLM(arch, seed=1).to(device)
    objective = Objective(model)
    optimizer = make_optimizer(objective, TrainConfig(lr=3e-3))
    ids_BL = torch.randint(arch.vocab_size, (2, 97), generator=torch.Generator().manual_seed(0)).to(device)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        with autocast("auto", device)():
            found = objective(Batch(ids_BL[:, :-1], ids_BL[:, 1:]))
        loss = found.total / ids_BL[:, 1:].numel() + sum(found.losses.values())
        loss.backward()
        optimizer.step()
        losses.append(float(found.total.detach()) / ids_BL[:, 1:].numel())
    return losses


@pytest.mark.parametrize("letter", list(BLOCKS))
def test_a_model_of_every_letter_learns_a_batch(letter: str, device: torch.device) -> None:
    losses = steps(hybridnas.Arch.from_pattern(f"({letter}F)x2", d_model=64, vocab_size=64), device)
    assert losses[-1] < losses[0] < 10


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_learns_a_batch(name: str, device: torch.device) -> None:
    own = {key: value for key, value in SMALL.items() if key in preset_arguments(name)}
    losses = steps(preset(name, **own), device)
    assert losses[-1] < losses[0] < 10


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, device: torch.device) -> None:
    arch = hybridnas.Arch.from_pattern("MAGF", d_model=32, vocab_size=64)
    whole = hybridnas.fit(arch, TASK, device=str(device), **RUN)
    hybridnas.fit(arch, TASK, device=str(device), folder=tmp_path / "run", max_seconds=0, **RUN)
    again = hybridnas.fit(arch, TASK, device=str(device), folder=tmp_path / "run", **RUN)
    assert (whole.status, again.status) == ("completed", "completed")
    assert again.evals[-1].valid_loss == pytest.approx(whole.evals[-1].valid_loss, rel=1e-2)


def test_packed_text_is_trained_and_measured(tmp_path: Path, corpus: Path, device: torch.device) -> None:
    data = {"kind": "text", "path": str(corpus), "cache_dir": str(tmp_path), "pack": "documents", "valid_fraction": 0.2}
    arch = hybridnas.Arch.from_pattern("MASF", d_model=32, vocab_size=256)
    run = hybridnas.fit(arch, data, device=str(device), seq_len=128, **RUN)
    assert run.status == "completed"


def test_an_exported_model_generates_what_its_logits_say(tmp_path: Path, device: torch.device) -> None:
    model = hybridnas.build("MANF GASF", d_model=32, vocab_size=64)
    model.save_pretrained(tmp_path / "model")
    there = hybridnas.load(tmp_path / "model", device=str(device))
    ids_BL = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    drawn_BL = there.generate(ids_BL.to(device), 12, temperature=0)
    with torch.no_grad():
        logits_BLV = model.double()(drawn_BL.cpu()).logits[:, 8:-1]
    chosen_BL = logits_BLV.gather(-1, drawn_BL.cpu()[:, 9:, None])[..., 0]
    assert float((logits_BLV.amax(-1) - chosen_BL).max()) < 1e-2 * float(logits_BLV.abs().max())


def test_a_search_ends_with_a_winner(tmp_path: Path, corpus: Path, device: torch.device) -> None:
    study = hybridnas.create_study(
        budget="smoke", data={"kind": "text", "path": str(corpus), "cache_dir": str(tmp_path / "cache")}, n_trials=6,
        runs=str(tmp_path / "runs"), tracking="off", device=str(device), d_model=16, depth=2, seq_len=32, batch_size=4,
        tokens_per_active_param=0.2, valid_tokens=256, baselines=("mamba", "transformer"),
    )  # fmt: skip
    study.run()
    assert 0 < study.best.scores["val_loss"] < 10
