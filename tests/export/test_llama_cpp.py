"""A real llama.cpp, where llama-cpp-python is installed: the same tokens of text, the same logits, the same choices."""

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from hybridnas.data.tokenizers import ByteTokenizer, FastTokenizer, byte_symbols, train_bpe
from hybridnas.export import gguf_vocab
from hybridnas.export.gguf import export_gguf
from tests.export.test_gguf import CASES, built, multiplied

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install llama-cpp-python")

F32, CONTEXT, NEW = 0, 128, 64
TEXTS = (
    "def f(x):\n    return x + 1  # it's 1234567 \t\n\n  done",
    "Ā naïve café, 我想在apple工作1314151天 ------=======\r\n  \r\n\u00a0end \U0001f600 I'LL we'd",
    "x <|endoftext|> y",
    " ",
)


def loaded(path, **settings):
    return llama_cpp.Llama(str(path), verbose=False, n_ctx=CONTEXT, n_threads=1, n_threads_batch=1, **settings)


@pytest.mark.parametrize(
    "model",
    [*(lambda case=case: built(*case, vocab_size=260) for case in CASES), multiplied],
    ids=[*(f"{name}-{pattern}" for name, pattern in CASES), "falcon_h1-multiplied"],
)
def test_llama_cpp_takes_the_prompt_and_chooses_the_same_64_tokens(model, tmp_path):
    model = model().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    path, _, _ = export_gguf(model, tmp_path / "model.gguf", tokenizer=ByteTokenizer())
    llama = loaded(path, logits_all=True, type_k=F32, type_v=F32)
    ids = llama.tokenize(b"def f(", add_bos=True)
    assert ids == list(b"def f(")
    llama.eval(ids)
    for _ in range(NEW):
        ids.append(int(np.argmax(llama.scores[len(ids) - 1])))
        llama.eval(ids[-1:])
    assert ids == model.generate(torch.tensor([list(b"def f(")]), NEW, temperature=0)[0].tolist()
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(llama.scores[: len(ids)] - wanted).max() < 1e-3 * np.abs(wanted).max()


def split_bpe(pattern, *, ignore_merges):
    fast = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=byte_symbols(), show_progress=False
    )
    fast.train_from_iterator(TEXTS * 3, trainer=trainer)
    return FastTokenizer(fast, separator=0)


@pytest.mark.parametrize("which", ["bytes", "bpe", *(name for name, _ in gguf_vocab._SPLITS.values())])
def test_llama_cpp_reads_and_writes_text_as_the_tokenizer_does(which, tmp_path):
    if which == "bytes":
        tokenizer = ByteTokenizer()
    elif which == "bpe":
        tokenizer = train_bpe(TEXTS * 3, 400)
    else:
        pattern, ignore = next((p, i) for p, (name, i) in gguf_vocab._SPLITS.items() if name == which)
        tokenizer = split_bpe(pattern, ignore_merges=ignore)
    model = built("llama", "AF", vocab_size=tokenizer.vocab_size + 3)
    path, _, without = export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    assert without == ""
    llama = loaded(path, vocab_only=True)
    for text in TEXTS:
        ids = llama.tokenize(text.encode(), add_bos=True)
        assert ids == tokenizer.encode(text)
        assert b"".join(llama.detokenize([token]) for token in ids) == text.encode()
    assert llama.token_eos() == tokenizer.separator
    assert llama.tokenize(b"<|endoftext|>", add_bos=False, special=True) == [tokenizer.separator]
