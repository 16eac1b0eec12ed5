"""Add a block of your own, check its cost, train it, and search over patterns that hold it.

    python examples/own_block.py

The block is a gated moving average with one learned decay for each channel:

    h_t = a h_{t-1} + (1 - a) W_u x_t        y_t = W_o (h_t * silu(W_g x_t))

It is registered under letter Q, and from then on it stands in pattern strings beside all other blocks. A block that
other people should get belongs into a package, as an entry point of the group ``hybridnas.blocks``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hybridnas
from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.hardware import Impl
from hybridnas.layers import Block, BlockConfig, BlockOutput, State, truncated_normal_


@hybridnas.register_block("Q", name="moving_average")
class MovingAverage(Block):
    """Gated exponential moving average with a learned decay for each channel."""

    float32 = ("decay_logit",)  # stays in float32 when the model is cast to bfloat16

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of the block; ``d_inner`` is a width, so that a search can size the block."""

        d_inner: int | None = option(None, "channels of the average; none: 2 * d_model [channels]", ge=1)

        @property
        def inner(self) -> int:
            return self.d_inner if self.d_inner is not None else 2 * self.d_model

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            matrices = 3 * self.d_model * self.inner
            params = matrices + self.inner
            return Cost(
                params=params,
                active_params=params,
                flops_per_token=2.0 * matrices,
                state_bytes=4 * self.inner,  # the average is float32 at any dtype
            )

        def canonical(self) -> dict[str, object]:
            return {**self.to_dict(), "d_inner": self.inner}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        self.in_proj = nn.Linear(config.d_model, 2 * config.inner, bias=False)
        self.out_proj = nn.Linear(config.inner, config.d_model, bias=False)
        self.decay_logit = nn.Parameter(torch.empty(config.inner))
        self.reset_parameters()

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        for linear in (self.in_proj, self.out_proj):
            truncated_normal_(linear.weight, linear.in_features, init_scale)
        with torch.no_grad():  # memories of 2 to 64 tokens
            memory = torch.logspace(1, 6, self.config.inner, base=2.0)
            self.decay_logit.copy_(torch.log(memory - 1))

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        return (torch.zeros(batch_size, self.config.inner, device=device, dtype=torch.float32),)

    def forward(self, x_BLD: Tensor, state: State | None = None) -> BlockOutput:
        value_BLI, gate_BLI = self.in_proj(x_BLD).chunk(2, dim=-1)
        decay_I = torch.sigmoid(self.decay_logit)
        first = state or self.init_state(x_BLD.shape[0], device=x_BLD.device, dtype=x_BLD.dtype)
        h_BI = first[0]
        averages = [torch.empty_like(h_BI)[:, None][:, :0]]
        for step_BI in value_BLI.float().unbind(1):
            h_BI = torch.lerp(step_BI, h_BI, decay_I)
            averages.append(h_BI[:, None])
        h_BLI = torch.cat(averages, dim=1).to(x_BLD.dtype)
        return BlockOutput(self.out_proj(h_BLI * F.silu(gate_BLI)), None if state is None else (h_BI,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="training tokens of each architecture")
    parser.add_argument("--trials", type=int, default=6, help="finished trials that end the search")
    parser.add_argument("--runs", default="runs", help="folder in which studies lie")
    arguments = parser.parse_args()

    model = hybridnas.build("(QF)x2", d_model=64, vocab_size=256)
    cost = model.arch.cost(seq_len=128)
    counted = sum(p.numel() for p in model.parameters()) - cost.embedding_params
    print(f"(QF)x2: declared {cost.params:,} parameters, counted {counted:,}; state {cost.state_bytes:,} bytes")

    result = hybridnas.fit(model, data="stdlib", tokens=arguments.tokens, seq_len=128, batch_size=16)
    print(f"validation loss after {arguments.tokens:,} tokens: {result.evals[-1].valid_loss:.4f} nats per byte")

    space = {"name": "moving_average", "letters": ["Q", "A", "F"], "motif_length": [2, 4], "baselines": ["transformer"]}
    study = hybridnas.create_study(
        space=space, budget="smoke", data="stdlib", runs=arguments.runs, n_trials=arguments.trials
    )
    study.run()
    print(study.to_dataframe()[["number", "pattern", "state", "val_loss"]].to_string(index=False))
    print(f"best: {study.best.arch.pattern}")


if __name__ == "__main__":
    main()
