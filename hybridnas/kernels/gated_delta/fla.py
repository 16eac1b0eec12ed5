"""Gated linear recurrences by the package flash-linear-attention (pip install hybridnas[fla]), on a CUDA device.

Its functions in ``fla.ops``, as of version 0.5: the state is (N, H, K, V) and the decay a logarithm, as here; heads
that share queries and keys get copies of them, since not all functions take groups; documents go into one row with the
list of their starts. It takes no log decay of -inf. The mapping of arguments is tested with stand-ins for these
functions; no call of the package itself has run on a GPU here.

Letters: B batch, L length, H heads, K channels of a key, V channels of a value, N documents of all rows.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hybridnas.kernels._inputs import boundaries
from hybridnas.kernels.gated_delta.reference import Inputs, gated_delta_reference


def gated_delta_fla(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return o (B, L, H, V) in v's dtype and the final state (B, H, K, V) in float32."""
    q, k, v, log, beta, initial, seq_idx, *_ = inputs
    (batch, length, heads, _), share = v.shape, v.shape[2] // q.shape[2]
    if v.numel() == 0:
        return gated_delta_reference(inputs)
    if log is not None:
        log = (log.expand(batch, length, heads) if log.dim() == 1 else log).float()
    given: dict[str, Any] = {"q": q.repeat_interleave(share, 2), "k": k.repeat_interleave(share, 2), "v": v}
    given |= {name: t for name, t in (("g", log), ("beta", beta)) if t is not None}
    state = None if initial is None else initial.float()
    firsts = lasts = torch.arange(batch, device=v.device)
    if seq_idx is not None:
        begins_BL = boundaries(seq_idx)
        begins_BL[:, 0] = True
        number = begins_BL.flatten().cumsum(0).view(batch, length) - 1
        firsts, lasts = number[:, 0], number[:, -1]
        starts = begins_BL.flatten().nonzero().flatten()
        given |= {name: t.flatten(0, 1)[None] for name, t in given.items()}
        given["cu_seqlens"] = torch.cat([starts, starts.new_full((1,), batch * length)])
        if state is not None:
            state = state.new_zeros(starts.shape[0], *state.shape[1:]).index_copy(0, firsts, state)
    o, final = _function(inputs)(**given, scale=inputs.query_scale, initial_state=state, output_final_state=True)
    return o.view(v.shape).to(v.dtype), final[lasts]


def _function(inputs: Inputs) -> Any:
    """Return the function for these decays, with the delta rule or without."""
    delta, channel = inputs.beta is not None, inputs.log_decay is not None and inputs.log_decay.dim() == 4
    if channel:
        module, name = ("kda", "chunk_kda") if delta else ("gla", "chunk_gla")
    elif delta and inputs.log_decay is not None:
        module, name = "gated_delta_rule", "chunk_gated_delta_rule"
    else:
        module, name = ("delta_rule", "chunk_delta_rule") if delta else ("simple_gla", "chunk_simple_gla")
    return getattr(import_module(f"fla.ops.{module}"), name)
