"""Trainings that start from given weights: frozen parts, adapters, another tokenizer, the command."""

from pathlib import Path
from typing import Any

import pytest
import torch

import hybridnas
from hybridnas.cli.train import Settings, run
from hybridnas.data.tokenizers import ByteTokenizer, train_bpe
from hybridnas.errors import CheckpointError, ConfigError
from hybridnas.train.start import freeze, with_tokens

TINY: dict[str, Any] = {"tokens": 512, "batch_size": 4, "seq_len": 32, "valid_tokens": 128, "eval_at": (256,)}


def model(seed: int = 1, **fields: Any) -> hybridnas.HybridLM:
    return hybridnas.build("MA", **{"d_model": 16, "vocab_size": 256, "seed": seed, **fields})


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def text(corpus: Path) -> dict[str, Any]:
    return {"kind": "text", "path": str(corpus)}


def test_frozen_parameters_stay_and_all_others_move(corpus: Path, tmp_path: Path) -> None:
    trained, before = model(), weights(model())
    result = hybridnas.fit(trained, text(corpus), freeze=["embedding.*", "layers.0.*"], **TINY)
    for name, tensor in weights(result.model).items():
        assert torch.equal(tensor, before[name]) == name.startswith(("embedding.", "layers.0.")), name
    with pytest.raises(ConfigError) as error:
        freeze(trained, ["layers.9.*"])
    assert (error.value.field, error.value.got) == ("freeze", "layers.9.*")
    with pytest.raises(ConfigError) as error:
        hybridnas.fit(model(), text(corpus), freeze=["*"], folder=tmp_path / "run", **TINY)
    assert (error.value.field, error.value.got) == ("freeze", ["*"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError) as error:
        hybridnas.fit(trained.arch, text(corpus), freeze=["embedding.*"], **TINY)
    assert error.value.field == "freeze"


def test_adapters_end_up_in_the_weights_and_go_on_where_they_stopped(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    before = weights(model())
    lora = {"rank": 2, "layers": ["*.in_proj"]}
    whole = hybridnas.fit(model(), text(corpus), lora=lora, **TINY)
    changed = {name for name, tensor in weights(whole.model).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith("in_proj.weight")} != set()

    started = model()
    part = hybridnas.fit(started, text(corpus), lora=lora, folder=tmp_path, max_seconds=0, **TINY)
    assert part.status == "stopped"
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(started).items())
    assert all(parameter.requires_grad for parameter in started.parameters())
    for _ in range(2):  # to the end, and read back
        rest = hybridnas.fit(model(), text(corpus), lora=lora, folder=tmp_path, **TINY)
        assert rest.status == "completed"
        assert weights(rest.model).keys() == before.keys()
        assert all(torch.equal(tensor, weights(whole.model)[name]) for name, tensor in weights(rest.model).items())
    with pytest.raises(CheckpointError) as error:
        hybridnas.fit(model(), text(corpus), folder=tmp_path, **TINY)
    assert error.value.field == "folder"
    with pytest.raises(ConfigError) as error:
        hybridnas.fit(model(), text(corpus), lora={"layers": ["nothing"]}, **TINY)
    assert error.value.field == "lora.layers"


@torch.no_grad()
def test_tokens_that_both_tokenizers_have_keep_their_rows() -> None:
    old, new = ByteTokenizer(), train_bpe(["abcabcabc " * 20], 260)
    given = model()
    found, kept = with_tokens(given, old, new, new.vocab_size, seed=3)
    assert kept == 256  # 255 bytes and the separator; byte 0 is no text
    for text_, token in (("a", new.encode("a")[0]), (" ", new.encode(" ")[0])):
        assert torch.equal(found.embedding.weight[token], given.embedding.weight[ord(text_)])
        assert torch.equal(found.head.weight[token], given.head.weight[ord(text_)])
    assert torch.equal(found.embedding.weight[new.separator], given.embedding.weight[old.separator])
    merged = new.encode("abc")[-1]
    assert merged >= 257 and bool(found.embedding.weight[merged].any())
    rest = {name: tensor for name, tensor in weights(found).items() if name not in ("embedding.weight", "head.weight")}
    assert all(torch.equal(tensor, weights(given)[name]) for name, tensor in rest.items())
    tied, kept = with_tokens(model(tie_embeddings=True), None, None, 40)
    assert kept == 0 and tied.head.weight is tied.embedding.weight and tied.arch.vocab_size == 40


def settings(corpus: Path, tmp_path: Path, **changes: Any) -> Settings:
    usual = {
        "data": text(corpus),
        "train": dict(TINY),
        "out": str(tmp_path / "run"),
        "tracking": "off",
        "device": "cpu",
    }
    return Settings.from_dict({**usual, **changes})


def test_the_command_goes_on_from_a_folder(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model().save_pretrained(tmp_path / "model", tokenizer=ByteTokenizer())
    done = run(settings(corpus, tmp_path, model=str(folder), freeze=["embedding.*"]))
    trained = hybridnas.load(done.found["model"])
    assert torch.equal(trained.embedding.weight, model().embedding.weight)
    assert not torch.equal(trained.head.weight, model().head.weight)
    assert done.found["status"] == "completed"
    other = model(seed=2).save_pretrained(tmp_path / "other", tokenizer=ByteTokenizer())
    with pytest.raises(CheckpointError):  # other weights are another run
        run(settings(corpus, tmp_path, model=str(other), freeze=["embedding.*"]))
    capsys.readouterr()
    data = {**text(corpus), "tokenizer": "bpe", "vocab_size": 300}
    done = run(settings(corpus, tmp_path, model=str(folder), tokenizer="data", data=data, out=str(tmp_path / "new")))
    assert hybridnas.load(done.found["model"]).arch.vocab_size == 300
    assert "256 stand for tokens that the model knows and are kept, 44 are drawn anew" in capsys.readouterr().out


def test_a_folder_of_transformers_is_gone_on_from(corpus: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=256)).save_pretrained(tmp_path / "llama")
    done = run(settings(corpus, tmp_path, model=str(tmp_path / "llama")))
    assert done.found["status"] == "completed" and hybridnas.load(done.found["model"]).arch.pattern.letters == "AF"


@pytest.mark.parametrize(
    ("field", "given"),
    [("preset", {"model": "m", "preset": {"name": "mamba"}}), ("freeze", {"pattern": "M", "freeze": ["a"]})],
)
def test_settings_that_contradict_each_other_are_refused(
    field: str, given: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        run(settings(corpus, tmp_path, **given))
    assert error.value.field == field
