"""HybridNASCache: the explicit state of a model, and how far each row has read, as a cache of transformers.

Shapes: B batch, L length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hybridnas.arch.model import HybridLM
from hybridnas.arch.padding import RowStates
from hybridnas.errors import ConfigError
from hybridnas.layers.block import State, map_state


class HybridNASCache(Cache):  # type: ignore[misc]
    """State of the rows of a batch after ``columns`` columns of ids, padding among them; empty when it is made.

    Beams are reordered and rows selected or repeated whatever the blocks are. Tokens can be taken back
    (:meth:`crop`) where every state holds one entry for each token: attention without a full window.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: RowStates | None = None
        self.columns = 0
        self._model: HybridLM | None = None
        self._read_B: Tensor | None = None  # tokens that each row has read
        self._position_B: Tensor | None = None  # position id of the last of them, where such were given

    def read(self, model: HybridLM, ids_BL: Tensor, real_BL: Tensor | None, position_BL: Tensor | None) -> Tensor:
        """Read the next columns and return what the head reads (B, L, D); ``real_BL`` as in RowStates.read.

        Raises ConfigError for positions that do not go on from the last ones.
        """
        if self.states is None:
            self.states, self._model = RowStates(model, ids_BL.shape[0]), model
            self._read_B = torch.zeros(ids_BL.shape[0], dtype=torch.int64, device=ids_BL.device)
        elif len(self) and self._rows != ids_BL.shape[0]:
            raise ConfigError(
                f"past_key_values hold {self._rows} rows and input_ids {ids_BL.shape[0]}; give one row of ids for each",
                field="past_key_values",
                got=ids_BL.shape[0],
                allowed=self._rows,
            )
        self._follow(ids_BL, real_BL, position_BL)
        x_BLD = self.states.read(model, ids_BL, real_BL)
        self.columns += ids_BL.shape[1]
        return x_BLD

    def _follow(self, ids_BL: Tensor, real_BL: Tensor | None, position_BL: Tensor | None) -> None:
        assert self._read_B is not None
        if real_BL is None:
            real_BL = torch.ones_like(ids_BL, dtype=torch.bool)
        count_BL = real_BL.cumsum(dim=1)
        if position_BL is None:
            self._position_B = None
        else:
            position_BL = position_BL.expand_as(ids_BL)
            first_B = (position_BL + 1 - count_BL).masked_fill(~real_BL, torch.iinfo(torch.int64).max).amin(dim=1)
            if self._position_B is not None:
                first_B = torch.where(real_BL.any(dim=1), self._position_B + 1, first_B)
            wanted_BL = first_B[:, None] + count_BL - 1
            if bool((position_BL != wanted_BL)[real_BL].any()):
                raise ConfigError(
                    "position_ids must rise by one from token to token of a row, and go on from those in "
                    "past_key_values, since states count positions themselves; leave them out, or read documents of "
                    "one row without past_key_values",
                    field="position_ids",
                    got=position_BL.tolist() if position_BL.numel() <= 64 else tuple(position_BL.shape),
                    allowed="consecutive numbers",
                )
            last_B = torch.where(real_BL.any(dim=1), first_B + count_BL[:, -1] - 1, -1)
            self._position_B = last_B if self._position_B is None else torch.where(last_B < 0, self._position_B, last_B)
        self._read_B = self._read_B + count_BL[:, -1]

    @property
    def _rows(self) -> int:
        return 0 if self._read_B is None else self._read_B.shape[0]

    def __len__(self) -> int:
        return 0 if self._model is None else len(list(self._model.blocks()))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns that were read, padding among them."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.columns + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.columns > 0

    @property
    def batch_size(self) -> int:
        return self._rows or -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.columns > 0

    @property
    def is_croppable(self) -> bool:
        return self._model is None or can_crop(self._model)

    def reset(self) -> None:
        """Forget everything that was read."""
        self.states = self._model = self._read_B = self._position_B = None
        self.columns = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row ``beam_idx[i]`` was."""
        if self.states is None or self._read_B is None:
            return
        indices_B = beam_idx.to(self._read_B.device)
        self.states.select(indices_B)
        self._read_B = self._read_B[indices_B]
        self._position_B = None if self._position_B is None else self._position_B[indices_B]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self._rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens of every row, which must not be padding.

        Raises ConfigError for a model with a state that cannot go back.
        """
        count = -tokens_to_remove
        if count <= 0 or self.states is None or self._model is None or self._read_B is None:
            return
        empty = self._model.init_state(1)
        meta = self._model.arch.model.n_meta_tokens
        groups = []
        for rows_R, state in self.states.groups:
            read = int(self._read_B[rows_R].max())
            if read < count:
                raise ConfigError(f"cannot take back {count} of {read} tokens", field="tokens_to_remove", got=count)
            groups.append(
                (rows_R, tuple(_cropped(s, e, read + meta, count) for s, e in zip(state, empty, strict=True)))
            )
        self.states.groups = groups
        self.columns -= count
        self._read_B = self._read_B - count
        self._position_B = None if self._position_B is None else self._position_B - count


def can_crop(model: HybridLM) -> bool:
    """Whether all states of a model hold one entry for each token, for ever."""
    if any(not node.config.causal or getattr(node.config, "window", None) for node in model.arch.nodes):
        return False
    sizes = [state.shape[1:].count(0) for states in model.init_state(1) for state in states]
    return not model.arch.model.n_meta_tokens and all(count == 1 for count in sizes)


def _cropped(state: State, empty: State, read: int, count: int) -> State:
    def shorter(tensor: Tensor, start: Tensor) -> Tensor:
        axes = [axis for axis in range(1, tensor.ndim) if tensor.shape[axis] != start.shape[axis]]
        if len(axes) != 1 or tensor.shape[axes[0]] != read:
            raise ConfigError(
                "past_key_values cannot go back: a recurrent block, or attention over a window, keeps no state of "
                "earlier tokens; decode without an assistant, or read the shorter text again",
                field="tokens_to_remove",
                got=count,
                allowed=0,
            )
        return tensor.narrow(axes[0], 0, read - count)

    return map_state(shorter, state, empty)


def given_cache(given: Any) -> HybridNASCache | None:
    """Return the cache, None for none; raises ConfigError for one of another kind."""
    if given is None or isinstance(given, HybridNASCache):
        return given
    raise ConfigError(
        f"past_key_values is a {type(given).__name__}, but the states of these models are no keys and values; "
        "give hybridnas.hf.HybridNASCache(), or nothing",
        field="past_key_values",
        got=type(given).__name__,
        allowed="HybridNASCache",
    )
