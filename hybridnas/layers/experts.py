"""Routed experts as a layer: router, capacity, balance, statistics; used by the moe block and by Mamba's projections.

Shapes: B batch, L length, N = B * L tokens, D input width, O output width, F hidden width, E experts, K choices of a
token, C slots of an expert, G groups of experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridnas.cost import Cost
from hybridnas.hardware import Impl
from hybridnas.kernels.moe_dispatch import OPERATION, Experts, expert_choice, token_choice
from hybridnas.layers.block import Aux, truncated_normal_

_TINY = 1e-20  # beside a sum of scores
_GROUP_BEST = 2  # experts by whose scores a group is ranked (DeepSeek-V3, 2412.19437, section 2.1.2)


@dataclass(frozen=True, kw_only=True)
class RoutedShape:
    """What a routed layer computes; fields as in ``Moe.Config``, all resolved."""

    d_in: int
    d_out: int
    n_experts: int
    d_expert: int
    top_k: int = 1
    router: str = "switch"
    scores: str = "softmax"
    renormalize: bool = False
    renormalize_eps: float = 1e-20
    routed_scale: float = 1.0
    correction_bias: bool = False
    bias_update_rate: float = 1e-3
    expert_groups: int = 1
    top_groups: int = 1
    capacity_factor: float | None = 1.0
    eval_capacity_factor: float | None = None
    load_balance_weight: float = 0.01
    router_z_weight: float = 0.0
    activation: str = "relu"
    gated: bool = False
    bias: bool = False
    init_over_experts: bool = True

    @property
    def d_first(self) -> int:
        """Return the width of an expert's first product: gate and value side by side when gated."""
        return 2 * self.d_expert if self.gated else self.d_expert

    @property
    def experts_per_token(self) -> float:
        """Return how many experts compute a token: top_k, or on average capacity_factor * top_k by expert choice."""
        if self.router != "expert_choice" or self.capacity_factor is None:
            return float(self.top_k)
        return min(float(self.n_experts), self.capacity_factor * self.top_k)

    def cost(self) -> Cost:
        """Return parameters, active parameters and FLOPs: router, and experts_per_token experts of which none drops.

        FLOPs are those of the tokens. An implementation that pads every expert to its capacity executes up to
        ``capacity_factor`` times as many.
        """
        matrices = self.d_in * self.d_first + self.d_expert * self.d_out
        expert = matrices + (self.d_first + self.d_out if self.bias else 0)
        router = self.d_in * self.n_experts
        return Cost(
            params=self.n_experts * expert + router,
            active_params=math.ceil(self.experts_per_token * expert) + router,
            flops_per_token=2.0 * (self.experts_per_token * matrices + router),
        )

    def capacity(self, n_tokens: int, factor: float | None) -> int | None:
        """Return floor(factor * tokens * k / E), at least 1 and at most all tokens; None drops nothing."""
        if factor is None:
            return None
        return max(1, min(n_tokens, math.floor(factor * n_tokens * self.top_k / self.n_experts)))


class ExpertWeights(nn.Module):
    """Stacked weights of E experts, (E, in, out): the layout that bmm and grouped_mm read without a transpose."""

    no_decay = ("gate_up_proj_bias", "up_proj_bias", "down_proj_bias")  # biases, though stacked into matrices

    def __init__(self, shape: RoutedShape) -> None:
        super().__init__()
        self.shape = shape
        self.up_name = "gate_up_proj" if shape.gated else "up_proj"
        first, down = (shape.d_in, shape.d_first), (shape.d_expert, shape.d_out)
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(shape.n_experts, *first)))
        self.down_proj = nn.Parameter(torch.empty(shape.n_experts, *down))
        up_bias = nn.Parameter(torch.empty(shape.n_experts, first[1])) if shape.bias else None
        self.register_parameter(f"{self.up_name}_bias", up_bias)
        self.register_parameter(
            "down_proj_bias", nn.Parameter(torch.empty(shape.n_experts, down[1])) if shape.bias else None
        )

    def tensors(self) -> Experts:
        """Return the weights as the kernels take them."""
        return Experts(
            self.get_parameter(self.up_name),
            self.down_proj,
            self.get_parameter(f"{self.up_name}_bias") if self.shape.bias else None,
            self.get_parameter("down_proj_bias") if self.shape.bias else None,
            self.shape.activation,
            self.shape.gated,
        )

    def reset_parameters(self, init_scale: float) -> None:
        """Draw truncated-normal matrices, zero biases."""
        shape = self.shape
        truncated_normal_(self.get_parameter(self.up_name), shape.d_in, init_scale)
        fan_in = shape.d_expert * (shape.n_experts if shape.init_over_experts else 1)
        truncated_normal_(self.down_proj, fan_in, init_scale)
        for name, parameter in self.named_parameters():
            if name.endswith("_bias"):
                nn.init.zeros_(parameter)


