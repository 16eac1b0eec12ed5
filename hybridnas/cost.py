"""What an architecture costs, known before any tensor exists."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Counts of one block, layer or model; they add up with ``+``.

    Parameters exclude embedding and unembedding, as the papers of this field count them; FLOPs include the
    unembedding matmul, because it is executed for every token.
    """

    params: int = 0  # stored weights, shared ones once [count]
    active_params: int = 0  # weights used for one token: one expert per chosen expert, and the router [count]
    embedding_params: int = 0  # embedding and unembedding, a tied pair once [count]
    flops_per_token: float = 0.0  # forward, 2 per multiply-add, averaged over seq_len positions [FLOP]
    state_bytes: int = 0  # what one sequence carries from token to token at seq_len: KV, SSM, conv [bytes]

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            params=self.params + other.params,
            active_params=self.active_params + other.active_params,
            embedding_params=self.embedding_params + other.embedding_params,
            flops_per_token=self.flops_per_token + other.flops_per_token,
            state_bytes=self.state_bytes + other.state_bytes,
        )

    def without_params(self) -> Cost:
        """Return the same cost with no stored weights: the second and later use of a shared module."""
        return Cost(flops_per_token=self.flops_per_token, state_bytes=self.state_bytes)
