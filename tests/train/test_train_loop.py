"""Training against oracles: what a step computes, what is measured, how a run ends."""

import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hybridnas import train
from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.cli.progress import ProgressBar, ProgressLines, progress
from hybridnas.data import Batch, Source, open_source, source_config
from hybridnas.errors import DataError
from hybridnas.study.documents import read_documents
from hybridnas.train import objective
from hybridnas.train.callbacks import Action, OnEval
from hybridnas.train.config import TrainConfig
from hybridnas.train.evaluate import evaluate, mean_stats
from hybridnas.train.optim import learning_rate, no_decay_names
from hybridnas.train.records import read_evals

VOCAB = 16
pytestmark = pytest.mark.usefixtures("one_thread")


class Counting(Source):
    """Sequences that count up by 1 or by 3 modulo the vocabulary: learnt within a few dozen steps."""

    vocab_size = VOCAB
    fingerprint = "counting"
    token_lengths = np.full(VOCAB, 2)

    def __init__(self, masked=False):
        self.masked = masked
        self.asked = []
        self.before_step = lambda step: None

    def describe(self):
        return "counting"

    def _batch(self, generator, batch_size, seq_len):
        start = torch.randint(VOCAB, (batch_size, 1), generator=generator)
        stride = 1 + 2 * torch.randint(2, (batch_size, 1), generator=generator)
        ids = (start + stride * torch.arange(seq_len + 1)) % VOCAB
        keep = torch.rand(batch_size, seq_len, generator=generator) < 0.6
        return Batch(ids[:, :-1], ids[:, 1:], keep if self.masked else None)

    def train_batch(self, step, batch_size, seq_len, seed):
        self.before_step(step)
        self.asked.append(step)
        return self._batch(torch.Generator().manual_seed(1000 * seed + step), batch_size, seq_len)

    def valid_batches(self, n_tokens, batch_size, seq_len):
        generator = torch.Generator().manual_seed(10**6)
        for _ in range(-(-n_tokens // (batch_size * seq_len))):
            yield self._batch(generator, batch_size, seq_len)


def arch_of(pattern="ME", **fields):
    given = {"n_experts": 4, "d_expert": 16} if "E" in pattern else {}
    return Arch.from_pattern(pattern, d_model=16, vocab_size=VOCAB, **{**given, **fields})


def settings(steps, **fields):
    given = {"batch_size": 4, "seq_len": 16, "lr": 1e-2, "valid_tokens": 256, **fields}
    step = given["batch_size"] * given["seq_len"] * given.get("accumulate", 1)
    return TrainConfig(tokens=steps * step, **given)


def run(tmp_path, config, arch=None, source=None, **kwargs):
    return train.run(arch or arch_of(), source or Counting(), config, folder=tmp_path / "run", device="cpu", **kwargs)


def test_a_small_model_learns_to_count(tmp_path):
    result = run(tmp_path, settings(120))
    assert result.status == "completed"
    assert result.reason == ""
    assert len(result.evals) == 6
    losses = [value.valid_loss for value in result.evals]
    assert losses[0] > 2 * losses[-1]
    assert losses[-1] < 0.3  # two strides: the second token is a guess, the rest is certain
    assert result.evals[-1].accuracy > 0.85
    assert result.valid_loss == losses[-1]
    assert result.tokens_per_second > 0


def test_a_step_is_adamw_on_clipped_gradients_of_cross_entropy_plus_auxiliary_losses(tmp_path):
    config = settings(5, grad_clip=0.3, weight_decay=0.2, warmup_fraction=0.5)
    arch = arch_of(load_balance_weight=0.5)
    result = run(tmp_path, config, arch)

    model, source = HybridLM(arch, seed=config.seed).train(), Counting()
    spared = no_decay_names(model)
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in spared], "weight_decay": 0.2},
        {"params": [p for n, p in model.named_parameters() if n in spared], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, betas=(0.9, 0.999), foreach=False, fused=False)
    train_losses, balances = [], []
    for step in range(5):
        for group in plain.param_groups:
            group["lr"] = learning_rate(config, (step + 1) * 64)
        batch = source.train_batch(step, 4, 16, 0)
        output = model(batch.inputs_BL)
        loss = F.cross_entropy(output.logits.flatten(0, 1), batch.targets_BL.flatten())
        plain.zero_grad()
        (loss + output.aux.losses["load_balance"]).backward()
        total = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        for p in model.parameters():
            p.grad.mul_(min(1.0, 0.3 / (total + 1e-6)))
        plain.step()
        train_losses.append(loss.item())
        balances.append(output.aux.losses["load_balance"].item())
    for (name, ours), theirs in zip(result.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)
    reported = sum(value.train_loss for value in result.evals) / 5  # five steps, each measured
    assert reported == pytest.approx(sum(train_losses) / 5, rel=1e-5)
    assert sum(value.aux["load_balance"] for value in result.evals) / 5 == pytest.approx(sum(balances) / 5, rel=1e-5)


