"""``data=noisy_recall``: in-context recall among noise (MAD, arXiv 2403.17844); all as in ``in_context_recall``.

Each pair but the last is two noise ids instead with probability ``frac_noise``. The paper's sizes: 32 ids of which 16
are noise, 128 tokens, a share of 0.2, 12,800 examples to train on; one at a time vocab_size 48, 80, 144, seq_len 256,
512, 1024, n_train_examples 6400, 3200, 1600, 800, frac_noise 0.4, 0.6, 0.8.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybridnas.config import option
from hybridnas.data.task import register_task
from hybridnas.data.tasks.in_context_recall import InContextRecall, RecallConfig


@dataclass(frozen=True, kw_only=True)
class NoisyRecallConfig(RecallConfig):
    """Settings of noisy in-context recall."""

    kind: str = option("noisy_recall", "kind of data, a name in SOURCES")
    vocab_size: int = option(32, "different ids: keys, values, noise, special ones [count]", ge=2)
    noise_vocab_size: int = option(16, "ids of noise, the highest of the vocabulary [count]", ge=1)
    frac_noise: float = option(0.2, "share of the pairs that are two noise ids instead [0 to 1]", ge=0, le=1)


@register_task("noisy_recall", config=NoisyRecallConfig)
class NoisyRecall(InContextRecall):
    """In-context recall among noise."""
