"""A linear probe: what a frozen model's vectors tell of a text's label, by logistic regression on them.

The vectors that the output matrix reads are averaged over a text, or the last one is taken; the regression is fitted on
the labels' training part, its penalty is chosen on the validation part, and what is stated is of the test part (as in
Alain and Bengio, arXiv 1610.01644). The same is done with the untrained architecture, whose vectors know nothing of the
data that the model learnt from.

Shapes: N texts, L length, D d_model, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hybridnas.analysis.intervals import share_interval
from hybridnas.arch.model import HybridLM
from hybridnas.data.labels import Labels
from hybridnas.data.tokenizers import Tokenizer
from hybridnas.errors import ConfigError, DataError
from hybridnas.layers.mode import evaluating

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the squared weights, in units of the mean loss
POOLS = ("mean", "last")
_STEPS = 200  # of L-BFGS


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What one probe finds on the test part."""

    accuracy: float  # [0 to 1]
    interval: tuple[float, float]  # 95 %, Wilson's
    balanced: float  # mean over the labels of the share of their texts that is found [0 to 1]
    penalty: float  # chosen on the validation part
    train_accuracy: float


@dataclass(frozen=True, kw_only=True)
class Probed:
    """A probe of a model, beside what knows less."""

    model: Probe
    untrained: Probe  # of the same architecture with random weights
    commonest: float  # accuracy of always giving the commonest label of the training part
    texts: dict[str, int]  # of each part
    labels: int


@torch.no_grad()
def features(model: HybridLM, texts: Sequence[Sequence[int]], *, pool: str, batch_size: int = 32) -> Tensor:
    """Return a vector of each text's ids, float32 (N, D): texts of one length are read together, without a filler.

    Raises ConfigError for another ``pool`` than mean or last, DataError for a text without ids.
    """
    if pool not in POOLS:
        raise ConfigError(f"probe={pool!r} must be one of {', '.join(POOLS)}", field="probe", got=pool, allowed=POOLS)
    device = model.head.weight.device
    found_ND = torch.zeros(len(texts), model.arch.d_model)
    by_length: dict[int, list[int]] = {}
    for number, ids in enumerate(texts):
        if not len(ids):
            raise DataError(f"text {number + 1:,} has no ids in the model's tokens", field="data.path", got=number)
        by_length.setdefault(len(ids), []).append(number)
    with evaluating(model):
        for numbers in by_length.values():
            for first in range(0, len(numbers), batch_size):
                own = numbers[first : first + batch_size]
                ids_BL = torch.tensor([list(texts[number]) for number in own], device=device)
                x_BLD = model.hidden(ids_BL).x_BLD.float()
                found_ND[own] = (x_BLD.mean(dim=1) if pool == "mean" else x_BLD[:, -1]).cpu()
    return found_ND


def linear_probe(
    model: HybridLM, tokenizer: Tokenizer, source: Labels, *, pool: str = "mean", batch_size: int = 32, seed: int = 0
) -> Probed:
    """Probe a model for the labels of a ``data=labels`` source, whose texts it reads in its own tokens.

    ``seed``: of the untrained weights. Raises ConfigError for a source of numbers rather than labels.
    """
    if not source.labels:
        raise ConfigError(
            "probe= finds labels, and data.target=number gives figures; leave target out",
            field="data.target",
            got="number",
        )
    parts = {part: source.examples(part) for part in ("train", "valid", "test")}
    ids = {part: [own.tolist() for own in tokenizer.encode_batch(texts)] for part, (texts, _) in parts.items()}
    targets = {part: torch.from_numpy(labels) for part, (_, labels) in parts.items()}
    probes = []
    for one in (model, HybridLM(model.arch, seed=seed).to(model.head.weight.device)):
        given = {part: features(one, texts, pool=pool, batch_size=batch_size) for part, texts in ids.items()}
        probes.append(fit_probe(given, targets, len(source.labels)))
    commonest = int(np.bincount(parts["train"][1]).argmax())
    return Probed(
        model=probes[0],
        untrained=probes[1],
        commonest=float((targets["test"] == commonest).double().mean()),
        texts={part: len(texts) for part, texts in ids.items()},
        labels=len(source.labels),
    )


def fit_probe(given: dict[str, Tensor], targets: dict[str, Tensor], n_labels: int) -> Probe:
    """Fit logistic regressions on vectors (N, D) and labels (N,) of ``train``; choose on ``valid``, state ``test``."""
    mean_D, deviation_D = given["train"].mean(dim=0), given["train"].std(dim=0).clamp_min(1e-6)
    scaled = {part: (x_ND - mean_D) / deviation_D for part, x_ND in given.items()}

    def right(weights: tuple[Tensor, Tensor], part: str) -> Tensor:
        return (scaled[part] @ weights[0] + weights[1]).argmax(dim=1) == targets[part]

    fitted = {penalty: _fit(scaled["train"], targets["train"], n_labels, penalty) for penalty in PENALTIES}
    best = max(PENALTIES, key=lambda penalty: (int(right(fitted[penalty], "valid").sum()), penalty))
    hits_N, labels_N = right(fitted[best], "test"), targets["test"]
    recalls = [float(hits_N[labels_N == label].double().mean()) for label in sorted(set(labels_N.tolist()))]
    return Probe(
        accuracy=float(hits_N.double().mean()),
        interval=share_interval(int(hits_N.sum()), len(hits_N)),
        balanced=sum(recalls) / len(recalls),
        penalty=best,
        train_accuracy=float(right(fitted[best], "train").double().mean()),
    )


def _fit(x_ND: Tensor, labels_N: Tensor, n_labels: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Return weights (D, K) and biases (K,) that minimize the cross-entropy plus the penalty, a convex problem."""
    weight_DK = torch.zeros(x_ND.shape[1], n_labels, requires_grad=True)
    bias_K = torch.zeros(n_labels, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_DK, bias_K], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(x_ND @ weight_DK + bias_K, labels_N)
        value = value + penalty * weight_DK.square().sum()
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight_DK.detach(), bias_K.detach()