def test_auxiliary_losses_are_never_mixed_into_cross_entropy(tmp_path):
    little = train.run(
        arch_of(load_balance_weight=0.01), Counting(), settings(1), folder=tmp_path / "a", device="cpu"
    ).evals[0]
    much = train.run(
        arch_of(load_balance_weight=100.0), Counting(), settings(1), folder=tmp_path / "b", device="cpu"
    ).evals[0]
    assert much.train_loss == little.train_loss  # of the first step, before any weight has moved
    assert much.aux["load_balance"] == pytest.approx(1e4 * little.aux["load_balance"], rel=1e-4)
    assert little.aux["load_balance"] == pytest.approx(0.01, rel=0.5)
    assert abs(much.valid_loss - math.log(VOCAB)) < 1.0


def test_a_measurement_is_the_plain_mean_over_validation_tokens():
    model, source = HybridLM(arch_of()), Counting()
    score = evaluate(model, source, n_tokens=300, batch_size=4, seq_len=16, device=torch.device("cpu"))
    nats, right, count = 0.0, 0, 0
    for batch in source.valid_batches(300, 4, 16):
        with torch.no_grad():
            logp = model.eval()(batch.inputs_BL).logits.double().log_softmax(-1)
        nats -= float(logp.gather(-1, batch.targets_BL[..., None]).sum())
        right += int((logp.argmax(-1) == batch.targets_BL).sum())
        count += batch.targets_BL.numel()
    assert score.tokens == count == 320
    assert score.loss == pytest.approx(nats / count, rel=1e-6)
    assert score.accuracy == right / count
    assert score.bits_per_byte == pytest.approx(score.loss / math.log(2) / 2.0)


def test_places_under_the_mask_count_neither_in_loss_nor_in_accuracy():
    model, source = HybridLM(arch_of("MF")), Counting(masked=True)
    score = evaluate(model, source, n_tokens=64, batch_size=4, seq_len=16, device=torch.device("cpu"))
    (batch,) = source.valid_batches(64, 4, 16)
    with torch.no_grad():
        logp = model.eval()(batch.inputs_BL).logits.log_softmax(-1)
    kept = logp.gather(-1, batch.targets_BL[..., None])[..., 0][batch.mask_BL]
    assert score.tokens == int(batch.mask_BL.sum()) < 64
    assert score.loss == pytest.approx(-float(kept.mean()), rel=1e-5)
    hits = (logp.argmax(-1) == batch.targets_BL)[batch.mask_BL]
    assert score.accuracy == pytest.approx(float(hits.float().mean()))


class Reported(Counting):
    """Counting with a test part of other sequences."""

    test_tokens = 256

    def test_batches(self, n_tokens, batch_size, seq_len):
        yield self._batch(torch.Generator().manual_seed(10**7), batch_size, seq_len)


