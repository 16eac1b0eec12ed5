"""python -m hybridnas.import: a model of another library as ours, and what is no such model in one sentence."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hybridnas
from hybridnas.cli import run
from hybridnas.data.tokenizers import ByteTokenizer
from hybridnas.export.hf.writing import export_native
from hybridnas.export.load import load_tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model, and it as transformers' Llama has it."""
    fields = {"activation": "silu", "gated": True, "bias": False}
    arch = hybridnas.Arch.from_pattern(
        "AFAF", d_model=16, vocab_size=256, norm="rmsnorm", final_norm=True, A={"n_heads": 2}, F=fields
    )
    folder, model = tmp_path_factory.mktemp("llama"), hybridnas.build(arch)
    export_native(model, folder / "theirs", format="llama", tokenizer=ByteTokenizer(), check=False)
    return model, folder / "theirs"


def test_a_pretrained_model_becomes_a_folder_that_every_command_reads(llama, tmp_path, capsys):
    model, folder = llama
    assert run(["import", f"model={folder}", f"out={tmp_path / 'ours'}", "json=true"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["model_type"], found["pattern"]) == ("llama", "AFAF")
    again, ids_BL = hybridnas.load(tmp_path / "ours"), torch.arange(20)[None]
    assert again.arch.fingerprint() == found["fingerprint"]
    assert torch.equal(again(ids_BL).logits, model(ids_BL).logits)
    assert load_tokenizer(tmp_path / "ours").encode("ä") == list("ä".encode())


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def _config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _tensors(change):
    def rewrite(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return rewrite


def _bytes(change):
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def _header(change):
    """Change the table of tensors at the start of a file, and leave the rest."""

    def rewrite(raw):
        length = struct.unpack("<Q", raw[:8])[0]
        table = json.loads(raw[8 : 8 + length])
        change(table)
        text = json.dumps(table).encode()
        return struct.pack("<Q", len(text)) + text + raw[8 + length :]

    return _bytes(rewrite)


def _pickled(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))


def _index(name):
    def change(folder):
        (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
        text = json.dumps({"weight_map": {"lm_head.weight": name}})
        (folder / f"{WEIGHTS}.index.json").write_text(text)

    return change


HEAD, NORM = "lm_head.weight", "model.norm.weight"
BAD = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no json": lambda folder: (folder / "config.json").write_text("{"),
    "a list": lambda folder: (folder / "config.json").write_text("[]"),
    "no model type": _config(model_type=None),
    "an unknown model type": _config(model_type="bert"),
    "our own": _config(model_type="hybridnas"),
    "code of its own": _config(model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"}),
    "another family": _config(model_type="mamba"),
    "a size of text": _config(num_hidden_layers="two"),
    "an activation that is not there": _config(hidden_act="gelu_python"),
    "another vocabulary": _config(vocab_size=300),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "pickled weights": _pickled,
    "no bytes": _bytes(lambda raw: b""),
    "half": _bytes(lambda raw: raw[: len(raw) // 2]),
    "a byte less": _bytes(lambda raw: raw[:-1]),
    "a header longer than memory": _bytes(lambda raw: b"\xff" * 8 + raw[8:]),
    "a header that is no json": _bytes(lambda raw: raw[:8] + b"x" + raw[9:]),
    "a tensor outside of the file": _header(lambda table: table[HEAD].update(data_offsets=[0, 2**40])),
    "two tensors at one place": _header(lambda table: table[NORM].update(data_offsets=[0, 64])),
    "a shape larger than its bytes": _header(lambda table: table[HEAD].update(shape=[2**40, 16])),
    "an unknown dtype": _header(lambda table: table[HEAD].update(dtype="OBJECT")),
    "a missing tensor": _tensors(lambda tensors: tensors.pop(NORM)),
    "an unknown tensor": _tensors(lambda tensors: tensors.update(extra=torch.zeros(1))),
    "another shape": _tensors(lambda tensors: tensors.update({NORM: torch.zeros(17)})),
    "an index to another folder": _index("../elsewhere.safetensors"),
    "an index to a file that is not there": _index("model-00001-of-00002.safetensors"),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_one_sentence_and_nothing_is_written(llama, change, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama[1], "theirs")
    change(tmp_path / "theirs")
    before = sorted(tmp_path.rglob("*"))
    assert run(["import", "model=theirs", "out=ours"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "theirs" in err or "model_type" in err or "config" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_import_wants_a_folder_and_a_place(capsys):
    for given, field in (([], "model"), (["model=x"], "out")):
        run(["import", *given, "json=true"])
        assert json.loads(capsys.readouterr().out)["error"]["field"] == field
