"""The commands: export with a format from a model's folder, and the list of formats that hold an architecture."""

import json

import pytest

import hybridnas
from hybridnas.cli import run
from hybridnas.export.hf.fitting import formats

TINY = ("arch.d_model=32", "arch.vocab_size=64", "arch.norm=rmsnorm", "arch.final_norm=true")


def last_line(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.slow
def test_a_model_goes_to_a_class_of_transformers_and_back(tmp_path, capsys):
    arch = hybridnas.Arch.from_pattern("NN", d_model=32, vocab_size=64, norm="rmsnorm", final_norm=True)
    hybridnas.build(arch).save_pretrained(tmp_path / "ours")
    run(["export", f"model={tmp_path / 'ours'}", f"out={tmp_path / 'theirs'}", "format=auto", "json=true"])
    found = last_line(capsys)
    assert (found["format"], found["reloaded"]["class_name"]) == ("mamba2", "Mamba2ForCausalLM")
    assert found["fingerprint"] == arch.fingerprint()
    run(["export", f"model={tmp_path / 'theirs'}", f"out={tmp_path / 'again'}", "json=true"])
    assert last_line(capsys)["format"] == "hybridnas"
    assert hybridnas.load(tmp_path / "again").arch.fingerprint() == arch.fingerprint()


def test_a_format_that_cannot_hold_the_model_is_a_users_mistake(tmp_path, capsys):
    hybridnas.build("MF", d_model=16, vocab_size=64).save_pretrained(tmp_path / "ours")
    assert run(["export", f"model={tmp_path / 'ours'}", f"out={tmp_path / 'out'}", "format=mamba"]) == 2
    assert "format=hybridnas" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_describe_lists_which_formats_hold_an_architecture(capsys):
    run(
        [
            "describe",
            "pattern=NFAF",
            *TINY,
            "arch.A.positions=none",
            "arch.F.activation=relu2",
            "exportable=true",
            "json=true",
        ]
    )
    found = last_line(capsys)["exportable"]
    assert set(found) == set(formats())
    assert [name for name, reason in found.items() if not reason] == ["nemotron_h"]
    assert "relu2" in found["bamba"]
