"""Recall on text: the places at which a window says again what it has said before.

Zoology (arXiv 2312.04927, section 3) splits the loss of language models by whether the last two tokens have stood
together earlier in the context, since most of what attention gains over gated convolutions lies at these places. Here
the string that comes again is about eight bytes longer than its last token, whatever the tokenizer: at fewer bytes most
places count, by chance. Shapes: B batch, L length.
"""

from __future__ import annotations

import torch
from torch import Tensor

CONTEXT_BYTES = 8  # that stand before a token which is counted
_FACTOR = 6364136223846793005  # odd; of Knuth's MMIX generator


def context_tokens(bytes_per_token: float) -> int:
    """Return how many tokens stand for the bytes before a place, at least one."""
    return max(1, round(CONTEXT_BYTES / bytes_per_token)) if bytes_per_token > 0 else CONTEXT_BYTES


def repeated(inputs_BL: Tensor, targets_BL: Tensor, context: int, segments_BL: Tensor | None = None) -> Tensor:
    """Return (B, L), true where the target and the ``context`` inputs before it stood in the row before.

    ``segments_BL``: the document of each input; only what stood in the same document counts. Strings are compared by a
    hash of 64 bits.
    """
    rows, length = inputs_BL.shape
    found_BL = torch.zeros(rows, length, dtype=torch.bool, device=inputs_BL.device)
    if length <= context:
        return found_BL
    places = length - context + 1
    hash_BP = targets_BL[:, context - 1 :].long() + 1
    for back in range(context):
        start = context - 1 - back
        hash_BP = hash_BP * _FACTOR + inputs_BL[:, start : start + places].long() + 1
    if segments_BL is not None:  # that of a string's last input, its targets' document wherever a target counts
        hash_BP = hash_BP * _FACTOR + segments_BL[:, context - 1 :].long()
    ordered_BP, order_BP = torch.sort(hash_BP, dim=1, stable=True)
    again_BP = torch.zeros_like(ordered_BP, dtype=torch.bool)
    again_BP[:, 1:] = ordered_BP[:, 1:] == ordered_BP[:, :-1]
    found_BL[:, context - 1 :] = torch.zeros_like(again_BP).scatter(1, order_BP, again_BP)
    return found_BL
