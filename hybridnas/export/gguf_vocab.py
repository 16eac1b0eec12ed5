"""vocabulary(tokenizer, size): a tokenizer as the keys ``tokenizer.ggml.*`` of a GGUF file.

llama.cpp has byte-level BPE under the name ``gpt2``, and a fixed list of ways to split text before the merges, each
under a name of its own. Tokenizers that are split in another way, or not byte-level, have no vocabulary there.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from hybridnas.data.tokenizers import END_OF_TEXT, ByteTokenizer, byte_symbols

if TYPE_CHECKING:
    from hybridnas.data.tokenizers import Tokenizer

_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5  # gguf.TokenType
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# How text is split -> the name of it, and whether a whole word that is a token is taken without merges.
_SPLITS = {
    rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}": ("llama-bpe", True),
    rf"{_SHORT}|{_LETTERS}|\p{{N}}|{_REST}": ("qwen2", False),
}
_BY_LEVEL = ("gpt-2", False)


class Vocabulary(NamedTuple):
    """Keys of the file, and why they hold no vocabulary, or empty."""

    fields: dict[str, Any]
    reason: str = ""


def vocabulary(tokenizer: Tokenizer | None, size: int) -> Vocabulary:
    """Return the keys for a model of ``size`` tokens; ``no_vocab`` and the reason where llama.cpp has no such kind."""
    if tokenizer is None:
        return _none("the model has no tokenizer")
    stored = json.loads(tokenizer.to_json())
    model = stored["model"]
    if model["type"] != "BPE" or (stored.get("decoder") or {}).get("type") != "ByteLevel":
        return _none(f"its tokenizer is a {model['type']} that is not byte-level BPE")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    split = _split(stored, merged=bool(merges))
    if split is None or (merges and split[1] != bool(model.get("ignore_merges"))):
        return _none("llama.cpp has no name for the way in which its tokenizer splits text")
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [_UNUSED] * size
    for text, number in model["vocab"].items():
        tokens[number], types[number] = text, _NORMAL
    for added in stored.get("added_tokens") or ():
        tokens[added["id"]], types[added["id"]] = added["content"], _CONTROL if added["special"] else _USER
    if isinstance(tokenizer, ByteTokenizer):  # no text holds this byte, whose symbol is a letter
        tokens[tokenizer.separator] = END_OF_TEXT
    types[tokenizer.separator] = _CONTROL
    never = " ".join([tokens[tokenizer.separator]] * 2)  # llama.cpp asks for a merge
    return Vocabulary(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": split[0],
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": merges or [never],
            "tokenizer.ggml.bos_token_id": tokenizer.separator,
            "tokenizer.ggml.eos_token_id": tokenizer.separator,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.add_eos_token": False,
        }
    )


def _none(reason: str) -> Vocabulary:
    return Vocabulary({"tokenizer.ggml.model": "no_vocab"}, reason)


def _split(stored: dict[str, Any], *, merged: bool) -> tuple[str, bool] | None:
    """Return llama.cpp's name of how text is cut into words, and whether whole words come before merges."""
    steps = stored.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if stored.get("normalizer") is not None or kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if not merged and set(stored["model"]["vocab"]) <= set(byte_symbols()):
        return _BY_LEVEL  # one token a byte, however text is split
    if kinds == ["ByteLevel"]:
        return _BY_LEVEL if steps[0]["use_regex"] else None
    if kinds != ["Split", "ByteLevel"] or steps[1]["use_regex"]:
        return None
    plain = steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]
    return _SPLITS.get(steps[0]["pattern"].get("Regex", "")) if plain else None
