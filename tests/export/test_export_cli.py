"""The commands export and evaluate on a small study: which trial is taken, what it says, and what it refuses."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.cli import evaluate, export
from hybridnas.data import open_source, source_config
from hybridnas.data.tokenizers import train_bpe
from hybridnas.errors import ConfigError, ExportError, StudyError
from hybridnas.export import folder as export_folder
from hybridnas.export.load import load, load_tokenizer
from hybridnas.export.trials import data_words
from hybridnas.search.config import Budget
from hybridnas.study.records import TrialRecord, write_record
from hybridnas.train import checkpoint
from hybridnas.train.evaluate import evaluate as measure
from hybridnas.train.records import write_json


def weights_of(trial: int) -> HybridLM:
    return HybridLM(Arch.from_pattern("MF" if trial % 2 else "AF", d_model=16, vocab_size=256), seed=trial)


@pytest.fixture
def text(tmp_path: Path) -> dict[str, Any]:
    """Data of the user's own: sixty documents, so that some are held out."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(60):
        (folder / f"{index}.txt").write_text(f"Document {index} says that {index} is {index}. " * 40)
    return {"kind": "text", "path": str(folder), "cache_dir": str(tmp_path / "cache"), "valid_fraction": 0.2}


@pytest.fixture
def study(tmp_path: Path, text: dict[str, Any]) -> Path:
    """Trials 0 to 5: two complete (1 better), pruned, failed, a duplicate of 1, and one whose weights are gone."""
    folder = tmp_path / "runs" / "mine"
    budget = {
        k: v for k, v in Budget(d_model=16, depth=2).to_dict().items() if k not in ("n_trials", "minutes", "name")
    }
    identity = {"space": {"name": "mamba_moe"}, "data": text, "budget": budget, "seed": 0}
    identity |= {"sampler": "tpe", "pruner": "hyperband"}
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps({"format": 1, "study": "mine", "identity": identity}))
    losses = {
        0: ("COMPLETE", 2.5),
        1: ("COMPLETE", 2.25),
        2: ("PRUNED", 2.0),
        3: ("FAIL", None),
        4: ("DUPLICATE", 2.25),
    }
    for number, (state, loss) in {**losses, 5: ("COMPLETE", 2.75)}.items():
        model = weights_of(number)
        place = folder / "trials" / f"{number:04d}"
        place.mkdir(parents=True)
        record = TrialRecord(
            number=number,
            state=state,
            pattern=str(model.arch.pattern),
            fingerprint=model.arch.fingerprint(),
            valid_loss=loss,
            tokens=4096,
            cost={"active_params": 2048},
            duplicate_of=1 if state == "DUPLICATE" else None,
            reason="loss is not finite" if state == "FAIL" else None,
        )
        write_record(place, record)
        if number < 3:
            write_json(place / "run.json", {"format": 1})
            header = {"architecture": model.arch.to_dict(), "progress": {"step": 1}}
            checkpoint.save(place, header, checkpoint.model_tensors(model), {})
    return folder


def settings(folder: Path, /, **changes: Any) -> export.Settings:
    usual = {"study": "mine", "out": str(folder.parent / "out"), "trial": None, "runs": str(folder.parent)}
    return export.Settings.from_dict({**usual, **changes})


def same(model: HybridLM, trial: int) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), weights_of(trial).parameters(), strict=True))


