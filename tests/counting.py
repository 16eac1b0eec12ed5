"""Training runs for tests: a source that counts, small settings, and ways in which a run can be disturbed."""

import signal

import torch

from hybridnas import train
from hybridnas.arch.arch import Arch
from hybridnas.data import Batch, Source
from hybridnas.train.config import TrainConfig

VOCAB = 16
STEPS = 12


class Counting(Source):
    """Sequences that count up modulo the vocabulary; ``before_step`` is where a test disturbs the run."""

    vocab_size = VOCAB
    fingerprint = "counting"

    def __init__(self, before_step=lambda step: None):
        self.before_step = before_step

    def describe(self):
        return "counting"

    def _batch(self, seed, batch_size, seq_len):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(VOCAB, (batch_size, 1), generator=generator)
        stride = 1 + 2 * torch.randint(2, (batch_size, 1), generator=generator)
        ids = (start + stride * torch.arange(seq_len + 1)) % VOCAB
        return Batch(ids[:, :-1], ids[:, 1:])

    def train_batch(self, step, batch_size, seq_len, seed):
        self.before_step(step)
        return self._batch(1000 * seed + step, batch_size, seq_len)

    def valid_batches(self, n_tokens, batch_size, seq_len):
        yield self._batch(10**6, batch_size, seq_len)


def settings(**fields):
    return TrainConfig(
        **{"tokens": STEPS * 64, "batch_size": 4, "seq_len": 16, "lr": 1e-2, "valid_tokens": 64, **fields}
    )


def arch_of(pattern="ME", **fields):
    given = {"n_experts": 4, "d_expert": 16} if "E" in pattern else {}
    return Arch.from_pattern(pattern, d_model=16, vocab_size=VOCAB, **{**given, **fields})


def run(folder, config=None, arch=None, source=None, **kwargs):
    return train.run(
        arch or arch_of(), source or Counting(), config or settings(), folder=folder, device="cpu", **kwargs
    )


def numbers(result):
    """Everything measured that does not depend on the clock."""
    return [
        (v.tokens, v.step, v.train_loss, v.valid_loss, v.accuracy, tuple(sorted(v.aux.items()))) for v in result.evals
    ]


def same_bits(one, two):
    assert numbers(one) == numbers(two)
    for (name, a), b in zip(one.model.state_dict().items(), two.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class CrashError(Exception):
    pass


def crash_at(*steps):
    left = set(steps)

    def disturb(step):
        if step in left:
            left.remove(step)
            raise CrashError

    return disturb


def ctrl_c_at(*steps):
    left = set(steps)

    def disturb(step):
        if step in left:
            left.remove(step)
            signal.raise_signal(signal.SIGINT)

    return disturb
