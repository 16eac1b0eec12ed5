"""Mixers before Mamba, each with dense feed-forward layers in turn: baselines without selection, or without a scan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hybridnas.arch.presets import GPT2_VOCAB, register_preset, repeated

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


def _in_turn(letter: str, d_model: int, n_blocks: int, d_ff: int | None, vocab_size: int, **own: Any) -> Arch:
    sizes = {"d_model": d_model, "vocab_size": vocab_size, "d_ff": d_ff or 4 * d_model}
    return repeated(f"{letter}F", n_blocks, **sizes, **{letter: own})


@register_preset()
def s4d_mlp(*, d_model: int = 512, n_blocks: int = 8, d_ff: int | None = None, vocab_size: int = GPT2_VOCAB) -> Arch:
    """S4D and dense feed-forward in turn: nothing depends on the input."""
    return _in_turn("D", d_model, n_blocks, d_ff, vocab_size)


@register_preset()
def gru_mlp(*, d_model: int = 512, n_blocks: int = 8, d_ff: int | None = None, vocab_size: int = GPT2_VOCAB) -> Arch:
    """GRU and dense feed-forward in turn."""
    return _in_turn("U", d_model, n_blocks, d_ff, vocab_size, kind="gru")


@register_preset()
def lstm_mlp(*, d_model: int = 512, n_blocks: int = 8, d_ff: int | None = None, vocab_size: int = GPT2_VOCAB) -> Arch:
    """LSTM and dense feed-forward in turn."""
    return _in_turn("U", d_model, n_blocks, d_ff, vocab_size, kind="lstm")