def test_the_test_part_is_measured_once_at_the_end_and_changes_nothing(tmp_path):
    plain = train.run(arch_of(), Counting(), settings(12), folder=tmp_path / "plain", device="cpu")
    source = Reported()
    tested = train.run(arch_of(), source, settings(12), folder=tmp_path / "tested", device="cpu")
    assert [set(value.aux) - set(plain.evals[0].aux) for value in tested.evals[:-1]] == [set()] * 5
    assert [value.valid_loss for value in tested.evals] == [value.valid_loss for value in plain.evals]
    for ours, theirs in zip(tested.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    kwargs = {"n_tokens": 256, "batch_size": 4, "seq_len": 16, "device": torch.device("cpu"), "part": "test"}
    score = evaluate(tested.model, source, **kwargs)
    last = tested.evals[-1]
    assert (last.aux["test_loss"], last.aux["test_accuracy"]) == (score.loss, score.accuracy)
    assert last.aux["test_bits_per_byte"] == pytest.approx(score.loss / math.log(2) / 2)
    assert tested.test_loss == score.loss != last.valid_loss
    assert plain.test_loss is None
    assert read_evals(tmp_path / "tested") == tested.evals


def test_a_run_that_was_stopped_has_no_test_figures(tmp_path):
    stop = OnEval(lambda value: Action.STOP if value.step >= 4 else None)
    result = run(tmp_path, settings(12), source=Reported(), callbacks=[stop])
    assert result.status == "stopped"
    assert result.test_loss is None
    assert read_documents(result.folder) is None


def test_each_example_of_a_task_is_a_document_of_its_own(tmp_path):
    result = run(tmp_path, settings(4), source=Reported())
    (batch,) = Reported().test_batches(256, 4, 16)
    with torch.no_grad():
        logp = result.model.eval()(batch.inputs_BL).logits.log_softmax(-1)
    nats_B = -logp.gather(-1, batch.targets_BL[..., None])[..., 0].double().sum(dim=1)
    sums = read_documents(result.folder)
    assert list(sums.documents) == [0, 1, 2, 3]
    assert sums.nats == pytest.approx(nats_B.tolist(), rel=1e-5)
    assert (sums.tokens, sums.bytes) == ([16] * 4, [32] * 4)


def test_the_losses_of_the_documents_add_up_to_the_test_loss(tmp_path, corpus):
    config = source_config({"kind": "text", "path": str(corpus), "test_fraction": 0.3})
    source = open_source(config)
    arch = Arch.from_pattern("MF", d_model=16, vocab_size=source.vocab_size)
    result = run(tmp_path, settings(2, valid_tokens=4000), arch, source)
    sums = read_documents(result.folder)
    assert len(sums.documents) > 3
    assert sum(sums.nats) / sum(sums.tokens) == pytest.approx(result.test_loss)
    score = evaluate(
        result.model, source, n_tokens=4000, batch_size=4, seq_len=16, device=torch.device("cpu"), part="test",
        by_document=True,
    )  # fmt: skip
    assert score.documents.same_places(sums)
    bits = sum(sums.nats) / math.log(2) / sum(sums.bytes)
    assert bits == pytest.approx(result.evals[-1].aux["test_bits_per_byte"])


@pytest.mark.parametrize(
    ("data", "n_tokens"),
    [({"tokenizer": "bpe:300"}, 20_000), ({"tokenizer": "bpe:300", "path": "long.jsonl"}, 700), ({}, 3000)],
    ids=["short-rows", "a-part-of-it", "bytes"],
)
@pytest.mark.parametrize("part", ["valid", "test"])
def test_bits_per_byte_are_the_loss_of_all_places_over_the_bytes_of_the_text_measured(tmp_path, data, n_tokens, part):
    draw = random.Random(0)
    words = ["cat", "dog", "run", "fish"]
    for name, length in (("short.jsonl", 4), ("long.jsonl", 40)):
        rows = [" ".join(draw.choice(words) for _ in range(draw.randint(2, length))) for _ in range(1500)]
        (tmp_path / name).write_text("\n".join(json.dumps({"text": row}) for row in rows))
    path = str(tmp_path / data.get("path", "short.jsonl"))
    source = open_source(source_config({"kind": "text", "cache_dir": str(tmp_path / "c"), **data, "path": path}))
    model = HybridLM(Arch.from_pattern("F", d_model=8, vocab_size=source.vocab_size))
    found = evaluate(model, source, n_tokens=n_tokens, batch_size=8, seq_len=64, device=torch.device("cpu"), part=part)
    batches = source.test_batches if part == "test" else source.valid_batches
    ids = []
    for batch in batches(n_tokens, 8, 64):
        kept = batch.targets_BL if batch.mask_BL is None else batch.targets_BL[batch.mask_BL]
        ids += kept.flatten().tolist()
    text = sum(len(source.tokenizer.token_bytes(one)) for one in ids if one != source.tokenizer.separator)
    assert found.tokens == len(ids)
    assert found.bits_per_byte == pytest.approx(found.loss * len(ids) / math.log(2) / text)


def test_a_source_without_validation_tokens_says_so():
    class Empty(Counting):
        def valid_batches(self, n_tokens, batch_size, seq_len):
            return iter(())

    with pytest.raises(DataError, match="counting: no valid tokens to measure"):
        evaluate(HybridLM(arch_of("F")), Empty(), n_tokens=9, batch_size=1, seq_len=4, device=torch.device("cpu"))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_accumulation_equals_the_large_batch(tmp_path, masked):
    large = train.run(arch_of("MF"), Counting(masked), settings(6, batch_size=8), folder=tmp_path / "a", device="cpu")
    small = train.run(
        arch_of("MF"),
        Counting(masked),
        settings(6, batch_size=2, accumulate=4),
        folder=tmp_path / "b",
        device="cpu",
    )
    for ours, theirs in zip(small.model.parameters(), large.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
    for a, b in zip(small.evals, large.evals, strict=True):
        assert a.tokens == b.tokens
        assert a.train_loss == pytest.approx(b.train_loss, rel=1e-4)


def test_a_run_is_measured_at_exact_token_counts_and_says_where(tmp_path):
    config = TrainConfig(tokens=1000, batch_size=2, seq_len=32, eval_at=(100, 500), valid_tokens=64)
    result = run(tmp_path, config)
    assert [(value.tokens, value.step) for value in result.evals] == [(128, 2), (512, 8), (1024, 16)]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokens"] for line in lines] == [128, 512, 1024]
    assert train.read_evals(tmp_path / "run") == result.evals


def test_a_measurement_carries_speed_time_and_routing(tmp_path):
    value = run(tmp_path, settings(4, eval_at=(256,))).evals[0]
    assert value.tokens_per_second > 0
    assert value.seconds > 4 * 64 / value.tokens_per_second * 0.9  # training is a part of all time
    assert 0 <= value.aux["dropped"] < 1
    assert value.aux["max_load"] >= 1
    assert value.aux["router_entropy"] > 0
    assert value.aux["grad_norm"] > 0
    assert value.aux["lr"] == pytest.approx(1e-3)  # the end of the cosine


def test_routing_statistics_are_means_over_layers_and_load_is_stated_in_fair_shares():
    stats = {
        "layer01.E.dropped": torch.tensor(0.1),
        "layer03.E.dropped": torch.tensor(0.3),
        "layer01.E.load_E": torch.tensor([0.5, 0.25, 0.25, 0.0]),
        "layer03.E.load_E": torch.tensor([0.25, 0.25, 0.25, 0.25]),
    }
    means = mean_stats(stats)
    assert float(means["dropped"]) == pytest.approx(0.2)
    assert float(means["max_load"]) == pytest.approx(1.5)  # 2 fair shares in one layer, 1 in the other
    assert set(means) == {"dropped", "max_load"}


def test_training_leaves_the_callers_random_numbers_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(tmp_path, settings(2))
    assert torch.equal(before, torch.get_rng_state())


def test_the_same_call_gives_the_same_numbers_and_another_seed_others(tmp_path):
    losses = {}
    for name, fields in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"data_seed": 1})):
        result = train.run(arch_of(), Counting(), settings(3, **fields), folder=tmp_path / name, device="cpu")
        losses[name] = [(value.train_loss, value.valid_loss) for value in result.evals]
    assert losses["a"] == losses["b"]
    assert len({str(value) for value in losses.values()}) == 3


