"""save_pretrained, from_pretrained and push_to_hub: the contract of huggingface_hub's mixin, without a network."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled

import hybridnas
from hybridnas.arch.model import HybridLM
from hybridnas.data.tokenizers import ByteTokenizer
from hybridnas.errors import ExportError
from hybridnas.export.layout import probe_ids
from hybridnas.export.load import load_tokenizer


@pytest.fixture
def model() -> HybridLM:
    return hybridnas.build("MEA", d_model=16, vocab_size=256, n_experts=2, d_expert=8, seed=3)


def logits(model: HybridLM) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(probe_ids(256)).logits
    return found


def test_a_saved_model_comes_back_by_each_name(model: HybridLM, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path / "best", tokenizer=ByteTokenizer(), card={"valid_loss": 1.5})
    assert folder == tmp_path / "best"
    for again in (HybridLM.from_pretrained(folder), hybridnas.load(str(folder)), hybridnas.build(folder)):
        assert again.arch == model.arch
        assert torch.equal(logits(again), logits(model))
        assert not again.training
    assert json.loads((folder / "config.json").read_text())["training"] == {"valid_loss": 1.5}


def test_the_files_are_those_that_the_mixin_reads(model: HybridLM, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path / "best")
    names = {huggingface_hub.constants.CONFIG_NAME, huggingface_hub.constants.SAFETENSORS_SINGLE_FILE, "README.md"}
    assert names <= {path.name for path in folder.iterdir()}
    assert huggingface_hub.ModelCard.load(folder / "README.md").data.library_name == "hybridnas"


def test_a_pushed_model_comes_back_from_its_repository(
    model: HybridLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def create(self: object, *, repo_id: str, private: bool | None, exist_ok: bool) -> huggingface_hub.RepoUrl:
        asked["private"] = private
        assert exist_ok
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

    def upload(self: object, *, repo_id: str, folder_path: Path, **settings: object) -> str:
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
        asked.update(settings)
        return f"commit of {repo_id}"

    def download(repo_id: str, *, allow_patterns: list[str], revision: str | None = None, **_: object) -> str:
        asked.update(downloaded=repo_id, at=revision)
        return str(tmp_path / "hub" / repo_id)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    url = model.push_to_hub("best", private=True, commit_message="first", branch="dev", tokenizer=ByteTokenizer())
    assert url == "commit of me/best"
    assert (asked["private"], asked["commit_message"], asked["revision"]) == (True, "first", "dev")
    assert 'hybridnas.load("me/best")' in (tmp_path / "hub" / "me" / "best" / "README.md").read_text()
    again = HybridLM.from_pretrained("me/best", revision="dev")
    assert (asked["downloaded"], asked["at"]) == ("me/best", "dev")
    assert torch.equal(logits(again), logits(model))
    assert load_tokenizer("me/best").kind == "bytes"
    model.save_pretrained(tmp_path / "second", push_to_hub=True)
    assert (tmp_path / "hub" / "me" / "second" / "config.json").is_file()


def test_a_repository_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OfflineModeIsEnabled("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ExportError) as caught:
        HybridLM.from_pretrained("nobody/nothing")
    assert (caught.value.field, caught.value.got) == ("folder", "nobody/nothing")
    for local in ("runs/a/best", "./nothing", "nothing"):
        with pytest.raises(ExportError, match="is not a folder"):
            HybridLM.from_pretrained(local)