def test_the_best_completed_trial_is_exported(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.run(settings(study)).code == 0
    out = study.parent / "out"
    assert same(load(out, device="cpu"), 1)
    assert load_tokenizer(out).decode([104, 105]) == "hi"
    printed = capsys.readouterr().out
    assert "trial 1, MF, loss 2.2500: reloaded with equal logits" in printed
    assert f"model:  {out}" in printed
    facts = json.loads((out / "config.json").read_text())["training"]
    assert facts["study"] == "mine"
    assert facts["trial"] == 1
    assert facts["space"] == "mamba_moe"
    assert facts["data"] == "text texts"
    assert facts["valid_loss"] == 2.25
    assert facts["tokens_per_active_param"] == 2.0
    assert facts["seq_len"] == 256
    assert str(study.parent) not in (out / "README.md").read_text()


def test_a_trial_is_exported_by_number_and_a_duplicate_as_its_original(study: Path) -> None:
    export.run(settings(study, trial=2))
    assert same(load(study.parent / "out", device="cpu"), 2)
    export.run(settings(study, trial=4, study=str(study)))
    assert same(load(study.parent / "out", device="cpu"), 1)


def test_a_trial_without_weights_says_how_to_get_them(study: Path) -> None:
    with pytest.raises(StudyError, match=r"hybridnas.replay study=mine runs=\S+ trial=5") as caught:
        export.run(settings(study, trial=5))
    assert (caught.value.field, caught.value.got) == ("trial", 5)


def test_the_exported_winner_serves_when_its_checkpoint_is_gone(study: Path) -> None:
    export.run(settings(study, out=str(study / "best")))
    for path in (study / "trials" / "0001").glob("checkpoint*"):
        path.unlink()
    export.run(settings(study))
    assert same(load(study.parent / "out", device="cpu"), 1)


def test_trials_that_cannot_be_exported_are_refused(study: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError) as caught:
        export.run(settings(study, trial=9))
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("trial", 9, (0, 1, 2, 3, 4, 5))
    with pytest.raises(StudyError, match=r"FAIL, loss is not finite"):
        export.run(settings(study, trial=3))
    with pytest.raises(StudyError, match=r"no study in .*yours; studies there: mine"):
        export.run(settings(study, study="yours"))
    with pytest.raises(ConfigError, match=r"export needs study=NAME and out=DIR"):
        export.run(settings(study, out=None))
    with pytest.raises(ExportError, match=r"mine is not ours"):
        export.run(settings(study, out=str(study)))
    for number in (0, 1, 5):
        (study / "trials" / f"{number:04d}" / "result.json").unlink()
    with pytest.raises(StudyError) as caught:
        export.run(settings(study))
    assert caught.value.field == "best"


def test_a_study_exports_from_python_what_the_command_exports(study: Path) -> None:
    from hybridnas.studies import load_study

    folder = load_study(study).export(study.parent / "python")
    export.run(settings(study))
    assert load_tokenizer(folder).decode([104, 105]) == "hi"
    for name in ("config.json", "tokenizer_config.json"):
        assert (folder / name).read_text() == (study.parent / "out" / name).read_text()


def test_words_on_data_name_it_without_folders() -> None:
    assert data_words({"kind": "stdlib"}) == "stdlib"
    assert data_words({"kind": "hub", "name": "allenai/c4", "config": "en"}) == "hub allenai/c4 en"
    assert data_words({"kind": "text", "path": ["/home/me/books/", "/home/me/x.txt"]}) == "text books x.txt"
    assert data_words({}) is None


Measured = Callable[..., dict[str, str]]


@pytest.fixture
def evaluated(text: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> Measured:
    def command(**config: Any) -> dict[str, str]:
        capsys.readouterr()
        defaults = {"seq_len": 64, "valid_tokens": 2048, "data": text, "arch": {}, "device": "cpu"}
        assert evaluate.run(evaluate.Settings.from_dict({**defaults, **config})).code == 0
        lines = capsys.readouterr().out.splitlines()
        return {"news": "\n".join(lines), **dict(line.split("\t") for line in lines if "\t" in line)}

    return command


def test_an_exported_model_is_measured(study: Path, text: dict[str, Any], evaluated: Measured) -> None:
    export.run(settings(study))
    got = evaluated(model=str(study.parent / "out"))
    source = open_source(source_config(text))
    wanted = measure(
        weights_of(1), source, n_tokens=2048, batch_size=16, seq_len=64, device=torch.device("cpu"), precision="float32"
    )
    assert got["loss [nats per token]"] == f"{wanted.loss:.4f}"
    assert wanted.bits_per_byte is not None
    assert got["bits per byte"] == f"{wanted.bits_per_byte:.4f}"
    assert got["accuracy"] == f"{wanted.accuracy:.4f}"
    assert got["tokens measured"] == f"{wanted.tokens:,}"
    assert got["loss recorded in training"] == "2.2500"
    assert "tokens/s on cpu" in got
    assert "untrained" not in got["news"]


def test_the_test_part_is_measured_when_it_is_asked_for(study: Path, text: dict[str, Any], evaluated: Measured) -> None:
    export.run(settings(study))
    got = evaluated(model=str(study.parent / "out"), part="test")
    source, how = open_source(source_config(text)), {"batch_size": 16, "seq_len": 64, "device": torch.device("cpu")}
    wanted = measure(weights_of(1), source, n_tokens=2048, precision="float32", part="test", **how)
    assert got["loss [nats per token]"] == f"{wanted.loss:.4f}"
    assert "loss recorded in training" not in got  # none was measured on this part


def test_data_is_read_in_the_models_own_tokens(tmp_path: Path, text: dict[str, Any], evaluated: Measured) -> None:
    bpe = train_bpe(["Document 7 says that 7 is 7. " * 50], 280)
    arch = Arch.from_pattern("F", d_model=16, vocab_size=bpe.vocab_size)
    folder = export_folder.export(HybridLM(arch), tmp_path / "bpe", tokenizer=bpe)
    got = evaluated(model=str(folder))
    assert "tokenizer bpe" in got["news"]
    assert float(got["bits per byte"]) < float(got["loss [nats per token]"]) / math.log(2) / 2
    assert "gives way to the model's own" in evaluated(model=str(folder), data={**text, "tokenizer": "bpe:300"})["news"]


def test_an_untrained_pattern_or_preset_says_that_it_is(evaluated: Measured) -> None:
    got = evaluated(pattern="MF", arch={"d_model": 16})
    assert "untrained: the weights are random (seed 0); a blind guess has loss 5.5452" in got["news"]
    preset = {"name": "mamba_mlp", "d_model": 16, "n_blocks": 1}
    assert "MF" in evaluated(preset=preset)["news"]


def test_evaluate_wants_one_model(tmp_path: Path, text: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="evaluate needs model=FOLDER"):
        evaluate.run(evaluate.Settings(data=text))
    with pytest.raises(ConfigError, match="not both"):
        evaluate.run(evaluate.Settings(data=text, model=tmp_path, pattern="MF"))
    with pytest.raises(ConfigError, match=r"evaluate seq_len=0 must be >= 1"):
        evaluate.Settings(data=text, seq_len=0)
