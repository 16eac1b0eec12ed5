"""The models that whole-model suites compare: ours, a Transformer of equal parameters, and Hugging Face's Mamba.

Shapes: B batch, L length, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hybridnas.arch.arch import Arch
from hybridnas.arch.match import match
from hybridnas.arch.model import HybridLM
from hybridnas.arch.presets import preset
from hybridnas.bench import peers
from hybridnas.kernels.cross_entropy import linear_cross_entropy
from hybridnas.train.config import TrainConfig
from hybridnas.train.optim import make_optimizer

MAMBA, TRANSFORMER = "ours, M", "ours, A and F (SDPA)"
HF_MAMBAPY, HF_SLOW = "HF Mamba, mambapy", "HF Mamba, slow path"
Loss = Callable[[Tensor, Tensor], Tensor]  # ids (B, L), targets (B, L) -> mean cross-entropy


class Sizes(NamedTuple):
    """Sizes that all models of a comparison share."""

    layers: int
    d_model: int
    vocab: int = 256


def arch_of(name: str, sizes: Sizes) -> Arch:
    """Return Mamba, or attention and MLP in turn with the MLP sized to Mamba's parameters; RMSNorm, as HF has it."""
    shared = {"norm": "rmsnorm", "final_norm": True}
    width = {"d_model": sizes.d_model, "n_blocks": sizes.layers, "vocab_size": sizes.vocab}
    mamba = preset("mamba", **width, **shared)
    if name == MAMBA:
        return mamba
    transformer = preset("transformer", **width, **shared)
    return match(transformer, active_params=mamba.cost().active_params, free="d_ff", multiple=2)


def hf_mamba(sizes: Sizes, *, use_mambapy: bool) -> Any:
    """Return transformers' MambaForCausalLM of the same sizes, head untied as ours is."""
    module = peers.load_quietly("transformers")
    settings = module.MambaConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.d_model, num_hidden_layers=sizes.layers, state_size=16,
        use_mambapy=use_mambapy, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = module.MambaForCausalLM(settings)
    model.generation_config.eos_token_id = None  # generate as many tokens as asked
    model.generation_config.pad_token_id = 0
    return model


def build(name: str, sizes: Sizes) -> tuple[nn.Module, Loss]:
    """Return a model by its name here, and its loss as one trains it; its peer must be installed."""
    if name in (MAMBA, TRANSFORMER):
        own = HybridLM(arch_of(name, sizes))
        return own, loss_of(own)
    peer = hf_mamba(sizes, use_mambapy=name == HF_MAMBAPY)
    return peer, lambda ids_BL, targets_BL: F.cross_entropy(
        peer(ids_BL, use_cache=False).logits.flatten(0, 1), targets_BL.flatten()
    )


def loss_of(model: HybridLM) -> Loss:
    """Return the loss of a model of ours as one trains it."""
    return lambda ids_BL, targets_BL: linear_cross_entropy(model.hidden(ids_BL).x_BLD, model.head.weight, targets_BL)


def needs(name: str) -> str:
    """Return what is missing for a model, or ''."""
    return peers.absent(*{HF_MAMBAPY: ("transformers", "mambapy"), HF_SLOW: ("transformers",)}.get(name, ()))


def training_step(name: str, sizes: Sizes, batch: int, length: int) -> tuple[Callable[[], None], int]:
    """Return one step of a model by its name, and its count of parameters."""
    model, loss = build(name, sizes)
    return step_of(model, loss, batch, length, sizes.vocab), sum(p.numel() for p in model.parameters())


def step_of(model: nn.Module, loss: Loss, batch: int, length: int, vocab: int) -> Callable[[], None]:
    """Return one training step on a fixed batch: forward, cross-entropy, backward, fused AdamW."""
    model.train()
    optimizer = make_optimizer(model, TrainConfig()) if isinstance(model, HybridLM) else torch.optim.AdamW(
        model.parameters(), lr=1e-3, fused=True
    )  # fmt: skip
    ids_BL = torch.randint(0, vocab, (batch, length + 1), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(ids_BL[:, :-1], ids_BL[:, 1:]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operands of every matrix product that runs, those of the head's loss included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[Any, list[tuple[torch.Size, tuple[int, ...]]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = {torch.ops.aten.mm.default: args, torch.ops.aten.bmm.default: args}.get(func)
        if func is torch.ops.aten.addmm.default:
            operands = args[1:]
        if operands is not None:
            self.found.append((func, [(t.shape, t.stride()) for t in operands[:2]]))
        if func is torch.ops.hybridnas.linear_cross_entropy.default:  # its products run inside of it
            x, weight, dx, dweight = args[0], args[1], args[5], args[6]
            logits = torch.empty(x.shape[0], weight.shape[0], device="meta")
            for left, right, runs in ((x, weight.t(), True), (logits, weight, dx), (logits.t(), x, dweight)):
                if runs:
                    shapes = [(t.shape, t.stride()) for t in (left, right)]
                    self.found.append((torch.ops.aten.mm.default, shapes))
        return func(*args, **(kwargs or {}))


def _like(shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """Return random numbers laid out like an operand, which may be expanded."""
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return torch.randn(last + 1).as_strided(shape, stride)


def matmul_floor(step: Callable[[], None]) -> tuple[Callable[[], None], int]:
    """Return a call that runs the same matrix products as ``step`` and nothing else, and their FLOPs.

    Products of one shape share their operands, which keeps them warm: the floor is low rather than high.
    """
    with _Products() as products:
        step()
    operands: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}
    order, flops = [], 0
    for func, pair in products.found:
        (left, left_stride), (right, right_stride) = pair
        key = (left, left_stride, right, right_stride)
        if key not in operands:
            out = torch.empty(*left[:-1], right[-1])
            operands[key] = (_like(left, left_stride), _like(right, right_stride), out)
        order.append((torch.bmm if func is torch.ops.aten.bmm.default else torch.mm, operands[key]))
        flops += 2 * left.numel() * right[-1]

    def replay() -> None:
        for product, (a, b, out) in order:
            product(a, b, out=out)

    return replay, flops