def test_a_run_that_its_watcher_stops_ends_there_for_good(tmp_path):
    source = Counting()
    seen = []

    def watch(value):
        seen.append(value.tokens)
        return Action.STOP if value.tokens >= 256 else Action.CONTINUE

    result = run(tmp_path, settings(12), source=source, callbacks=[OnEval(watch)])
    assert (result.status, seen) == ("stopped", [128, 256])
    assert result.reason == "stopped after the measurement at 256 tokens"
    asked = len(source.asked)
    again = run(tmp_path, settings(12), source=source)
    assert (again.status, again.reason, again.evals) == (result.status, result.reason, result.evals)
    assert len(source.asked) == asked


def test_a_loss_that_is_not_a_number_ends_the_run_and_keeps_what_was_measured(tmp_path, monkeypatch):
    true = objective.cross_entropy_sum
    calls = []

    def poisoned(*args, **options):
        calls.append(1)
        return true(*args, **options) * (math.nan if len(calls) == 5 else 1.0)

    monkeypatch.setattr(objective, "cross_entropy_sum", poisoned)
    result = run(tmp_path, settings(12))
    assert result.status == "failed"
    assert result.reason.startswith(
        "the training loss is not a finite number (step 5, 320 tokens); lower train.lr=0.01"
    )
    assert [value.step for value in result.evals] == [2, 4]
    assert train.read_evals(tmp_path / "run") == result.evals
    assert all(torch.isfinite(p).all() for p in train.load_model(tmp_path / "run").parameters())
    again = run(tmp_path, settings(12))
    assert (again.status, again.reason, len(calls)) == ("failed", result.reason, 5)


