"""Every mixer in one model of eight layers: a training step and a generated token, beside attention and transformers.

Each model is ``(XF)x4`` at d_model 256: the mixer X in turn with an MLP that is sized so that all models have as many
parameters as ``(AF)x4``. transformers' form is the same model with each mixer replaced by their module of the same
sizes, in plain torch. A step is forward, cross-entropy, backward and fused AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybridnas.arch.arch import Arch
from hybridnas.arch.layer import ResidualLayer
from hybridnas.arch.match import match
from hybridnas.arch.model import HybridLM
from hybridnas.bench import models, peers
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Form, Spread, measure, ratios
from hybridnas.bench.models import Sizes
from hybridnas.bench.result import Result
from hybridnas.bench.suites.decode import ours as seconds_per_token
from hybridnas.layers.block import Block, BlockOutput
from hybridnas.registry import BLOCKS

LIGHTNING = "L{head_dim=64,kind=lightning}"  # keys as wide as values, as in MiniMax
KINDS = (LIGHTNING, "L{kind=gla}", "L{kind=deltanet}", "L{kind=retnet}", "L{kind=hgrn2}")
WHOLE = ("Z",)  # has an MLP of its own, and so more weights than attention in turn with one
LAYERS = ["linear_attention", "full_attention"]  # of which transformers' hybrids want both, whichever is built
_LINEAR = 1.15  # how much more a token of a long sequence may cost and the step still count as linear in length


def run(config: BenchConfig) -> Result:
    """Measure steps of 2,048 tokens at lengths 256, 1,024 and 2,048, then tokens after 16 and 4,096 of context."""
    result = Result("mixers")
    sizes, lengths, tokens = (
        (Sizes(2, 64), (8, 16, 32), 32) if config.tiny else (Sizes(8, 256), (256, 1024, 2048), 2048)
    )
    mixers = [x for x in BLOCKS if BLOCKS.get(x).role != "feed_forward" and x not in WHOLE]
    mixers += [kind for kind in KINDS if kind[0] in mixers]
    recurrent = [mixer for mixer in mixers if mixer[0] in "GKL"]  # on kernels.gated_delta
    steps: dict[str, dict[str, list[float]]] = {}
    for length in lengths:
        case = f"step of {tokens:,} tokens at length {length:,}"
        steps[case] = _steps(config, result, case, mixers, sizes, tokens // length, length)
    cases = list(steps)
    for mixer in recurrent:
        for case in cases[1:]:
            what = f"{mixer}, {case}"
            result.goal("at most", 1.0, case=case, of=ours(mixer), over=ours("A"), what=what, against="attention")
        if mixer in PEERS:
            theirs, what = hugging_face(mixer), f"{mixer}, {cases[-1]}"
            result.goal("at least", 5, case=cases[-1], of=theirs, over=ours(mixer), what=what, against="transformers")
    for case in cases:
        result.goal("at most", 1.0, case=case, of=ours("C"), over=ours("M"), what=f"C, {case}", against="Mamba")
    if "S" in mixers:
        grown = Spread.of(ratios(steps[cases[-1]][ours("S")], steps[cases[1]][ours("S")]))
        what = f"S, a token of length {lengths[-1]:,}"
        result.hold("at most", _LINEAR, grown, what=what, against=f"of length {lengths[1]:,} (linear in length)")
    _decoding(config, result, mixers, recurrent, sizes)
    return result


def ours(mixer: str) -> str:
    """Return the name of our form of a mixer."""
    return f"ours, {mixer} {BLOCKS.get(mixer[0]).name}"


def hugging_face(mixer: str) -> str:
    """Return the name of transformers' form of a mixer."""
    return f"HF, {mixer} {BLOCKS.get(mixer[0]).name}"


def arch_of(mixer: str, sizes: Sizes) -> Arch:
    """Return a mixer in turn with an MLP, sized to the parameters of attention in turn with one."""

    def plain(x: str) -> Arch:
        return Arch.from_pattern(
            f"({x}F)x{sizes.layers // 2}", d_model=sizes.d_model, vocab_size=sizes.vocab, norm="rmsnorm",
            final_norm=True, F={"d_ff": 4 * sizes.d_model},
        )  # fmt: skip

    return match(plain(mixer), active_params=plain("A").cost().active_params, free="d_ff", multiple=2)


def _steps(
    config: BenchConfig, result: Result, case: str, mixers: list[str], sizes: Sizes, batch: int, length: int
) -> dict[str, list[float]]:
    forms, notes = [], {}
    for mixer in mixers:
        model = HybridLM(arch_of(mixer, sizes), seed=0)
        forms.append(Form(ours(mixer), models.step_of(model, models.loss_of(model), batch, length, sizes.vocab)))
        notes[ours(mixer)] = f"{sum(p.numel() for p in model.parameters()):,} parameters"
        if mixer not in PEERS or (config.quick and length < 2048):  # a few of their steps take minutes
            continue
        if why := peers.absent("transformers"):
            result.missing(case, hugging_face(mixer), why)
            continue
        other = _with_peers(mixer, sizes)
        step = models.step_of(other, models.loss_of(other), batch, length, sizes.vocab)
        forms.append(Form(hugging_face(mixer), step, config.pick(3, 2, 1), warm=False))
        notes[hugging_face(mixer)] = f"{sum(p.numel() for p in other.parameters()):,} parameters"
    times = measure(forms, config.pick(9, 4, 1))
    result.add(case, times, notes)
    for mixer in mixers:
        if mixer != "A":
            result.ratio(case, ours(mixer), ours("A"))
        result.ratio(case, hugging_face(mixer), ours(mixer))
    return times


