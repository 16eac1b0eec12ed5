"""lm-eval on one of our folders: the figures are those of our own model on the same windows."""

import json
import math
from pathlib import Path

import pytest
import torch

import hybridnas
from hybridnas.cli.evaluate import Settings, run
from hybridnas.data.tokenizers import ByteTokenizer, Tokenizer, train_bpe
from hybridnas.errors import ConfigError
from tests.oracles import randomize

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

TEXTS = ["def f(x):\n    return x + 1\n", "ä€😀 and so on, for longer than one window of the model", "a"]
WINDOW = 16
DATA = {"data": {"kind": "stdlib"}}


def our_bits_per_byte(folder: Path, tokenizer: Tokenizer) -> float:
    """Return the bits per byte of windows of one length, each read from the token before it, the first from the
    separator."""
    model, nats = hybridnas.load(folder), 0.0
    for text in TEXTS:
        ids = [tokenizer.separator, *tokenizer.encode(text)]
        for start in range(0, len(ids) - 1, WINDOW):
            end = min(start + WINDOW, len(ids) - 1)
            first = max(0, end - WINDOW)  # a last window is as long as the others, and counts what is new in it
            logits = model(torch.tensor([ids[first:end]])).logits[0].log_softmax(-1)
            nats -= sum(float(logits[at - 1 - first, ids[at]]) for at in range(start + 1, end + 1))
    return nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@torch.no_grad()
def test_a_task_of_local_text_gives_our_own_bits_per_byte(kind: str, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else train_bpe(TEXTS * 9, 270)
    model = hybridnas.build("MA", d_model=16, vocab_size=tokenizer.vocab_size)
    randomize(model)
    folder = model.save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    task = tmp_path / "own_text.yaml"
    task.write_text(
        f"""task: own_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "texts.jsonl"}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""
    )
    settings = {**DATA, "model": str(folder), "lm_eval": [str(task)], "seq_len": WINDOW, "device": "cpu"}
    done = run(Settings.from_dict(settings))
    assert done.found["lm_eval"]["own_text"]["bits_per_byte"] == pytest.approx(
        our_bits_per_byte(folder, tokenizer), abs=1e-4
    )


@torch.no_grad()
def test_a_named_task_is_scored_on_a_local_copy_of_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "EleutherAI" / "lambada_openai"  # laid out as on the Hub
    copy.mkdir(parents=True)
    (copy / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:2]))
    model = hybridnas.build("MA", d_model=16, vocab_size=256)
    randomize(model)
    folder = model.save_pretrained("model", tokenizer=ByteTokenizer())
    done = run(Settings.from_dict({**DATA, "model": str(folder), "lm_eval": ["lambada_openai"], "device": "cpu"}))
    losses, right = [], []
    for text in TEXTS[:2]:
        ids, last = list(text.encode()), len((" " + text.split(" ")[-1]).encode())
        logits = hybridnas.load(folder)(torch.tensor([ids])).logits[0, -last - 1 : -1].log_softmax(-1)
        losses.append(-sum(float(row[token]) for row, token in zip(logits, ids[-last:], strict=True)))
        right.append(logits.argmax(-1).tolist() == ids[-last:])
    found = done.found["lm_eval"]["lambada_openai"]
    assert found["acc"] == sum(right) / 2
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 2), rel=1e-4)


def test_what_is_no_task_is_refused(tmp_path: Path) -> None:
    folder = hybridnas.build("M", d_model=16, vocab_size=256).save_pretrained(tmp_path, tokenizer=ByteTokenizer())
    nameless = tmp_path / "nameless.yaml"
    nameless.write_text("dataset_path: json\n")
    for task in ("no_such_file.yaml", str(nameless)):
        with pytest.raises(ConfigError) as error:
            run(Settings.from_dict({**DATA, "model": str(folder), "lm_eval": [task], "device": "cpu"}))
        assert (error.value.field, error.value.got) == ("lm_eval", task)
    with pytest.raises(ConfigError) as error:
        run(Settings.from_dict({**DATA, "lm_eval": ["wikitext"], "preset": {"name": "mamba"}}))
    assert error.value.field == "model"