def test_a_loss_that_stays_high_is_called_diverged(tmp_path):
    result = run(tmp_path, settings(100, lr=3.0, warmup_fraction=0.0, schedule="constant"), arch_of("F"))
    assert result.status == "failed"
    assert "diverged: the training loss stays at" in result.reason
    assert "lower train.lr=3" in result.reason


def test_one_bad_batch_is_not_called_diverged(tmp_path, monkeypatch):
    true = objective.cross_entropy_sum
    calls = []

    def spiked(*args, **options):
        calls.append(1)
        return true(*args, **options) * (1e6 if len(calls) == 5 else 1.0)

    monkeypatch.setattr(objective, "cross_entropy_sum", spiked)
    assert run(tmp_path, settings(12)).status == "completed"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_lack_of_memory_fails_the_run_and_the_same_call_goes_on_when_there_is_more(tmp_path, error):
    source = Counting()

    def refuse(step):
        if step == 5:
            raise error

    source.before_step = refuse
    result = run(tmp_path, settings(12), source=source)
    assert result.status == "failed"
    assert result.reason.startswith("out of memory in step 6; lower train.batch_size=4")
    assert "experts with a capacity then drop tokens within each smaller pass" in result.reason
    again = run(tmp_path, settings(12))
    assert (again.status, again.evals[:2]) == ("completed", result.evals)


@pytest.mark.parametrize(("fitting", "words"), [(2, "2 fits"), (0, "not even 1 fits")])
def test_lack_of_memory_in_the_first_step_says_which_batch_fits(tmp_path, monkeypatch, fitting, words):
    true, tried = HybridLM.hidden, []

    def limited(self, ids_BL, *args, **options):
        tried.append(len(ids_BL))
        if len(ids_BL) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return true(self, ids_BL, *args, **options)

    monkeypatch.setattr(HybridLM, "hidden", limited)
    result = run(tmp_path, settings(12, batch_size=8))
    assert (result.status, result.final) == ("failed", False)
    assert f"train.batch_size=8, of which {words} (and raise" in result.reason
    assert tried == ([8, 4, 2] if fitting else [8, 4, 2, 1])
    monkeypatch.undo()
    assert run(tmp_path, settings(12, batch_size=8)).status == "completed"


def test_other_errors_are_not_swallowed(tmp_path):
    source = Counting()

    def break_(step):
        raise RuntimeError("shape mismatch")

    source.before_step = break_
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(tmp_path, settings(2), source=source)


def test_data_with_more_tokens_than_the_model_is_refused(tmp_path):
    arch = Arch.from_pattern("F", d_model=16, vocab_size=8)
    with pytest.raises(DataError, match=r"16 different tokens but the model only vocab_size=8"):
        run(tmp_path, settings(2), arch=arch)
    assert not (tmp_path / "run").exists()


def test_news_comes_as_plain_lines_through_a_callable_or_a_pipe_or_not_at_all(tmp_path, capsys):
    lines = []
    run(tmp_path, settings(2, eval_at=(64,)), callbacks=[ProgressLines(lines.append)])
    assert len(lines) == 2
    assert "64 of 128 tokens  train 2." in lines[0]
    assert "nats/token" in lines[0]
    assert "bits/byte" in lines[0]
    train.run(arch_of(), Counting(), settings(1), folder=tmp_path / "piped", device="cpu", callbacks=[progress()])
    out, err = capsys.readouterr()
    assert out == ""
    assert "64 of 64 tokens" in err
    train.run(arch_of(), Counting(), settings(1), folder=tmp_path / "quiet", device="cpu")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert isinstance(progress(), ProgressBar)
    seen = []

    class Watched(ProgressBar):
        def on_step(self, run, step):
            super().on_step(run, step)
            seen.append((self._bar.tasks[0].completed, self._bar.tasks[0].total))

    run(tmp_path, settings(2), callbacks=[Watched()])
    assert seen == [(64, 128), (128, 128)]


def test_bfloat16_products_keep_float32_weights(tmp_path):
    result = run(tmp_path, settings(3, precision="bfloat16"), arch=arch_of("MF"))
    assert result.status == "completed"
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    exact = train.run(arch_of("MF"), Counting(), settings(3), folder=tmp_path / "exact", device="cpu")
    assert result.evals[-1].valid_loss != exact.evals[-1].valid_loss
    assert result.evals[-1].valid_loss == pytest.approx(exact.evals[-1].valid_loss, rel=0.02)