def _decoding(config: BenchConfig, result: Result, mixers: list[str], recurrent: list[str], sizes: Sizes) -> None:
    contexts, new = ((4, 12), 4) if config.tiny else ((16, 4096), config.pick(128, 32, 4))
    built = {mixer: HybridLM(arch_of(mixer, sizes), seed=0).eval() for mixer in mixers}
    for context in contexts:
        case = f"one generated token after {context:,}"
        ids_BL = torch.randint(0, sizes.vocab, (1, context), generator=torch.Generator().manual_seed(0))
        forms = [Form(ours(x), partial(seconds_per_token, model, ids_BL, new)) for x, model in built.items()]
        result.add(case, measure(forms, config.pick(7, 3, 1)))
        for mixer in mixers:
            if mixer in recurrent:
                what = f"{mixer}, {case}"
                result.goal("at most", 2.0, case=case, of=ours(mixer), over=ours("M"), what=what, against="Mamba")
            elif mixer != "M":
                result.ratio(case, ours(mixer), ours("M"))


class _Peer(nn.Module):
    """transformers' module in the place of a block: training steps alone, without a state."""

    takes_segments = takes_first = takes_embedding = False  # as a block says it

    def __init__(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.arguments = module, arguments

    def forward(self, x_BLD: Tensor, state: Any = None) -> BlockOutput:
        found = self.module(x_BLD, **self.arguments)
        return BlockOutput(found[0] if isinstance(found, tuple) else found, None)


def _with_peers(mixer: str, sizes: Sizes) -> HybridLM:
    """Return our model with every block of the mixer replaced by transformers' module of the same sizes."""
    model = HybridLM(arch_of(mixer, sizes), seed=0)
    for layer in model.layers:
        assert isinstance(layer, ResidualLayer)
        for branch in layer.branches:
            assert isinstance(branch, nn.ModuleList)
            for place, block in enumerate(branch):
                if isinstance(block, Block) and block.letter == mixer[0]:
                    branch[place] = PEERS[mixer](block.config)
    return model


def _built(family: str, name: str, arguments: dict[str, Any] | None = None, **fields: Any) -> _Peer:
    """Return a module of a family of transformers, weights drawn as torch does where it leaves them empty."""
    modeling = peers.load_quietly(f"transformers.models.{family}.modeling_{family}")
    config = next(
        getattr(modeling, found) for found in dir(modeling) if found.lower() == f"{family.replace('_', '')}config"
    )
    torch.manual_seed(0)
    module = getattr(modeling, name)(config(num_hidden_layers=2, **fields), 0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.5)
    return _Peer(module, arguments or {})


def _gated_deltanet(config: Any) -> _Peer:
    return _built(
        "qwen3_next", "Qwen3NextGatedDeltaNet", hidden_size=config.d_model, layer_types=LAYERS,
        linear_num_key_heads=config.heads, linear_num_value_heads=config.value_heads,
        linear_key_head_dim=config.key_dim, linear_value_head_dim=config.value_dim,
        linear_conv_kernel_dim=config.d_conv,
    )  # fmt: skip


def _kimi_delta(config: Any) -> _Peer:
    shape = config.shape
    return _built(
        "kimi_linear", "KimiLinearDeltaAttention", hidden_size=config.d_model, layer_types=LAYERS,
        linear_num_heads=shape.value_heads, linear_head_dim=shape.key_dim,
    )  # fmt: skip


def _lightning(config: Any) -> _Peer:
    return _built(
        "minimax", "MiniMaxLightningAttention", {"position_embeddings": None, "attention_mask": None},
        hidden_size=config.d_model, num_attention_heads=config.shape.value_heads, head_dim=config.shape.key_dim,
    )  # fmt: skip


def _gated_conv(config: Any) -> _Peer:
    return _built("lfm2", "Lfm2ShortConv", hidden_size=config.d_model, conv_L_cache=config.d_conv)


def _mamba2(config: Any) -> _Peer:
    return _built(
        "mamba2", "Mamba2Mixer", hidden_size=config.d_model, num_heads=config.heads, head_dim=config.head_width,
        state_size=config.d_state, n_groups=config.n_groups, expand=config.width // config.d_model, chunk_size=64,
    )  # fmt: skip


PEERS: dict[str, Callable[[Any], _Peer]] = {
    "G": _gated_deltanet,
    "K": _kimi_delta,
    LIGHTNING: _lightning,
    "C": _gated_conv,
    "N": _mamba2,
}
