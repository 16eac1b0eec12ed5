"""Mixture-of-experts block, letter E: Switch top-1, top-k by softmax or sigmoid scores, Expert Choice; shared expert.

Shapes: B batch, L length, D d_model, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.kernels import moe_dispatch as moe_kernel
from hybridnas.kernels.activations import ACTIVATIONS
from hybridnas.layers.block import Block, BlockConfig, BlockOutput, State, Variant, truncated_normal_
from hybridnas.layers.experts import RoutedExperts, RoutedShape
from hybridnas.layers.feed_forward import FeedForward, feed_forward_params
from hybridnas.layers.mode import has_hooks
from hybridnas.layers.norms import one_row
from hybridnas.registry import register_block


@register_block("E", name="moe")
class Moe(Block):
    """Routed feed-forward experts (Switch 2101.03961; Expert Choice 2202.09368; shared expert 2401.06066).

    ``scores='sigmoid'``, ``correction_bias`` and groups are DeepSeek-V3's router (2412.19437), which Nemotron-3, Kimi
    Linear and LFM2-MoE have too: choose by score + bias, weigh by score. The bias is a buffer that training moves after
    every optimizer step towards an even load, without a gradient (2408.15664); ``load_balance_weight=0`` leaves
    balancing to it alone.

    A token beyond an expert's capacity gets 0 from it: only the residual (and the shared expert) carries it on.
    Capacity counts the whole batch and by default limits training alone. Slots go to tokens in (B, L) order, as in
    Switch, so drops fall on the last sequences of a batch; which sequences are last is drawn anew at every step. With
    ``top_k`` of 2 and more a token's choices are served together, where GShard and ST-MoE serve all first choices
    first. Accumulation splits the batch: each smaller pass has its own capacity and its own drops. So has each piece of
    a text under ``eval_capacity_factor``: read in pieces or generated, its outputs differ from those of the whole.
    """

    float32 = ("routed.router.weight", "routed.correction_bias")
    role = "feed_forward"
    outputs = ("routed.experts.down_proj", "shared.down_proj")

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of the mixture-of-experts block."""

        renamed: ClassVar[Mapping[str, str]] = {"renormalise": "renormalize"}

        n_experts: int = option(8, "routed experts [count]", ge=1)
        d_expert: int | None = option(None, "hidden width of one expert; none: 4 * d_model [channels]", ge=1)
        top_k: int = option(1, "experts that compute one token [count]", ge=1)
        router: str = option(
            "switch",
            "who chooses: switch (token, top 1, gate kept), top_k (token), expert_choice (expert; not causal)",
            choices=("switch", "top_k", "expert_choice"),
        )
        scores: str = option(
            "softmax",
            "score of an expert for a token: softmax over experts, or sigmoid",
            choices=("softmax", "sigmoid"),
        )
        renormalize: bool = option(False, "top_k: scale a token's gates to sum to 1")
        renormalize_eps: float = option(
            1e-20, "added to that sum before dividing; 1e-20 as in DeepSeek-V3, LFM2 has 1e-6", ge=0
        )
        routed_scale: float = option(1.0, "factor of all gates, after renormalize [1]", gt=0)
        correction_bias: bool = option(
            False, "choose by score + a bias per expert that training balances without a gradient; weigh by score"
        )
        bias_update_rate: float = option(
            1e-3, "change of an expert's correction bias after an optimizer step; 0: kept [score]", ge=0
        )
        expert_groups: int = option(
            1, "groups of experts, of which a token chooses within the best top_groups [count]", ge=1
        )
        top_groups: int = option(1, "groups that a token chooses from, by the sum of their two best [count]", ge=1)
        capacity_factor: float | None = option(
            1.0, "slots of an expert in training, in units of tokens * top_k / n_experts; none: drop no token", gt=0
        )
        eval_capacity_factor: float | None = option(
            None, "the same in evaluation and generation; none: drop no token (expert_choice: as in training)", gt=0
        )
        load_balance_weight: float = option(0.01, "weight of the loss n_experts * sum(f_i * P_i)", ge=0)
        router_z_weight: float = option(0.0, "weight of the loss mean(logsumexp(router logits) ** 2)", ge=0)
        d_shared: int = option(0, "hidden width of an expert that every token sees; 0: none [channels]", ge=0)
        shared_gate: bool = option(False, "multiply the shared expert by sigmoid(a linear map of the token) (Qwen)")
        activation: str = option("relu", "nonlinearity of the experts", choices=tuple(ACTIVATIONS))
        gated: bool = option(False, "experts multiply by a second, linear branch (silu: SwiGLU)")
        bias: bool = option(False, "biases in the experts")
        init_over_experts: bool = option(
            True, "initialise second matrices with fan-in n_experts * d_expert, as the MoE-Mamba code does"
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.top_k > self.n_experts:
                raise ConfigError(
                    f"{self.label()} top_k={self.top_k} is more than n_experts={self.n_experts}; "
                    f"use top_k <= {self.n_experts} or more experts",
                    field="top_k",
                    got=self.top_k,
                    allowed=f"1 to {self.n_experts}",
                )
            if self.router == "switch" and (self.top_k > 1 or self.renormalize):
                name, got, allowed = ("top_k", self.top_k, 1) if self.top_k > 1 else ("renormalize", True, False)
                raise ConfigError(
                    f"{self.label()} router='switch' sends a token to one expert and keeps its gate, got {name}={got}; "
                    f"use router='top_k'",
                    field=name,
                    got=got,
                    allowed=allowed,
                )
            self._check_groups()
            if self.router == "expert_choice":
                self._check_expert_choice()

        def _check_groups(self) -> None:
            if self.n_experts % self.expert_groups:
                allowed = [g for g in range(1, self.n_experts + 1) if self.n_experts % g == 0]
                raise ConfigError(
                    f"{self.label()} expert_groups={self.expert_groups} does not divide n_experts={self.n_experts}; "
                    f"use a divisor of n_experts",
                    field="expert_groups",
                    got=self.expert_groups,
                    allowed=allowed,
                )
            if self.top_groups > self.expert_groups:
                raise ConfigError(
                    f"{self.label()} top_groups={self.top_groups} is more than expert_groups={self.expert_groups}; "
                    f"use top_groups <= {self.expert_groups} or more groups",
                    field="top_groups",
                    got=self.top_groups,
                    allowed=f"1 to {self.expert_groups}",
                )
            reachable = self.top_groups * self.n_experts // self.expert_groups
            if self.top_k > reachable:
                raise ConfigError(
                    f"{self.label()} top_k={self.top_k} is more than the {reachable} experts of "
                    f"top_groups={self.top_groups} of expert_groups={self.expert_groups}; use top_k <= {reachable}, "
                    f"or more of the groups",
                    field="top_k",
                    got=self.top_k,
                    allowed=f"1 to {reachable}",
                )

        def _check_expert_choice(self) -> None:
            for name, allowed in (("scores", "softmax"), ("correction_bias", False), ("expert_groups", 1)):
                got = getattr(self, name)
                if got != allowed:
                    raise ConfigError(
                        f"{self.label()} {name}={got!r} is a way in which tokens choose, but "
                        f"router='expert_choice' lets experts choose; use {name}={allowed!r} or router='top_k'",
                        field=name,
                        got=got,
                        allowed=allowed,
                    )
            if self.capacity_factor is None:
                raise ConfigError(
                    f"{self.label()} router='expert_choice' needs a capacity_factor, the experts per token on average, "
                    f"got none; use capacity_factor=2.0",
                    field="capacity_factor",
                    got=None,
                    allowed="> 0",
                )

        @property
        def causal(self) -> bool:
            return self.router != "expert_choice"

        @property
        def hidden(self) -> int:
            """Return d_expert with its default resolved."""
            return self.d_expert if self.d_expert is not None else 4 * self.d_model

        @property
        def shape(self) -> RoutedShape:
            """Return the routed part, all defaults resolved."""
            shared = {n: getattr(self, n) for n in RoutedShape.__dataclass_fields__ if n in self.field_names()}
            return RoutedShape(**{**shared, "d_in": self.d_model, "d_out": self.d_model, "d_expert": self.hidden})

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            total = self.shape.cost()
            if self.d_shared:
                params = feed_forward_params(self.d_model, self.d_shared, gated=self.gated, bias=self.bias)
                matrices = feed_forward_params(self.d_model, self.d_shared, gated=self.gated, bias=False)
                if self.shared_gate:
                    params, matrices = params + self.d_model, matrices + self.d_model
                total += Cost(params=params, active_params=params, flops_per_token=2.0 * matrices)
            return total

        def canonical(self) -> dict[str, Any]:
            fields: dict[str, Any] = {**self.to_dict(), "d_expert": self.hidden}
            if self.router == "switch":
                fields["router"] = "top_k"  # one rule, two names
            idle: set[str] = set()
            if self.router == "expert_choice":
                idle |= {"renormalize", "load_balance_weight"}
            if not self.renormalize or self.router == "expert_choice":
                idle.add("renormalize_eps")
            if not self.correction_bias:
                idle.add("bias_update_rate")
            if self.top_groups == self.expert_groups:
                idle |= {"expert_groups", "top_groups"}
            if not self.d_shared:
                idle.add("shared_gate")
            return {name: value for name, value in fields.items() if name not in idle}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        self.routed = RoutedExperts(config.shape, impl=impl)
        self.shared: FeedForward | None = None
        if config.d_shared:
            self.shared = FeedForward(
                config.d_model, config.d_shared, activation=config.activation, gated=config.gated, bias=config.bias
            )
        gate = bool(config.d_shared) and config.shared_gate
        self.shared_gate = nn.Linear(config.d_model, 1, bias=False) if gate else None
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        # Torch's counter sees the padded products that a capacity makes, so FLOPs are counted with one slot a choice.
        full = {"capacity_factor": 1.0}
        one = {"n_experts": 1, "d_expert": 12}  # its gate is 1 whatever its router says
        two = {"n_experts": 4, "d_expert": 12, "router": "top_k", "top_k": 2, "renormalize": True}
        gated = {"n_experts": 4, "d_expert": 7, "gated": True, "activation": "silu", "bias": True}
        shared = {"n_experts": 6, "d_expert": 8, "d_shared": 20, "capacity_factor": 1.25, "bias": True}
        qwen = {"n_experts": 4, "d_expert": 12, "d_shared": 9, "shared_gate": True, "scores": "sigmoid"}
        deepseek = {"n_experts": 8, "d_expert": 12, "router": "top_k", "top_k": 3, "scores": "sigmoid"}
        deepseek |= {
            "correction_bias": True,
            "expert_groups": 4,
            "top_groups": 2,
            "renormalize": True,
            "renormalize_eps": 0.5,
            "routed_scale": 2.5,
        }
        chosen = {"n_experts": 4, "d_expert": 12, "router": "expert_choice", "capacity_factor": 2.0}
        return [
            Variant(flop_fields=full),
            Variant(fields={"n_experts": 4}, flop_fields=full),
            Variant(fields=one, flop_fields=full, without_gradient=("routed.router.weight",)),
            Variant(fields={**two, "router_z_weight": 1e-3}, flop_fields=full),
            Variant(fields={**gated, "capacity_factor": None}, flop_fields=full),
            Variant(fields=shared, flop_fields=full),
            Variant(fields=qwen, flop_fields=full),
            Variant(fields=deepseek, flop_fields=full),
            Variant(fields=chosen),
        ]

    def forward(self, x_BLD: Tensor, state: State | None = None) -> BlockOutput:
        if state is not None:
            self._refuse_generation()
        y_BLD, aux = self.routed(x_BLD)
        if self.shared is not None:
            y_BLD = y_BLD + self._by_all(x_BLD)
        return BlockOutput(y_BLD, state, aux)

    def one_token(self, norm: nn.Module, state: State) -> Callable[[Tensor], Tensor] | None:
        if type(self).forward is not Moe.forward or not self.config.causal or has_hooks(self.routed):
            return None
        normed, shared = one_row(norm), self.shared

        def run(x_BD: Tensor) -> Tensor:
            y_BD = normed(x_BD)
            found_BD = x_BD + self.routed.without_aux(y_BD)
            return found_BD if shared is None else found_BD + self._by_all(y_BD)

        return run

    def after_step(self, counts: Mapping[str, Tensor]) -> None:
        if "chosen_E" in counts:
            self.routed.balance(counts["chosen_E"])

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        self._refuse_generation()
        return ()

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        self.routed.reset_parameters(init_scale)
        if self.shared is not None:
            self.shared.reset_parameters(init_scale)
        if self.shared_gate is not None:
            truncated_normal_(self.shared_gate.weight, self.config.d_model, init_scale)

    def implementations(self, device: torch.device) -> dict[str, str]:
        op = moe_kernel.OPERATION
        return {op.name: op.describe(device, impl=op.nearest(self.impl))}

    def _by_all(self, x: Tensor) -> Tensor:
        """Return what the shared expert adds to every token (..., D)."""
        assert self.shared is not None
        y: Tensor = self.shared(x)
        return y if self.shared_gate is None else y * self.shared_gate(x).sigmoid()

    def _refuse_generation(self) -> None:
        if not self.config.causal:
            raise ConfigError(
                f"{self.name} router='expert_choice' is not causal (experts choose among later tokens too) and cannot "
                f"generate; use router='switch'",
                field="router",
                got="expert_choice",
                allowed=("switch", "top_k"),
            )
