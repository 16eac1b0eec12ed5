"""build: which architecture or folder a name means, and where the model lies."""

import json
import logging
from pathlib import Path

import pytest
import torch

import hybridnas
from hybridnas.errors import ConfigError, ExportError
from hybridnas.hardware import Impl

SMALL = {"d_model": 16, "vocab_size": 32}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def export(name: str) -> None:
    hybridnas.build("F", **SMALL).save_pretrained(name)


def test_a_preset_and_a_pattern_win_over_a_folder_of_their_name_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    Path("mamba").mkdir()
    Path("mamba/config.json").write_text(json.dumps({"model_type": "mamba"}))
    export("transformer")
    export("M")
    assert hybridnas.build("mamba", d_model=16, n_blocks=2, vocab_size=32).arch.pattern.letters == "MM"
    with caplog.at_level(logging.INFO, logger="hybridnas"):
        assert "A" in hybridnas.build("transformer", d_model=16, n_blocks=2, vocab_size=32).arch.pattern.letters
        assert hybridnas.build("M", **SMALL).arch.pattern.letters == "M"
    assert [name in text for name, text in zip(("./mamba", "./transformer", "./M"), caplog.messages, strict=True)]


def test_a_path_means_a_folder_and_so_does_a_name_that_is_nothing_else() -> None:
    for name in ("transformer", "best"):
        export(name)
    wanted = (Path("transformer"), "./transformer", "../" + Path.cwd().name + "/transformer", str(Path.cwd() / "best"))
    for what in (*wanted, "best"):
        assert hybridnas.build(what).arch.pattern.letters == "F"
    with pytest.raises(ExportError, match="is not a folder"):
        hybridnas.build("./nothing")
    with pytest.raises(ConfigError, match="nothing"):
        hybridnas.build("nothing")


@pytest.mark.parametrize(("given", "field"), [({"seed": 0}, "seed"), ({"d_model": 32}, "d_model")])
def test_a_folder_takes_no_seed_and_no_change(given: dict[str, int], field: str) -> None:
    export("best")
    with pytest.raises(ConfigError) as caught:
        hybridnas.build("./best", **given)
    assert (caught.value.field, caught.value.got, caught.value.allowed) == (field, given[field], "impl, device")


def test_the_implementation_reaches_a_folder_s_model() -> None:
    export("best")
    assert hybridnas.build("./best", impl="reference").impl is Impl.REFERENCE
    assert {block.impl for block in hybridnas.build("./best", impl="reference").blocks()} == {Impl.REFERENCE}
    with pytest.raises(ConfigError, match="impl='quick'"):
        hybridnas.build("./best", impl="quick")


def test_torch_s_own_context_decides_the_device_for_a_model_and_for_a_folder() -> None:
    export("best")
    with torch.device("meta"):
        assert all(p.is_meta for p in hybridnas.build("moe_mamba_100m").parameters())
        assert all(p.is_meta for p in hybridnas.build("./best").parameters())
        assert next(hybridnas.build("M", device="cpu", **SMALL).parameters()).device.type == "cpu"
    torch.set_default_device("meta")
    try:
        assert all(p.is_meta for p in hybridnas.build("MEAN", n_experts=2, **SMALL).parameters())
    finally:
        torch.set_default_device(None)
    for model in (hybridnas.build("M", **SMALL), hybridnas.load("best")):
        assert next(model.parameters()).device.type == "cpu"
