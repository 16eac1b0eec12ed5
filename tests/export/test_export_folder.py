"""Exported folders: they reload to equal logits, hold nothing twice, and appear whole or not at all."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hybridnas.api import list_blocks
from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.data.tokenizers import ByteTokenizer, train_bpe
from hybridnas.errors import ExportError
from hybridnas.export import folder as folder_module
from hybridnas.export.folder import export
from hybridnas.export.layout import layer_types, plain, probe_ids
from hybridnas.export.load import load, load_tokenizer
from hybridnas.study.locks import FileLock

PATTERNS = {
    "all letters": ("MAFE", {}),
    "shared": ("M A@s F A@s E@x E@x", {}),
    "parallel": ("M[M,E][A,FF]", {}),
    "tied": ("(ME)x2", {"tie_embeddings": True, "final_norm": True}),
    "rmsnorm, gated, grouped": ("AFE", {"norm": "rmsnorm", "gated": True, "n_heads": 4, "n_kv_heads": 2}),
    "mixture with a shared expert": ("MEF", {"E": {"router": "top_k", "top_k": 2, "d_shared": 16}}),
    "expert choice": ("ME", {"router": "expert_choice"}),
    "options around blocks": (
        "A[M,F]A@sA@s",
        {"norm": "rmsnorm_zero", "norm_position": "sandwich", "canon": 3, "n_meta_tokens": 2, "final_softcap": 5.0},
    ),
    "slot arguments": ("M{d_state=4}E{n_experts=2}M", {}),
}


def small(pattern: str = "MEA", **fields: object) -> HybridLM:
    """A model whose every tensor was moved away from its first value, as training does."""
    experts = {"n_experts": 4, "d_expert": 24} if "E" in pattern and "E" not in fields else {}
    model = HybridLM(Arch.from_pattern(pattern, **{"d_model": 32, "vocab_size": 256, **experts, **fields}), seed=3)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    return model


@pytest.mark.parametrize("name", PATTERNS)
def test_a_model_reloads_to_equal_logits(name: str, tmp_path: Path) -> None:
    pattern, fields = PATTERNS[name]
    model = small(pattern, **fields)
    ids_BL = torch.randint(256, (3, 33), generator=torch.Generator().manual_seed(5))
    again = load(export(model, tmp_path / "best"), device="cpu")
    assert again.arch == model.arch
    assert again.arch.fingerprint() == model.arch.fingerprint()
    assert not again.training
    assert torch.equal(again(ids_BL).logits, model.eval()(ids_BL).logits)


def test_no_tensor_is_stored_twice_and_none_is_missing(tmp_path: Path) -> None:
    model = small("M A@s F A@s", tie_embeddings=True)
    path = export(model, tmp_path / "best") / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
        numbers = sum(file.get_tensor(name).numel() for name in names)
    assert numbers == sum(parameter.numel() for parameter in model.parameters())
    assert "embedding.weight" in names
    assert "head.weight" not in names
    assert not any(name.startswith("layers.3.branches") for name in names)


def test_shared_and_tied_weights_are_one_tensor_after_loading(tmp_path: Path) -> None:
    again = load(export(small("M A@s F A@s", tie_embeddings=True), tmp_path / "best"), device="cpu")
    assert again.head.weight is again.embedding.weight
    blocks = list(again.blocks())
    assert blocks[1] is blocks[3]
    assert len(list(again.parameters())) == len(list(small("M A@s F A@s", tie_embeddings=True).parameters()))


def test_attention_with_a_window_is_sliding_by_either_letter() -> None:
    arch = Arch.from_pattern("A{window=4}SA", d_model=16, vocab_size=32)
    assert layer_types(arch) == ["sliding_attention", "sliding_attention", "full_attention"]


def test_config_says_what_the_model_is(tmp_path: Path) -> None:
    model = small("(ME)x2[M,E]AF", n_heads=4)
    facts = {"valid_loss": 1.25, "tokens": 1000, "data": "stdlib", "diverged": float("nan"), "where": Path("a")}
    config = json.loads((export(model, tmp_path / "best", card=facts) / "config.json").read_text())
    cost = model.arch.cost(1024)
    assert config["model_type"] == "hybridnas"
    assert config["architectures"] == ["HybridNASForCausalLM"]
    assert config["format_version"] == 1
    assert config["fingerprint"] == model.arch.fingerprint()
    assert Arch.from_dict(config["arch"]) == model.arch
    assert config["hybrid_layer_pattern"] == "MEME[E,M]AF"  # the canonical order of branches
    linear, full = "linear_attention", "full_attention"
    assert config["hybrid_layer_types"] == [linear, "moe", linear, "moe", "hybrid", full, "mlp"]
    assert (config["vocab_size"], config["hidden_size"], config["num_hidden_layers"]) == (256, 32, 7)
    assert (config["num_experts"], config["num_experts_per_tok"], config["moe_intermediate_size"]) == (4, 1, 24)
    assert (config["num_attention_heads"], config["intermediate_size"]) == (4, 128)
    assert (config["dtype"], config["tie_word_embeddings"]) == ("float32", False)
    assert config["cost"]["params"] == cost.params
    assert config["cost"]["active_params"] == cost.active_params
    assert config["training"] == {
        "valid_loss": 1.25,
        "tokens": 1000,
        "data": "stdlib",
        "diverged": None,
        "where": "a",
    }


def test_the_model_card_has_the_facts(tmp_path: Path) -> None:
    model = small("(ME)x4")
    facts = {"study": "mine", "valid_loss": 1.23456, "data": "a|b\nc", "recipe": {"lr": 0.001}}
    card = (export(model, tmp_path / "best", tokenizer=ByteTokenizer(), card=facts) / "README.md").read_text()
    front = card.split("---")[1]
    assert "library_name: hybridnas" in front
    assert "- mamba\n" in front
    assert "- mixture-of-experts" in front
    assert "pipeline_tag: text-generation" in front
    assert "```mermaid" in card
    assert "`(ME)x4`" in card
    assert f"{model.arch.cost(1024).params:,}" in card
    assert "| validation loss [nats per token] | 1.23456 |" in card
    assert "| data | a\\|b c |" in card
    assert '| recipe | `{"lr": 0.001}` |' in card
    assert 'hybridnas.load("best")' in card
    assert 'python -m hybridnas.generate model=best prompt="def "' in card


@pytest.mark.slow
def test_the_python_of_the_model_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = export(small("MF"), tmp_path / "best", tokenizer=ByteTokenizer())
    code = (target / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.print", (printed := []).append)
    exec(compile(code.replace("200", "5"), "README.md", "exec"), {})
    assert printed[0].startswith("def ")


def test_a_card_promises_no_generation_without_tokenizer_or_causality(tmp_path: Path) -> None:
    bare = (export(small("MF"), tmp_path / "a") / "README.md").read_text()
    assert "hybridnas.generate" not in bare
    assert "takes and gives token ids" in bare
    choice = small("ME", router="expert_choice")
    card = (export(choice, tmp_path / "b", tokenizer=ByteTokenizer()) / "README.md").read_text()
    assert "cannot generate text" in card
    assert "pipeline_tag" not in card


def test_the_tokenizer_travels_with_the_model(tmp_path: Path) -> None:
    text = "def f(x):\n    return 'ä€😀'\n"
    export(small(), tmp_path / "bytes", tokenizer=ByteTokenizer())
    again = load_tokenizer(tmp_path / "bytes")
    assert again.decode(again.encode(text)) == text
    assert again.fingerprint == ByteTokenizer().fingerprint
    bpe = train_bpe([text * 20], 280)
    export(small("MF", vocab_size=bpe.vocab_size), tmp_path / "bpe", tokenizer=bpe)
    assert load_tokenizer(tmp_path / "bpe").encode(text) == bpe.encode(text)
    assert load_tokenizer(tmp_path / "bpe").separator == bpe.separator
    export(small(), tmp_path / "none")
    with pytest.raises(ExportError, match=r"none has no tokenizer.json: .* exported without its data source"):
        load_tokenizer(tmp_path / "none")


@pytest.mark.slow
def test_a_moved_folder_loads_in_a_fresh_process_with_nothing_else(tmp_path: Path) -> None:
    model = small("ME@s[A,E@s]")
    export(model, tmp_path / "here", tokenizer=ByteTokenizer())
    moved = Path(shutil.move(tmp_path / "here", tmp_path / "elsewhere é"))
    code = (
        "import sys, torch, hybridnas\n"
        "from hybridnas.export.layout import probe_ids\n"
        "model = hybridnas.load(sys.argv[1], device='cpu')\n"
        "print(model(probe_ids(256)).logits.double().sum().item())"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(moved)], cwd=empty, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == model.eval()(probe_ids(256)).logits.double().sum().item()


def test_bfloat16_weights_keep_their_dtype(tmp_path: Path) -> None:
    model = small("MAFNE").bfloat16()
    target = export(model, tmp_path / "best")
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    again = load(target, device="cpu")
    assert {name: p.dtype for name, p in again.named_parameters()} == {
        name: p.dtype for name, p in model.named_parameters()
    }
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16, torch.float32}


def test_a_folder_whose_float32_parameters_were_stored_narrower_loads_wide(tmp_path: Path) -> None:
    model = small("MN")
    for block in model.blocks():
        for name in block.float32:
            if name in dict(block.named_parameters()):
                block.get_parameter(name).data = block.get_parameter(name).data.bfloat16()
    target = export(model, tmp_path / "best", check=False)
    assert {p.dtype for p in load(target, device="cpu").parameters()} == {torch.float32}


def test_transformers_reads_the_tokenizer_of_a_folder_with_any_letter(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = "def f(x):\n    return x\n"
    bpe = train_bpe([text * 20], 280)
    letters = "".join(list_blocks())
    target = export(small(letters, vocab_size=bpe.vocab_size), tmp_path / "best", tokenizer=bpe)
    assert transformers.AutoTokenizer.from_pretrained(target).encode(text) == bpe.encode(text)


def test_exporting_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = small().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, tmp_path / "best")
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_later_export_replaces_an_earlier_one_and_keeps_what_is_not_ours(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "best"
    export(small("MF"), target, tokenizer=ByteTokenizer())
    (target / ".git").mkdir()
    (target / ".git" / "HEAD").write_text("ref")
    (target / "notes.txt").write_text("mine")
    export(small("AE"), target)
    assert load(target, device="cpu").arch.pattern.letters == "AE"
    assert not (target / "tokenizer.json").exists()
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / ".git" / "HEAD").read_text() == "ref"
    assert [path.name for path in target.parent.iterdir()] == ["best"]


def test_all_files_have_the_mode_that_the_user_wants_for_files(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("x")
    target = export(small("MF"), tmp_path / "best", tokenizer=ByteTokenizer())
    assert {path.stat().st_mode for path in target.iterdir()} == {(tmp_path / "other").stat().st_mode}


def test_an_export_of_a_newer_format_may_be_replaced(tmp_path: Path) -> None:
    target = export(small("MF"), tmp_path / "best")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    export(small("AE"), target)
    assert load(target, device="cpu").arch.pattern.letters == "AE"


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("cat")
    with pytest.raises(ExportError, match=r"photos is not ours: .*has no config.json.*; give an empty or a new folder"):
        export(small(), tmp_path / "photos")
    (tmp_path / "photos" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ExportError, match=r"photos is not ours: .*model_type is 'llama'"):
        export(small(), tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.txt").read_text() == "cat"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="file is a file; give a folder"):
        export(small(), tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert export(small(), tmp_path / "empty") == tmp_path / "empty"


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_the_earlier_export_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = export(small("MF"), tmp_path / "best")
    before = _contents(target)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module, "save_file", full)
    with pytest.raises(ExportError, match=r"best \(No space left on device\); the earlier export there is untouched"):
        export(small("AE"), target)
    with pytest.raises(ExportError, match=r"new \(No space left on device\); free space there"):
        export(small("AE"), tmp_path / "new")
    assert _contents(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_an_interrupted_export_leaves_the_earlier_one_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = export(small("MF"), tmp_path / "best")
    before = _contents(target)

    def interrupted(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module, "model_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(small("AE"), target)
    assert _contents(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_what_a_killed_export_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    target = export(small("MF"), tmp_path / "best")
    target.rename(tmp_path / ".best.old")  # killed between the two renames
    host = folder_module.socket.gethostname()
    (tmp_path / f".best.{host}.12345.partial").mkdir()
    (tmp_path / ".best.lock").touch()
    of_another_host = tmp_path / ".best.elsewhere.12345.partial"
    of_another_host.mkdir()
    (tmp_path / ".best.old" / "notes.txt").write_text("mine")
    export(small("AE"), target)
    assert load(target, device="cpu").arch.pattern.letters == "AE"
    assert (target / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"best", of_another_host.name}


def test_two_exports_to_one_folder_wait_for_each_other(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / ".best.lock")
    assert lock.acquire()
    working = tmp_path / f".best.{folder_module.socket.gethostname()}.12345.partial"
    working.mkdir()
    other = threading.Thread(target=export, args=(small("MF"), tmp_path / "best"))
    other.start()
    other.join(timeout=0.5)
    assert other.is_alive()
    assert working.is_dir()
    working.rename(tmp_path / "best")
    lock.release()
    other.join()
    assert load(tmp_path / "best", device="cpu").arch.pattern.letters == "MF"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_logits_that_do_not_come_back_are_not_exported(tmp_path: Path) -> None:
    model = small("MF")
    block = next(iter(model.blocks()))
    block.register_forward_hook(lambda module, args, output: output._replace(y_BLD=output.y_BLD * 1.5))
    with pytest.raises(ExportError, match=r"logits differ from the trained one's by up to \d.*pattern 'MF'"):
        export(model, tmp_path / "best")
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_model_is_not_exported(tmp_path: Path) -> None:
    model = small("MF")
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(ExportError, match="logits are not finite"):
        export(model, tmp_path / "best")


def test_facts_become_plain_json() -> None:
    facts = {"a": (1, 2.5, None), 3: {"b": torch.tensor(1.5)}, "c": float("inf"), "d": True, "e": Path("x")}
    assert plain(facts) == {"a": [1, 2.5, None], "3": {"b": 1.5}, "c": None, "d": True, "e": "x"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, hybridnas.export; print({'torch', 'safetensors', 'tokenizers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
