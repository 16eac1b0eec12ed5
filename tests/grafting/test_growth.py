"""Growth of trained models: the same function at a larger width and depth, to float64."""

import json

import pytest
import torch

import hybridnas
from hybridnas.cli import run
from hybridnas.data import open_source, source_config
from hybridnas.errors import ConfigError
from hybridnas.grafting.growth import difference, grow
from hybridnas.registry import BLOCKS

SMALL = {"d_model": 16, "vocab_size": 64, "final_norm": True}


def model(pattern, **fields):
    found = hybridnas.build(pattern, seed=1, **{**SMALL, **fields}).double()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return found.eval()


@pytest.mark.parametrize("letter", [letter for letter in BLOCKS if letter not in "DZ"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_wider_stream_computes_the_same_with_every_block(letter, norm):
    from hybridnas.grafting.growth import _widened

    small = model(f"A{letter}F", norm=norm, A={"n_heads": 2})
    wide = _widened(small, 3)
    assert wide.arch.d_model == 48
    assert difference(small, wide) < 1e-12
    copies = wide.layers[2].branches[0][0].ff.up_proj.weight.view(64, 3, 16)
    assert not torch.allclose(copies[:, 0], copies[:, 1])  # they learn apart


GROWN = [  # pattern and settings before, after
    ("AFAF", {"A": {"n_heads": 2}}, "AFAF", {"d_model": 32, "A": {"n_heads": 4}}),
    ("AFAF", {"A": {"n_heads": 2}}, "AFAFAF", {"d_model": 32, "A": {"n_heads": 4}}),
    ("MFMF", {}, "MFMFMFMF", {"d_model": 32}),
    ("ME", {"n_experts": 4}, "MEME", {"d_model": 64, "n_experts": 8}),
    ("LF", {"L": {"n_heads": 2}}, "LFLF", {"d_model": 32, "L": {"n_heads": 4}}),
    ("M[A,F]", {"A": {"n_heads": 2}, "canon": 3}, "M[A,F]F", {"d_model": 32, "A": {"n_heads": 4}, "canon": 3}),
    ("AF", {"A": {"n_heads": 2}, "n_meta_tokens": 3}, "AFAF", {"A": {"n_heads": 2}, "n_meta_tokens": 3}),
]


@pytest.mark.parametrize(("pattern", "before", "larger", "after"), GROWN, ids=str)
def test_a_larger_model_begins_as_the_smaller_one(pattern, before, larger, after):
    small = model(pattern, **before)
    arch = hybridnas.Arch.from_pattern(larger, **{**SMALL, **after})
    found = grow(small, arch)
    assert found.model.arch == arch
    assert found.difference < 1e-12
    assert difference(small, found.model) == found.difference
    assert found.notes == []
    assert found.model.lineage[-1]["grown"]


# Mamba-2's norm sees more channels; S4D works by channel; Zamba's block reads two streams side by side
@pytest.mark.parametrize("pattern", ["NF", "DF", "ZF"])
def test_growth_that_changes_the_function_says_so(pattern):
    found = grow(model(pattern), hybridnas.Arch.from_pattern(pattern, **{**SMALL, "d_model": 32}))
    assert found.difference > 1e-3


@pytest.mark.parametrize(
    ("fields", "field", "got", "allowed"),
    [
        ({"d_model": 40}, "d_model", 40, "a multiple of 16"),
        ({"d_model": 8}, "d_model", 8, "a multiple of 16"),
        ({"d_model": 32, "norm": "rmsnorm"}, "norm", "rmsnorm", "layernorm"),
        ({"vocab_size": 80}, "vocab_size", 80, 64),
    ],
    ids=str,
)
def test_widths_that_cannot_be_mapped_are_refused(fields, field, got, allowed):
    with pytest.raises(ConfigError) as error:
        grow(model("AF"), hybridnas.Arch.from_pattern("AF", **{**SMALL, **fields}))
    assert (error.value.field, error.value.got, error.value.allowed) == (field, got, allowed)


@pytest.mark.slow
def test_the_command_trains_on_from_a_smaller_model(corpus, tmp_path, capsys):
    data = {"kind": "text", "path": str(corpus)}
    small = hybridnas.build("AF", d_model=16, vocab_size=256, A={"n_heads": 2})
    small.save_pretrained(tmp_path / "small", source=open_source(source_config(data)))
    settings = ["pattern=AFAF", "arch.d_model=32", "arch.A.n_heads=4", "data=text", f"data.path={corpus}"]
    settings += ["train.tokens=256", "train.batch_size=4", "train.seq_len=32", "train.valid_tokens=128"]
    command = ["train", "json=true", f"grow={tmp_path / 'small'}", f"out={tmp_path / 'run'}", "tracking=off", *settings]
    assert run(command) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["pattern"] == "AFAF"
    assert "the same function" in err
    assert hybridnas.load(tmp_path / "run" / "model").lineage[0]["grown"]
    for setting, field in (("freeze=[*]", "freeze"), ("arch.d_model=40", "d_model")):
        assert run([*command, setting, f"out={tmp_path / 'other'}"]) == 2
        assert json.loads(capsys.readouterr().out)["error"]["field"] == field
        assert not (tmp_path / "other").exists()
