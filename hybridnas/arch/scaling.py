"""How a published recipe scales to another width and depth: sizes in the family's proportions, attention at its places.

All functions are exact at the released sizes: a ratio of 1 and the released depth give the released numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

STEP = 8  # widths are multiples of this [channels]


def width(released: int, ratio: float) -> int:
    """Return a width that follows d_model, in multiples of 8; ``ratio`` is d_model over the released d_model."""
    return released if ratio == 1 else max(STEP, STEP * round(released * ratio / STEP))


def attention_heads(heads: int, kv_heads: int, head_dim: int, ratio: float) -> dict[str, int]:
    """Return ``n_heads``, ``n_kv_heads`` and ``head_dim``: queries per key head stay, the number of heads follows.

    Heads become narrower where one group of them is already too wide, and all heads together are as wide, in units of
    d_model, as released.
    """
    groups = max(1, round(kv_heads * ratio))
    count = groups * (heads // kv_heads)
    return {"n_heads": count, "n_kv_heads": groups, "head_dim": width(head_dim, ratio * heads / count)}


def recurrent_heads(heads: int, head_dim: int, ratio: float, groups: int = 1) -> tuple[int, int, int]:
    """Return (heads, channels of a head, groups) of a recurrence: heads keep their width, their number follows d_model.

    Where not even one head for each group is left, heads become narrower. ``groups`` follow d_model too, at least one.
    """
    shared = max(1, round(groups * ratio))
    count = shared * max(1, round(heads * ratio / shared))
    return count, min(head_dim, width(head_dim, ratio * heads / count)), shared


def state_size(released: int, d_model: int) -> int:
    """Return the state of a channel: as released, at most a quarter of d_model, at least 16 [count].

    The families keep one state size over all their widths, from 768 on; below 4 * state it would outweigh the rest.
    """
    return min(released, max(16, STEP * (d_model // (4 * STEP))))


def routing(top_k: int, d_expert: int, n_experts: int, ratio: float) -> dict[str, int]:
    """Return ``n_experts``, ``top_k`` and ``d_expert`` for another number of experts and another width.

    A token sees at most a quarter of the experts, at least two (with one, a renormalized gate is constant), and never
    more than released; the experts that it sees are together as wide, in units of d_model, as released. Nothing for a
    model without experts (``top_k`` 0).
    """
    if not top_k:
        return {}
    chosen = min(top_k, n_experts, max(2, n_experts // 4))
    return {"n_experts": n_experts, "top_k": chosen, "d_expert": width(d_expert, ratio * top_k / chosen)}


def every(period: int, offset: int, n_blocks: int) -> tuple[int, ...]:
    """Return the layers ``i % period == offset``; the last layer alone where the model is too shallow for one."""
    found = tuple(range(offset, n_blocks, period))
    return found or (n_blocks - 1,)


def spread(released: Sequence[int], released_blocks: int, n_blocks: int) -> tuple[int, ...]:
    """Return the places of a few layers among ``n_blocks``: as many in proportion, at least one, as far apart.

    ``released`` are the places, from 0, among ``released_blocks`` layers; their relative depths are interpolated.
    """
    if n_blocks == released_blocks:
        return tuple(released)
    count = max(1, round(len(released) * n_blocks / released_blocks))
    found: list[int] = []
    for index in range(count):
        at = min(len(released) - 1.0, max(0.0, (index + 0.5) * len(released) / count - 0.5))
        below = int(at)
        above = min(below + 1, len(released) - 1)
        place = released[below] + (at - below) * (released[above] - released[below])
        last = found[-1] if found else -1
        found.append(max(last + 1, int((place + 0.5) * n_blocks / released_blocks)))
    return tuple(min(place, n_blocks - count + index) for index, place in enumerate(found))
