"""Generation from an exported folder: streamed text, constant memory, and a command line that ends cleanly."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.cli import generate
from hybridnas.cli.generate import Settings, run
from hybridnas.data.tokenizers import ByteTokenizer, Tokenizer, train_bpe
from hybridnas.errors import ConfigError, ExportError
from hybridnas.export.folder import export
from hybridnas.export.load import load
from hybridnas.export.stream import stream_text


def small(pattern: str, **fields: object) -> HybridLM:
    experts = {"n_experts": 3, "d_expert": 16} if "E" in pattern else {}
    arch = Arch.from_pattern(pattern, **{"d_model": 16, "vocab_size": 256, "init_scale": 1.0, **experts, **fields})
    return HybridLM(arch, seed=2).eval()


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(small("MEAF"), tmp_path_factory.mktemp("model") / "best", tokenizer=ByteTokenizer())


def streamed(model: HybridLM, tokenizer: Tokenizer, prompt: str, **settings: object) -> str:
    pieces: list[str] = []
    stream_text(model, tokenizer, prompt, pieces.append, **settings)
    return "".join(pieces)


BPE = train_bpe(["def f(x):\n    return 'ä€😀' + x\n" * 20], 280)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_streamed_text_is_the_decoded_generation(tokenizer: Tokenizer) -> None:
    model = small("MEAF", vocab_size=tokenizer.vocab_size)
    ids = tokenizer.encode("def ä")
    whole = model.generate(torch.tensor([ids]), 48, temperature=1.0, top_k=50, seed=7)[0].tolist()[len(ids) :]
    settings = {"max_new_tokens": 48, "temperature": 1.0, "top_k": 50, "seed": 7}
    assert streamed(model, tokenizer, "def ä", stop_at_end=False, **settings) == tokenizer.decode(whole)
    ended = whole[: whole.index(tokenizer.separator)] if tokenizer.separator in whole else whole
    assert streamed(model, tokenizer, "def ä", stop_at_end=True, **settings) == tokenizer.decode(ended)


def test_text_comes_in_whole_characters_as_soon_as_they_are_whole() -> None:
    text = "aä€😀b"
    model = small("MF")
    wanted = iter(text.encode())
    pieces: list[str] = []
    model.generate = lambda ids_BL, n, on_token, **_: [on_token(torch.tensor([byte])) for byte in wanted]  # type: ignore[method-assign]
    stream_text(model, ByteTokenizer(), "", pieces.append)
    assert pieces == ["a", "ä", "€", "😀", "b"]


def test_generation_stops_where_the_document_ends() -> None:
    model = small("MF")
    pieces: list[str] = []

    def scripted(ids_BL: torch.Tensor, n: int, *, on_token: object, **_: object) -> None:
        assert ids_BL.tolist() == [[0]]  # an empty prompt is the start of a document
        assert callable(on_token)
        stops = [on_token(torch.tensor([byte])) for byte in b"ab\0"]
        assert stops == [False, False, True]

    model.generate = scripted  # type: ignore[method-assign,assignment]
    assert stream_text(model, ByteTokenizer(), "", pieces.append) == 3
    assert pieces == ["a", "b"]


def test_ids_beyond_the_tokenizer_are_shown_as_unknown() -> None:
    model = small("MF", vocab_size=300)
    ids = model.generate(torch.tensor([[0]]), 60, seed=1)[0].tolist()[1:]
    assert max(ids) >= 256
    text = streamed(model, ByteTokenizer(), "", max_new_tokens=60, temperature=1.0, top_k=None, seed=1)
    assert "\ufffd" in text


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    with pytest.raises(ExportError, match="tokenizer has 256 tokens but the model only vocab_size=32"):
        streamed(small("MF", vocab_size=32), ByteTokenizer(), "a")


@pytest.mark.parametrize("pattern", ["MEF", "M[M,E]F@s F@s"])
def test_the_state_of_recurrent_patterns_does_not_grow(pattern: str) -> None:
    model = small(pattern)
    state = model.init_state(1)
    sizes = set()
    for length in (1, 1, 40, 7, 1):
        ids_BL = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(length))
        state = model(ids_BL, state=state).state
        sizes.add(sum(tensor.numel() * tensor.element_size() for block in state for tensor in block))
    assert sizes == {model.arch.cost(1).state_bytes} == {model.arch.cost(10_000).state_bytes}


@pytest.mark.parametrize("pattern", ["MEF", "AF", "[M,A]EM@s M@s"])
def test_greedy_generation_equals_recomputation(pattern: str) -> None:
    model = small(pattern)
    ids_BL = torch.tensor([[5, 9, 200]])
    fast = model.generate(ids_BL, 12, temperature=0.0)
    slow = ids_BL
    with torch.no_grad():
        for _ in range(12):
            slow = torch.cat([slow, model(slow).logits[:, -1].argmax(-1)[:, None]], dim=1)
    assert torch.equal(fast, slow)


def settings(best: Path, **changes: object) -> Settings:
    usual = {"model": str(best), "prompt": "def ", "max_new_tokens": 12, "seed": 3, "device": "cpu"}
    return Settings.from_dict({**usual, **changes})


def test_the_command_prints_prompt_and_continuation(best: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(settings(best)).code == 0
    first = capsys.readouterr()
    assert first.out.startswith("def ")
    assert first.out.endswith("\n")
    assert first.err == ""
    assert run(settings(best)).code == 0
    assert capsys.readouterr().out == first.out
    assert run(settings(best, echo=False)).code == 0
    assert "def " + capsys.readouterr().out == first.out
    assert run(settings(best, seed=4)).code == 0
    assert capsys.readouterr().out != first.out
    assert run(settings(best, prompt="", max_new_tokens=0)).code == 0
    assert capsys.readouterr().out == "\n"


def test_the_prompt_may_come_from_standard_input(
    best: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x = {'a': \xff\n")))
    assert run(settings(best, prompt="-")).code == 0
    assert capsys.readouterr().out.startswith("x = {'a': \ufffd\n")


def test_a_terminal_is_spared_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, piped = io.StringIO(), io.StringIO()
    shown.isatty = lambda: True  # type: ignore[method-assign]
    for stream in (shown, piped):
        monkeypatch.setattr(sys, "stdout", stream)
        generate._write("a\x1b[2Jb\tc\n\x00é")
    assert shown.getvalue() == "a\ufffd[2Jb\tc\n\ufffdé"
    assert piped.getvalue() == "a\x1b[2Jb\tc\n\x00é"


def test_ctrl_c_ends_with_what_was_printed(
    best: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("hybridnas.export.stream.stream_text", interrupted)
    assert run(settings(best)).code == 130
    assert capsys.readouterr().out == "def \n"


def test_a_model_that_is_not_causal_says_so_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(small("ME", router="expert_choice"), tmp_path / "best", tokenizer=ByteTokenizer())
    with pytest.raises(ConfigError, match=r"layer 1 \(E moe\) is not causal.*cannot generate"):
        run(settings(tmp_path / "best"))
    assert capsys.readouterr().out == ""


def test_the_command_draws_as_the_model_does_with_the_same_settings(best: Path) -> None:
    model, tokenizer = load(best), ByteTokenizer()
    ids = tokenizer.encode("def ")
    drawn = {"temperature": 1.0, "top_p": 0.3, "seed": 3}
    whole = model.generate(torch.tensor([ids]), 12, **drawn)[0].tolist()[len(ids) :]
    plain = {**drawn, "top_k": None, "stop_at_end": False}
    assert run(settings(best, **plain)).found["text"] == tokenizer.decode(whole)
    assert run(settings(best, **{**plain, "top_p": None})).found["text"] != tokenizer.decode(whole)
    end = whole[5]
    ended = run(settings(best, **plain, eos_token_id=[end, 255])).found
    assert ended["text"] == tokenizer.decode(whole[: whole.index(end)])
    assert ended["tokens"] == whole.index(end) + 1


def test_an_end_token_that_the_model_does_not_have_is_named(best: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run(settings(best, eos_token_id=256))
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("eos_token_id", 256, "0 to 255")


@pytest.mark.parametrize(
    ("field", "got", "allowed"),
    [
        ("temperature", -1.0, ">= 0"),
        ("top_k", 0, ">= 1"),
        ("top_p", 1.5, "<= 1"),
        ("max_new_tokens", "many", "an integer"),
        ("seed", 2**63, "<= 9223372036854775807"),
        ("model", None, None),
    ],
)
def test_wrong_settings_are_named(best: Path, field: str, got: object, allowed: object) -> None:
    with pytest.raises(ConfigError) as caught:
        run(settings(best, **{field: got}))
    assert (caught.value.field, caught.value.got, caught.value.allowed) == (field, got, allowed)


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error(best: Path) -> None:
    command = (
        f'"{sys.executable}" -m hybridnas.generate model="{best}" prompt="def " max_new_tokens=3000 stop_at_end=false'
    )
    read, write = os.pipe()
    with subprocess.Popen(command, shell=True, stdout=write, stderr=subprocess.PIPE, text=True) as process:
        os.close(write)
        assert os.read(read, 4) == b"def "
        os.close(read)
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 0
