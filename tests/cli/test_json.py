"""json=true: every command ends standard output with one JSON object of what it found."""

import json
import math
import os
from pathlib import Path

import pytest

import hybridnas
from hybridnas.cli import COMMANDS, run
from hybridnas.export.hf.writing import export_native

LLAMA = {"norm": "rmsnorm", "final_norm": True, "F": {"activation": "silu", "gated": True, "bias": False}}
TRAINED = ["train.tokens=512", "train.batch_size=4", "train.seq_len=32", "train.valid_tokens=128", "device=cpu"]
SEARCHED = [
    *("budget=smoke", "n_trials=2", "budget.d_model=16", "budget.depth=2", "budget.seq_len=32", "budget.batch_size=4"),
    *("budget.tokens_per_active_param=0.2", "budget.valid_tokens=256", "budget.rungs=1", "budget.evals=1"),
    *("space.baselines=[mamba,transformer]", "study=tiny", "device=cpu"),
]
CASES = {  # command -> settings, and what must be in the object; in an order in which each finds what it needs
    "search": (["data=text", "data.path=text.txt", *SEARCHED], {"folder", "best", "ended", "report", "model"}),
    "train": (
        ["data=text", "data.path=text.txt", "pattern=F", "arch.d_model=16", "out=runs/own", *TRAINED],
        {"folder", "model", "status", "final", "cost", "fingerprint"},
    ),
    "describe": (
        ["pattern=(ME)x2", "arch.d_model=16"],
        {"pattern", "fingerprint", "cost", "layers", "implementations"},
    ),
    "data": (["describe", "data.path=text.txt"], {"data", "figures", "parts", "shares", "samples"}),
    "compare": (["baseline=mamba"], {"baseline", "runs", "page"}),
    "export": (["study=tiny", "out=exported"], {"model", "trial", "valid_loss"}),
    "import": (["model=llama", "out=imported"], {"model", "model_type", "pattern", "fingerprint"}),
    "generate": (
        ["study=tiny", "prompt=line", "max_new_tokens=5", "device=cpu"],
        {"text", "tokens", "prompt", "model"},
    ),
    "evaluate": (
        ["model=runs/own", "data=text", "data.path=text.txt", "valid_tokens=256", "seq_len=32", "device=cpu"],
        {"loss", "accuracy", "bits_per_byte", "tokens"},
    ),
    "replay": (["study=tiny", "trial=0", "device=cpu"], {"identical", "losses", "folder"}),
    "ladder": (
        ["study=tiny", "top=1", "sizes=[1]", "seeds=1", "tokens=[0.2]", "warmup=0.1", "hold_out=0", "device=cpu"],
        {"ladder", "folder", "models", "pairs", "done"},
    ),
    "graft": (
        ["model=runs/own", "edit=+1:F", "init=zero", "data=text", "data.path=text.txt", "out=grafted", "device=cpu"],
        {"model", "status", "pattern", "graft", "cost"},
    ),
    "new": (["space", "own"], {"kind", "name", "file", "test"}),
    "bench": (["conv", "tiny=true"], {"suites", "settings", "machine"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("json")
    llama = hybridnas.Arch.from_pattern("AF", d_model=16, vocab_size=32, **LLAMA)
    export_native(hybridnas.build(llama), folder / "llama", format="llama", check=False)
    (folder / "text.txt").write_text("".join(f"line {i} of a plain text\n" for i in range(3000)))
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """Run every command once and keep what it printed."""
    import contextlib
    import io

    before, kept = Path.cwd(), {}
    os.chdir(folder)
    try:
        for command, (settings, _) in CASES.items():
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = run([command, *settings, "json=true"])
            kept[command] = (code, out.getvalue(), err.getvalue())
    finally:
        os.chdir(before)
    return kept


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_with_one_object(found, command):
    code, out, err = found[command]
    assert code == 0, err
    *before, last = out.splitlines()
    assert before == []
    assert CASES[command][1] <= set(json.loads(last))


def test_a_search_names_its_winner(found, folder):
    search = json.loads(found["search"][1])
    assert search["ended"] == "completed"
    assert search["folder"] == "runs/tiny"
    assert (folder / search["report"]).is_file()
    best = search["best"]
    assert best["pattern"] in ("MM", "AF")
    assert best["valid_loss"] == best["objectives"]["val_loss"] > 0
    assert best["cost"]["active_params"] > 0
    assert (folder / search["model"] / "config.json").is_file()


def test_a_training_names_its_figures_and_a_model_is_found_in_its_folder(found):
    train = json.loads(found["train"][1])
    assert (train["status"], train["folder"], train["pattern"]) == ("completed", "runs/own", "F")
    assert train["final"]["tokens"] == 512
    measured = json.loads(found["evaluate"][1])
    assert math.isclose(measured["loss"], train["final"]["valid_loss"], rel_tol=0.2)
    assert measured["fingerprint"] == train["fingerprint"]


def test_the_commands_on_a_study_agree_with_its_record(found):
    best = json.loads(found["search"][1])["best"]
    exported = json.loads(found["export"][1])
    assert (exported["trial"], exported["fingerprint"]) == (best["number"], best["fingerprint"])
    assert json.loads(found["generate"][1])["model"].endswith("runs/tiny/best")
    replayed = json.loads(found["replay"][1])
    assert replayed["identical"] is True
    assert all(pair["recorded"] == pair["again"] for pair in replayed["losses"])
    names = {row["name"] for row in json.loads(found["compare"][1])["runs"]}
    assert {"mamba", "transformer"} <= names


def test_without_it_the_same_is_printed_for_people(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert run(["describe", "pattern=F", "arch.d_model=16"]) == 0
    out, err = capsys.readouterr()
    assert "total" in out
    assert err == ""
