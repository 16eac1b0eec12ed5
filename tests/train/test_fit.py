"""hybridnas.fit: any module from ids to logits, with a folder or without, against a plain training loop."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from counting import VOCAB, Counting, arch_of, crash_at, ctrl_c_at, numbers
from torch import nn

import hybridnas
from hybridnas.errors import CheckpointError, ConfigError, DataError
from hybridnas.train import checkpoint
from hybridnas.train.callbacks import Action, Callback, EarlyStopping, OnEval, StopAtAccuracy
from hybridnas.train.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"batch_size": 4, "seq_len": 16, "lr": 1e-2, "valid_tokens": 64, "device": "cpu"}
STEP = 64  # training tokens of one step


class Bigram(nn.Module):
    """Logits from the last two ids, in any of the forms that a model may answer with."""

    def __init__(self, answer=lambda logits: logits, width=16, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width)
        self.out = nn.Linear(2 * width, VOCAB)
        self.answer = answer
        self.dropout = dropout

    def forward(self, ids):
        x = self.embedding(ids)
        both = torch.cat((x, F.pad(x, (0, 0, 1, 0))[:, :-1]), dim=-1)
        return self.answer(self.out(F.dropout(both, self.dropout, self.training)))


def bigram(**fields):
    torch.manual_seed(3)
    return Bigram(**fields)


def fit(model, steps, source=None, **fields):
    return hybridnas.fit(model, source or Counting(), tokens=steps * STEP, **{**SMALL, **fields})


def test_a_module_is_trained_in_place_as_by_a_plain_loop():
    ours, theirs = bigram(), bigram()
    result = fit(ours, 5, weight_decay=0.0, grad_clip=0.0, schedule="constant", warmup_fraction=0.0)
    assert result.model is ours
    assert result.folder is None
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    losses = []
    for step in range(5):
        batch = Counting().train_batch(step, 4, 16, 0)
        loss = F.cross_entropy(theirs(batch.inputs_BL).flatten(0, 1), batch.targets_BL.flatten())
        plain.zero_grad()
        loss.backward()
        plain.step()
        losses.append(loss.item())
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    assert sum(value.train_loss for value in result.evals) / 5 == pytest.approx(sum(losses) / 5, rel=1e-5)
    (batch,) = Counting().valid_batches(64, 4, 16)
    with torch.no_grad():
        logits = theirs(batch.inputs_BL)
    last = result.evals[-1]
    assert last.valid_loss == pytest.approx(float(F.cross_entropy(logits.mT, batch.targets_BL)), rel=1e-4)
    assert last.accuracy == pytest.approx(float((logits.argmax(-1) == batch.targets_BL).float().mean()))


@pytest.mark.parametrize(
    "answer",
    [lambda x: x, lambda x: SimpleNamespace(logits=x), lambda x: (x, None), lambda x: SimpleNamespace(logits=(x,))],
)
def test_logits_may_come_as_a_tensor_an_object_or_a_tuple(answer):
    assert numbers(fit(bigram(answer=answer), 4)) == numbers(fit(bigram(), 4))


@pytest.mark.parametrize(
    ("answer", "got"),
    [(lambda x: None, "NoneType"), (lambda x: {"logits": x}, "dict"), (lambda x: x[:, -1], (4, VOCAB))],
)
def test_what_is_no_logits_is_refused_with_what_was_returned(answer, got):
    with pytest.raises(ConfigError) as caught:
        fit(bigram(answer=answer), 2)
    assert (caught.value.field, caught.value.got) == ("model", got)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fit(bigram(), 6, checkpoint_seconds=0.0)
    assert result.status == "completed"
    assert list(tmp_path.iterdir()) == []


def test_a_module_in_a_folder_goes_on_to_the_bit_dropout_included(tmp_path):
    whole = fit(bigram(dropout=0.3), 12, folder=tmp_path / "whole")
    source = Counting(ctrl_c_at(4))
    with pytest.raises(KeyboardInterrupt):
        fit(bigram(dropout=0.3), 12, source, folder=tmp_path / "cut")
    torch.manual_seed(99)
    other = Bigram(dropout=0.3)  # whatever weights the module has: the checkpoint's are taken up
    again = fit(other, 12, folder=tmp_path / "cut")
    assert numbers(again) == numbers(whole)
    assert again.model is other
    for a, b in zip(other.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    third = bigram(dropout=0.3)
    assert numbers(fit(third, 12, Counting(crash_at(0)), folder=tmp_path / "cut")) == numbers(whole)  # read back
    assert torch.equal(third.out.weight, other.out.weight)


def test_a_folder_of_another_module_or_setting_is_refused(tmp_path):
    fit(bigram(), 4, folder=tmp_path)
    with pytest.raises(CheckpointError) as caught:
        fit(bigram(width=8), 4, folder=tmp_path)
    assert any("architecture params" in words for words in caught.value.allowed)
    with pytest.raises(CheckpointError) as caught:
        fit(bigram(), 4, folder=tmp_path, lr=0.5)
    assert caught.value.allowed == ["train lr=0.01 (asked for: 0.5)"]
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_model(tmp_path)
    assert caught.value.field == "folder"


def test_a_hybrid_model_given_with_its_weights_starts_from_them_and_is_no_run_of_its_architecture(tmp_path):
    model = hybridnas.HybridLM(arch_of(), seed=5)
    first = fit(model, 4, folder=tmp_path / "given").evals[0].train_loss
    fresh = fit(arch_of(), 4, seed=5, data_seed=0).evals[0].train_loss
    assert first == fresh
    with pytest.raises(CheckpointError) as caught:
        fit(arch_of(), 4, folder=tmp_path / "given")
    assert caught.value.allowed == ["start weights='given' (asked for: null)"]


def test_an_architecture_is_built_from_its_seed():
    one, two, other = (fit(arch_of("MF"), 3, seed=seed) for seed in (1, 1, 2))
    assert numbers(one) == numbers(two) != numbers(other)


def test_data_by_name_and_by_mapping(corpus):
    given = {"kind": "text", "path": str(corpus)}
    model = nn.Sequential(nn.Embedding(257, 8), nn.Linear(8, 257))
    result = hybridnas.fit(model, given, tokens=512, batch_size=4, seq_len=32, valid_tokens=128, device="cpu")
    assert result.evals[-1].bits_per_byte == pytest.approx(result.valid_loss / math.log(2), rel=0.05)
    task = hybridnas.fit(model, "parity", tokens=4096, batch_size=4, valid_tokens=128, device="cpu")
    assert task.evals[-1].bits_per_byte is None
    with pytest.raises(ConfigError):
        hybridnas.fit(model, "text_of_nobody", tokens=512)


@pytest.mark.parametrize("model", ["moe_mamba", 3, None])
def test_what_is_neither_module_nor_architecture_is_refused(model):
    with pytest.raises(ConfigError) as caught:
        hybridnas.fit(model, Counting(), tokens=64)
    assert caught.value.field == "model"
    assert caught.value.got == type(model).__name__


def test_a_model_with_nothing_to_train_is_refused():
    for model in (nn.Identity(), Bigram().requires_grad_(False)):
        with pytest.raises(ConfigError) as caught:
            hybridnas.fit(model, Counting(), tokens=64, **SMALL)
        assert (caught.value.field, caught.value.got) == ("model", 0)


@pytest.mark.parametrize(
    ("given", "got"), [(Callback(), "Callback"), ([print], "builtin_function_or_method"), (3, "int")]
)
def test_callbacks_that_are_none_are_refused_before_anything_is_written(given, got, tmp_path):
    with pytest.raises(ConfigError) as caught:
        hybridnas.fit(Bigram(), Counting(), tokens=64, callbacks=given, folder=tmp_path / "run", **SMALL)
    assert (caught.value.field, caught.value.got) == ("callbacks", got)
    assert not (tmp_path / "run").exists()


def test_a_task_that_is_read_through_a_head_needs_a_model_with_one():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
    with pytest.raises(DataError) as caught:
        hybridnas.fit(model, {"kind": "compression", "seq_len": 16}, tokens=128, batch_size=4, device="cpu")
    assert (caught.value.field, caught.value.got) == ("model", "Sequential")


class Recorder(Callback):
    def __init__(self):
        self.seen = []

    def on_start(self, run):
        self.seen.append(("start", run.tokens, run.total_tokens))

    def on_step(self, run, step):
        self.seen.append(("step", step, math.isfinite(run.loss)))

    def on_eval(self, run, evaluation):
        self.seen.append(("eval", evaluation.tokens, len(run.evals)))
        return Action.CONTINUE

    def on_end(self, run, result):
        self.seen.append(("end", result.status, result.final))


def test_callbacks_see_the_start_every_step_every_measurement_and_the_end():
    recorder = Recorder()
    fit(bigram(), 3, callbacks=[recorder], eval_at=(128,))
    assert recorder.seen == [
        ("start", 0, 192), ("step", 1, True), ("step", 2, True), ("eval", 128, 1), ("step", 3, True), ("eval", 192, 2),
        ("end", "completed", True),
    ]  # fmt: skip


def test_the_total_is_what_the_run_will_have_read():
    recorder = Recorder()
    hybridnas.fit(bigram(), Counting(), tokens=150, callbacks=[recorder], **SMALL)  # no whole number of steps
    assert recorder.seen[0] == ("start", 0, 192)
    assert recorder.seen[-2] == ("eval", 192, len([one for one in recorder.seen if one[0] == "eval"]))


def test_callbacks_of_a_run_that_goes_on_see_the_earlier_measurements_first(tmp_path):
    first, second, third = Recorder(), Recorder(), Recorder()
    with pytest.raises(KeyboardInterrupt):
        fit(bigram(), 6, Counting(ctrl_c_at(3)), folder=tmp_path, callbacks=[first])
    assert first.seen[-1] == ("end", "interrupted", False)
    fit(bigram(), 6, folder=tmp_path, callbacks=[second])
    assert second.seen[:2] == [("start", 256, 384), ("eval", 64, 4)]
    fit(bigram(), 6, folder=tmp_path, callbacks=[third])  # finished: shown, not trained
    assert [one[0] for one in third.seen] == ["start", *["eval"] * 6, "end"]


def test_of_several_callbacks_the_strongest_answer_counts():
    pause, stop = OnEval(lambda value: Action.PAUSE), OnEval(lambda value: Action.STOP)
    silent = OnEval(lambda value: None)
    assert fit(bigram(), 6, callbacks=[silent, pause]).status == "paused"
    assert fit(bigram(), 6, callbacks=[stop, pause]).status == "stopped"
    assert fit(bigram(), 6, callbacks=[silent]).status == "completed"


def test_a_callback_that_raises_ends_the_run_and_keeps_the_measurement(tmp_path):
    recorder = Recorder()

    def refuse(value):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError):
        fit(bigram(), 6, folder=tmp_path, callbacks=[OnEval(refuse), recorder])
    assert recorder.seen[-1] == ("end", "failed", False)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert json.loads((tmp_path / "run.json").read_text())["final"] is False


def test_early_stopping_counts_measurements_without_progress_also_across_a_restart(tmp_path):
    losses = iter([3.0, 2.0, 2.5, 1.99, 2.1, 2.2, 2.3, 2.4])

    class Scripted(Callback):
        def on_eval(self, run, evaluation):
            object.__setattr__(run.evals[-1], "valid_loss", next(losses))
            return Action.CONTINUE

    result = fit(bigram(), 8, eval_at=tuple(STEP * n for n in range(1, 9)),
                 callbacks=[Scripted(), EarlyStopping(patience=3, min_delta=0.1)])  # fmt: skip
    assert [value.valid_loss for value in result.evals] == [3.0, 2.0, 2.5, 1.99, 2.1]  # 1.99 is no progress of 0.1
    assert result.status == "stopped"
    with pytest.raises(ConfigError) as caught:
        EarlyStopping(patience=0)
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("patience", 0, ">= 1")


def test_an_accuracy_may_end_a_run():
    assert fit(bigram(), 6, callbacks=[StopAtAccuracy(0.0)]).evals[-1].step == 1
    assert fit(bigram(), 6, callbacks=[StopAtAccuracy(1.1)]).status == "completed"


@pytest.fixture
def seer():
    return arch_of("ME", E={"router": "expert_choice", "capacity_factor": 1.0})


def test_a_model_that_sees_later_tokens_is_refused_unless_allowed(seer, tmp_path, caplog):
    with pytest.raises(ConfigError) as caught:
        fit(seer, 2, folder=tmp_path / "run")
    assert (caught.value.field, caught.value.allowed) == ("allow_noncausal", True)
    assert not (tmp_path / "run").exists()
    model = hybridnas.HybridLM(seer)
    with pytest.raises(ConfigError):
        fit(model, 2)
    given = {"n_tokens": 64, "batch_size": 4, "seq_len": 16, "device": torch.device("cpu")}
    with pytest.raises(ConfigError) as caught:
        evaluate(model, Counting(), **given)
    assert caught.value.field == "allow_noncausal"
    assert math.isfinite(evaluate(model, Counting(), allow_noncausal=True, **given).loss)
    result = fit(seer, 2, folder=tmp_path / "run", allow_noncausal=True)
    assert result.status == "completed"
    assert "sees later tokens" in caplog.text
    assert json.loads((tmp_path / "run" / "run.json").read_text())["train"]["allow_noncausal"] is True


def test_a_module_without_logits_for_every_token_of_the_data_is_refused():
    small = nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 50))
    with pytest.raises(DataError) as found:
        hybridnas.fit(small, data="stdlib", tokens=512, seq_len=64, batch_size=2)
    assert (found.value.field, found.value.got, found.value.allowed) == ("vocab_size", 50, ">= 256")


class Positions(nn.Module):
    """A model with two embeddings, of tokens and of positions."""

    def __init__(self, tokens, positions):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(tokens, 8), nn.Embedding(positions, 8)
        self.head = nn.Linear(8, VOCAB)

    def forward(self, ids):
        return self.head(self.wte(ids) + self.wpe(torch.arange(ids.shape[1])))


@pytest.mark.parametrize(("tokens", "positions"), [(VOCAB - 1, 16), (VOCAB, 15)])
def test_a_module_whose_embedding_is_too_small_is_told_which_sizes_the_data_needs(tokens, positions):
    with pytest.raises(ConfigError) as caught:
        fit(Positions(tokens, positions), 8)
    error = caught.value
    assert (error.field, error.got, error.allowed) == ("model", {"wte": tokens, "wpe": positions}, f">= {VOCAB}")
    assert f"needs {VOCAB} rows and one of positions 16" in str(error)


def test_an_index_error_of_a_modules_own_stays_what_it_is():
    class Broken(Bigram):
        def forward(self, ids):
            return [ids][1]

    with pytest.raises(IndexError, match="list index out of range"):
        fit(Broken(), 2)


class Diverging(Bigram):
    """Gives finite logits for some calls, then NaN."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, ids):
        self.calls -= self.training
        return super().forward(ids) if self.calls >= 0 else super().forward(ids) * math.nan


@pytest.mark.parametrize(("steps", "measured"), [(1, []), (5, [2 * STEP, 4 * STEP])])
def test_a_module_that_diverges_is_a_failed_result_with_what_was_measured_before(steps, measured, caplog):
    result = fit(Diverging(steps), 8, eval_at=(2 * STEP, 4 * STEP, 6 * STEP))
    assert (result.status, result.model, result.final) == ("failed", None, True)
    assert [value.tokens for value in result.evals] == measured
    assert f"not a finite number (step {steps + 1}, {(steps + 1) * STEP} tokens)" in result.reason
    assert result.reason in caplog.text
