"""Generate text piece by piece: whole characters as soon as they are certain, in memory constant in the length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybridnas.arch.model import HybridLM
from hybridnas.data.tokenizers import StreamDecoder, Tokenizer
from hybridnas.errors import ExportError


def stream_text(
    model: HybridLM,
    tokenizer: Tokenizer,
    prompt: str,
    write: Callable[[str], None],
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 40,
    top_p: float | None = None,
    eos_token_id: Sequence[int] = (),
    seed: int = 0,
    stop_at_end: bool = True,
) -> int:
    """Sample a continuation, hand each piece of text to ``write`` as soon as it is certain, return the tokens drawn.

    An empty prompt starts a new document. The text ends before the first token of ``eos_token_id``, and with
    ``stop_at_end`` where the model ends the document; ``top_k`` and ``top_p`` are those of :meth:`HybridLM.generate`.
    Raises ConfigError for a model that is not causal or settings out of range, ExportError for a foreign tokenizer.
    """
    check_tokenizer(model, tokenizer)
    decoder = StreamDecoder(tokenizer)
    ends = [*eos_token_id, *([tokenizer.separator] if stop_at_end else ())]
    drawn = 0

    def on_token(ids_B: Tensor) -> bool:
        nonlocal drawn
        token = int(ids_B[0])
        drawn += 1
        if token in ends:
            return True
        # A vocabulary rounded up to a round number has ids that stand for nothing.
        text = decoder.push(token) if token < tokenizer.vocab_size else decoder.finish() + "\ufffd"
        if text:
            write(text)
        return False

    ids = tokenizer.encode(prompt) or [tokenizer.separator]
    ids_BL = torch.tensor([ids], device=model.embedding.weight.device)
    model.generate(
        ids_BL,
        max_new_tokens,
        eos_token_id=ends or None,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        on_token=on_token,
    )
    rest = decoder.finish()
    if rest:
        write(rest)
    return drawn


def check_tokenizer(model: HybridLM, tokenizer: Tokenizer) -> None:
    """Raise ExportError when the tokenizer has ids that the model does not know."""
    if tokenizer.vocab_size > model.arch.vocab_size:
        raise ExportError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens but the model only vocab_size="
            f"{model.arch.vocab_size:,}; load the tokenizer that was exported with the model",
            field="tokenizer",
            got=tokenizer.vocab_size,
            allowed=f"<= {model.arch.vocab_size}",
        )
