"""What a ladder has measured: one row for each run and token count, read from the folders of the runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean

from hybridnas.files import write_csv
from hybridnas.ladders.plan import LadderRun
from hybridnas.train.records import final_status, read_evals

TRAINING_FLOPS = 3  # forward and backward over forward


@dataclass(frozen=True, kw_only=True)
class Row:
    """One annealed model: what it is, how it was trained, and its loss."""

    model: str
    pattern: str
    fingerprint: str
    size: float  # active parameters over those of size 1, as asked for
    active_params: int
    params: int
    d_model: int
    depth: int
    seed: int
    lr: float
    rate: float  # the rate over that of the law
    batch_size: int
    tokens: int  # read by the annealed model; branches of other annealings not counted
    tokens_per_param: float  # as asked for: tokens over the size's target
    flops: float  # of its training: 3 times those of the forward pass [FLOP]
    valid_loss: float  # [nats per token]
    bits_per_byte: float | None
    test_loss: float | None  # of the longest run alone
    folder: str


def ended(run: LadderRun) -> str:
    """Return the status of a run that is not trained again, such as ``completed``; empty for one that goes on."""
    return final_status(run.folder)


def rows_of(run: LadderRun, target: int) -> list[Row]:
    """Return a completed run's rows, by tokens; none for another. ``target``: active parameters of size 1."""
    if ended(run) != "completed":
        return []
    cost = run.arch.cost(run.config.seq_len)
    found = []
    for value in read_evals(run.folder):
        if not value.aux.get("annealed"):
            continue
        found.append(
            Row(
                model=run.entrant,
                pattern=str(run.arch.pattern),
                fingerprint=run.arch.fingerprint(),
                size=run.factor,
                active_params=cost.active_params,
                params=cost.params,
                d_model=run.arch.d_model,
                depth=len(run.arch.pattern),
                seed=run.config.seed,
                lr=run.config.lr,
                rate=run.rate,
                batch_size=run.config.batch_size,
                tokens=value.tokens,
                tokens_per_param=value.tokens / (target * run.factor),
                flops=TRAINING_FLOPS * cost.flops_per_token * value.tokens,
                valid_loss=value.valid_loss,
                bits_per_byte=value.bits_per_byte,
                test_loss=value.aux.get("test_loss"),
                folder=run.key,
            )
        )
    return found


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Replace the CSV whole."""
    write_csv(path, [item.name for item in fields(Row)], map(asdict, rows))


def mean_losses(rows: Iterable[Row]) -> dict[tuple[str, float, int], float]:
    """Return (model, size, tokens) -> loss, the mean over seeds."""
    found: dict[tuple[str, float, int], list[float]] = {}
    for row in rows:
        found.setdefault((row.model, row.size, row.tokens), []).append(row.valid_loss)
    return {key: fmean(values) for key, values in found.items()}
