"""What can be wrong with an exported folder: each gets one sentence that names the place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.errors import ConfigError, ExportError
from hybridnas.export.folder import export
from hybridnas.export.load import load


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = HybridLM(Arch.from_pattern("AFE", d_model=16, vocab_size=32, E={"n_experts": 2, "d_expert": 8}))
    return export(model, tmp_path_factory.mktemp("exported") / "best")


@pytest.fixture
def best(original: Path, tmp_path: Path) -> Path:
    for path in original.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_folder_that_is_missing_or_no_export(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"nowhere is not a folder; give the folder that .*hybridnas.export.* wrote"):
        load(tmp_path / "nowhere")
    with pytest.raises(ExportError, match=r"has no config.json, so it is not an exported model"):
        load(tmp_path)


def test_a_config_that_is_not_json_or_not_ours(best: Path) -> None:
    edit(best, model_type="llama")
    with pytest.raises(ExportError, match=r"config.json is not ours: its model_type is 'llama'"):
        load(best)
    (best / "config.json").write_text("[1]")
    with pytest.raises(ExportError, match=r"config.json is not ours: its model_type is None"):
        load(best)
    (best / "config.json").write_text('{"model_type": "hybr')
    with pytest.raises(ExportError, match=r"config.json cannot be read as JSON .*; export the model again"):
        load(best)


def test_a_newer_format_asks_for_an_upgrade(best: Path) -> None:
    edit(best, format_version=2, hybridnas_version="9.1")
    with pytest.raises(ExportError, match=r"format_version 2, written by a newer hybridnas \(9.1\).*reads up to 1"):
        load(best)
    edit(best, format_version="one")
    with pytest.raises(ExportError, match=r"format_version 'one', expected 1 to 1"):
        load(best)


def test_an_edited_architecture_does_not_match_its_fingerprint(best: Path) -> None:
    arch = json.loads((best / "config.json").read_text())["arch"]
    edit(best, arch={**arch, "norm_eps": 1e-3})
    with pytest.raises(ExportError, match=r"its fingerprint is [0-9a-f]{12}: the file was edited or damaged"):
        load(best)
    edit(best, arch={**arch, "pattern": "AFQ"})
    with pytest.raises(ExportError, match=r"config.json does not describe an architecture: .*unknown letter 'Q'"):
        load(best)
    edit(best, arch={**arch, "d_modle": 3})
    with pytest.raises(ExportError, match=r"does not describe an architecture: .*d_modle"):
        load(best)
    edit(best, arch=None)
    with pytest.raises(ExportError, match=r"does not describe an architecture"):
        load(best)


def test_weights_that_are_missing_or_truncated(best: Path) -> None:
    weights = best / "model.safetensors"
    data = weights.read_bytes()
    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        weights.write_bytes(data[:length])
        with pytest.raises(ExportError, match=r"model.safetensors is truncated or damaged .*; export the model again"):
            load(best)
    weights.unlink()
    with pytest.raises(ExportError, match=r"has no model.safetensors; copy the whole exported folder"):
        load(best)


def test_tensors_that_do_not_fit_are_named(best: Path) -> None:
    rewrite(best, lambda tensors: tensors.update({"head.weight": torch.zeros(32, 15)}))
    with pytest.raises(ExportError, match=r"tensor 'head.weight' of shape 32x15, config.json asks for 32x16"):
        load(best)
    rewrite(best, lambda tensors: tensors.update({"head.weight": torch.zeros(32, 16, dtype=torch.int32)}))
    with pytest.raises(ExportError, match=r"tensor 'head.weight' of dtype torch.int32, expected torch.float32"):
        load(best)
    rewrite(best, lambda tensors: tensors.update({"head.weight": torch.zeros(32, 16), "haed.weight": torch.zeros(1)}))
    with pytest.raises(ExportError, match=r"tensor 'haed.weight' that the architecture does not.*'head.weight'"):
        load(best)
    rewrite(best, lambda tensors: (tensors.pop("haed.weight"), tensors.pop("embedding.weight")))
    with pytest.raises(ExportError, match=r"lacks tensor 'embedding.weight' of shape 32x16"):
        load(best)


def test_a_device_that_is_not_there_is_said(best: Path) -> None:
    with pytest.raises(ConfigError, match="device='tpu9' is not a device"):
        load(best, device="tpu9")


def test_the_loaded_weights_do_not_hang_on_the_file(best: Path) -> None:
    model = load(best, device="cpu")
    before = model.head.weight.clone()
    (best / "model.safetensors").write_bytes(b"\0" * (best / "model.safetensors").stat().st_size)
    assert torch.equal(model.head.weight, before)


def test_a_folder_of_version_0_1_loads(best: Path) -> None:
    path = best / "config.json"
    config = json.loads(path.read_text())
    config["layer_types"] = config.pop("hybrid_layer_types")
    path.write_text(json.dumps(config))
    assert load(best).arch.pattern.letters == "AFE"
