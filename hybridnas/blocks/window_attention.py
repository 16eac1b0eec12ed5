"""Attention with a sliding window, letter S: letter A with ``window`` set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridnas.blocks.attention import Attention
from hybridnas.config import option
from hybridnas.layers.block import Variant
from hybridnas.registry import register_block


@register_block("S", name="window_attention")
class WindowAttention(Attention):
    """Attention of which a query sees the latest ``window`` positions (Mistral, 2310.06825; Samba, 2406.07522).

    ``S{window=256}`` and ``A{window=256}`` are one function with one fingerprint. The default of 128 is gpt-oss's
    window; Samba and Griffin have 2048, Hymba 1024, LFM3 256.
    """

    same_as = "A"

    @dataclass(frozen=True, kw_only=True)
    class Config(Attention.Config):
        """Fields of the attention block, the window set."""

        window: int = option(128, "latest positions that a query sees, its own among them [tokens]", ge=1)

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        return [Variant(), Variant(fields={"n_heads": 4, "n_kv_heads": 2, "window": 6, "gate": "head"})]