class RoutedExperts(nn.Module):
    """A feed-forward layer of which each token sees a few experts: Switch (2101.03961), top-k, or Expert Choice.

    With ``correction_bias`` a token chooses by its scores plus a bias (E,) of the experts, and weighs what it chose by
    the scores alone. The bias is a buffer, no parameter: :meth:`balance` moves it (2408.15664).
    """

    correction_bias: Tensor | None

    def __init__(self, shape: RoutedShape, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__()
        self.shape = shape
        self.impl = OPERATION.nearest(impl)
        self.router = nn.Linear(shape.d_in, shape.n_experts, bias=False)
        bias_E = torch.zeros(shape.n_experts, dtype=torch.float32) if shape.correction_bias else None
        self.register_buffer("correction_bias", bias_E)
        self.experts = ExpertWeights(shape)

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Aux]:
        """Return (B, L, O) and the weighted losses and statistics of the routing."""
        x_ND = x_BLD.flatten(0, 1)
        logits_NE = self._logits(x_ND)
        route = self._expert_choice if self.shape.router == "expert_choice" else self._token_choice
        y_NO, aux = route(x_ND, logits_NE, self._scores(logits_NE))
        return y_NO.view(*x_BLD.shape[:2], self.shape.d_out), aux

    def without_aux(self, x_ND: Tensor) -> Tensor:
        """Return (N, O) of tokens that choose their experts, without the losses and statistics of the routing."""
        return self._chosen(x_ND, self._scores(self._logits(x_ND)))[0]

    @torch.no_grad()
    def balance(self, chosen_E: Tensor) -> None:
        """Move the correction bias by ``bias_update_rate`` up for experts chosen less than the mean, down for others.

        ``chosen_E``: the choices per expert in one optimizer step [count]. Algorithm 1 of 2408.15664.
        """
        if self.correction_bias is not None:
            missing_E = chosen_E.sum() - self.shape.n_experts * chosen_E  # integers: a balanced expert stays as it is
            self.correction_bias.add_(missing_E.sign(), alpha=self.shape.bias_update_rate)

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw router and experts; with init_over_experts the second matrix counts all experts in its fan-in."""
        truncated_normal_(self.router.weight, self.shape.d_in, init_scale)
        self.experts.reset_parameters(init_scale)
        if self.correction_bias is not None:
            nn.init.zeros_(self.correction_bias)

    def _logits(self, x_ND: Tensor) -> Tensor:
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            if type(self.router) is nn.Linear:
                return F.linear(x_ND.to(wide), self.router.weight.to(wide))
            logits_NE: Tensor = self.router(x_ND.to(wide))  # wrapped: what an adapter adds is in its forward
            return logits_NE

    def _scores(self, logits_NE: Tensor) -> Tensor:
        return logits_NE.sigmoid() if self.shape.scores == "sigmoid" else logits_NE.softmax(dim=-1)

    def _probabilities(self, scores_NE: Tensor) -> Tensor:
        """Return scores that sum to 1 over the experts, which losses and statistics are about."""
        return scores_NE / (scores_NE.sum(-1, keepdim=True) + _TINY) if self.shape.scores == "sigmoid" else scores_NE

    def _choice(self, scores_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Return a token's gates and experts (N, K)."""
        shape = self.shape
        if self.correction_bias is not None or shape.top_groups < shape.expert_groups:
            expert_NK = self._ranked(scores_NE.detach()).topk(shape.top_k, dim=-1).indices
            gate_NK = scores_NE.gather(1, expert_NK)
        elif shape.top_k > 1:
            gate_NK, expert_NK = scores_NE.topk(shape.top_k, dim=-1)
        else:
            gate_NK, expert_NK = scores_NE.max(-1, keepdim=True)
        if shape.renormalize:
            gate_NK = gate_NK / (gate_NK.sum(dim=-1, keepdim=True) + shape.renormalize_eps)
        return gate_NK if shape.routed_scale == 1 else gate_NK * shape.routed_scale, expert_NK

    def _ranked(self, scores_NE: Tensor) -> Tensor:
        """Return what a token ranks the experts by: -inf outside of its best groups."""
        shape = self.shape
        if self.correction_bias is not None:
            scores_NE = scores_NE + self.correction_bias
        if shape.top_groups == shape.expert_groups:
            return scores_NE
        scores_NGE = scores_NE.view(scores_NE.shape[0], shape.expert_groups, shape.n_experts // shape.expert_groups)
        group_NG = scores_NGE.topk(min(_GROUP_BEST, scores_NGE.shape[-1]), dim=-1).values.sum(dim=-1)
        best_NG = group_NG.topk(shape.top_groups, dim=-1).indices
        outside_NG = torch.ones_like(group_NG, dtype=torch.bool).scatter(-1, best_NG, False)
        return scores_NGE.masked_fill(outside_NG[..., None], -math.inf).flatten(1)

    def _chosen(self, x_ND: Tensor, scores_NE: Tensor) -> tuple[Tensor, Tensor, Tensor, int | None]:
        """Return the output, the choices, how many of them each expert got, and how many it may take."""
        shape = self.shape
        gate_NK, expert_NK = self._choice(scores_NE)
        factor = shape.capacity_factor if self.training else shape.eval_capacity_factor
        capacity = shape.capacity(x_ND.shape[0], factor)
        y_NO, counts_E = token_choice(
            x_ND, gate_NK, expert_NK, self.experts.tensors(), capacity=capacity, impl=self.impl
        )
        return y_NO, expert_NK, counts_E, capacity

    def _token_choice(self, x_ND: Tensor, logits_NE: Tensor, scores_NE: Tensor) -> tuple[Tensor, Aux]:
        shape, probs_NE = self.shape, self._probabilities(scores_NE)
        y_NO, expert_NK, counts_E, capacity = self._chosen(x_ND, scores_NE)
        # integers divided would have torch's default dtype, on which these numbers must not depend
        load_E = counts_E.to(probs_NE.dtype) / max(1, expert_NK.numel())
        losses = self._z_loss(logits_NE)
        if shape.load_balance_weight:
            balance = shape.n_experts * (load_E * _mean(probs_NE, 0)).sum()
            losses["load_balance"] = shape.load_balance_weight * balance
        over_E = (counts_E - capacity).clamp(min=0) if capacity is not None else torch.zeros_like(counts_E)
        dropped = over_E.sum().to(probs_NE.dtype) / max(1, expert_NK.numel())
        stats = {"load_E": load_E, "dropped": dropped, **_entropy(probs_NE)}
        if self.correction_bias is not None:
            stats["chosen_E"] = counts_E  # summed over a step, what `balance` needs
        return y_NO, Aux(losses, stats)

    def _expert_choice(self, x_ND: Tensor, logits_NE: Tensor, probs_NE: Tensor) -> tuple[Tensor, Aux]:
        shape = self.shape
        asked = None if self.training else shape.eval_capacity_factor
        capacity = shape.capacity(x_ND.shape[0], shape.capacity_factor if asked is None else asked)
        taken = x_ND.shape[0] if capacity is None else min(capacity, x_ND.shape[0])
        gate_EC, token_EC = probs_NE.t().topk(taken, dim=-1)
        gate_EC = gate_EC if shape.routed_scale == 1 else gate_EC * shape.routed_scale
        y_NO = expert_choice(x_ND, gate_EC, token_EC, self.experts.tensors(), impl=self.impl)
        seen_N = probs_NE.new_zeros(x_ND.shape[0]).index_fill(0, token_EC.flatten(), 1.0)
        load_E = probs_NE.new_full((shape.n_experts,), 1.0 / shape.n_experts)
        stats = {"load_E": load_E, "dropped": 1.0 - _mean(seen_N, 0), **_entropy(probs_NE)}
        return y_NO, Aux(self._z_loss(logits_NE), stats)

    def _z_loss(self, logits_NE: Tensor) -> dict[str, Tensor]:
        if not self.shape.router_z_weight:
            return {}
        return {"router_z": self.shape.router_z_weight * _mean(logits_NE.logsumexp(dim=-1).square(), 0)}


def _entropy(probs_NE: Tensor) -> dict[str, Tensor]:
    probs_NE = probs_NE.detach()  # torch.special.entr takes its logarithms one by one on a processor
    logs_NE = probs_NE.clamp_min(torch.finfo(probs_NE.dtype).tiny).log()
    return {"router_entropy": _mean(-(probs_NE * logs_NE).sum(dim=-1), 0)}


def _mean(values: Tensor, dim: int) -> Tensor:
    """Return the mean over a dimension, 0 where it is empty: a batch without rows adds nothing to a loss."""
    return values.mean(dim=dim) if values.shape[dim] else values.sum(dim=dim)
