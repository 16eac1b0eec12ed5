"""A Switch layer, forward and backward, against a dense MLP of equal active FLOPs and against Hugging Face's layers.

Capacity factor 1.0 for ours and for SwitchTransformers; Mixtral drops no token and gates its experts (SwiGLU), so its
hidden width is two thirds: the same FLOPs. Gradients of the input, of all weights and (ours) of the balance loss.
Shapes: B batch, L length, D width, F hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridnas.bench import peers
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Form, measure
from hybridnas.bench.result import Result
from hybridnas.blocks.moe import Moe

OURS, DENSE, SWITCH = "ours", "dense MLP", "HF SwitchTransformers"
GROUPED, EAGER = "HF Mixtral grouped_mm", "HF Mixtral eager"
_GOALS = {8: 1.2, 32: 1.35, 128: 1.8}
Layer = Callable[[Tensor], list[Tensor]]  # the output first, then losses


class _Dense(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        y_BLD: Tensor = self.down(F.relu(self.up(x_BLD)))
        return y_BLD


def _ours(module: Moe, x_BLD: Tensor) -> list[Tensor]:
    output = module(x_BLD)
    return [output.y_BLD, *output.aux.losses.values()]


def _plain(module: nn.Module, x_BLD: Tensor) -> list[Tensor]:
    return [module(x_BLD)]


def _step(layer: Layer, weights: list[Tensor], x_BLD: Tensor, dy_BLD: Tensor) -> None:
    outputs = layer(x_BLD)
    upstream = [dy_BLD, *(torch.ones_like(loss) for loss in outputs[1:])]
    torch.autograd.grad(outputs, [x_BLD, *weights], upstream, allow_unused=True)


def run(config: BenchConfig) -> Result:
    """Measure at each number of experts; the goals are ratios to the dense MLP."""
    result = Result("moe")
    tokens, width, hidden = (64, 16, 48) if config.tiny else (4096, 512, 1536)
    for n_experts in (2,) if config.tiny else _GOALS:
        torch.manual_seed(0)
        case = f"E={n_experts}, {tokens} tokens, d {width}, expert {hidden}, fwd+bwd"
        x_BLD, dy_BLD = torch.randn(1, tokens, width, requires_grad=True), torch.randn(1, tokens, width)
        forms = []
        for name, layer, module in _layers(result, case, tokens, width, hidden, n_experts):
            slow = name == EAGER and n_experts > 8
            rounds = config.pick(2, 1, 1) if slow else None
            step = partial(_step, layer, list(module.parameters()), x_BLD, dy_BLD)
            forms.append(Form(name, step, rounds, warm=not slow))
        result.add(case, measure(forms, config.pick(9, 5, 1)))
        for name in (SWITCH, GROUPED, EAGER):
            result.ratio(case, name, DENSE)
        what = f"MoE layer {case}"
        against = "dense MLP of equal active FLOPs"
        goal = _GOALS.get(n_experts, 1.2)
        result.goal("at most", goal, case=case, of=OURS, over=DENSE, what=what, against=against)
    return result


def _layers(
    result: Result, case: str, tokens: int, width: int, hidden: int, n_experts: int
) -> list[tuple[str, Layer, nn.Module]]:
    moe = Moe(Moe.Config(d_model=width, n_experts=n_experts, d_expert=hidden)).train()
    dense = _Dense(width, hidden)
    found: list[tuple[str, Layer, nn.Module]] = [
        (OURS, partial(_ours, moe), moe),
        (DENSE, partial(_plain, dense), dense),
    ]
    why = peers.absent("transformers")
    if why:
        for name in (SWITCH, GROUPED, EAGER):
            result.missing(case, name, why)
        return found
    switch = _switch(tokens, width, hidden, n_experts)
    found.append((SWITCH, partial(_plain, switch), switch))
    grouped = _mixtral(width, 2 * hidden // 3, n_experts, "grouped_mm")
    eager = _mixtral(width, 2 * hidden // 3, n_experts, "eager", grouped)
    return [*found, (GROUPED, partial(_plain, grouped), grouped), (EAGER, partial(_plain, eager), eager)]


def _switch(tokens: int, width: int, hidden: int, n_experts: int) -> Any:
    module = peers.load_quietly("transformers.models.switch_transformers.modeling_switch_transformers")
    settings = module.SwitchTransformersConfig(
        d_model=width, d_ff=hidden, num_experts=n_experts, expert_capacity=tokens // n_experts,
        dropout_rate=0.0, router_jitter_noise=0.0,
    )  # fmt: skip
    return module.SwitchTransformersSparseMLP(settings)


def _mixtral(width: int, hidden: int, n_experts: int, how: str, same: Any = None) -> Any:
    """Return Mixtral's block; ``same`` lends its weights, of which there are many."""
    module = peers.load_quietly("transformers.models.mixtral.modeling_mixtral")
    settings = module.MixtralConfig(
        hidden_size=width, intermediate_size=hidden, num_local_experts=n_experts, num_experts_per_tok=1
    )
    settings._experts_implementation = how
    with torch.device("meta" if same is not None else "cpu"):
        block = module.MixtralSparseMoeBlock(settings)
    if same is not None:
        block.gate, block.experts.gate_up_proj = same.gate, same.experts.gate_up_proj
        block.experts.down_proj = same.experts.down_proj
        return block
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return block
