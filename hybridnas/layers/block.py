"""The contract of a block: a config that declares its cost, and a module whose state is explicit.

A block of one's own imports everything from ``hybridnas.layers``. Shapes: B batch, L length (any, one included),
D d_model.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hybridnas.config import FrozenConfig, option
from hybridnas.cost import Cost
from hybridnas.hardware import Impl

NORM_POSITIONS = ("pre", "post", "sandwich", "stream")
# Options of the layer around a block, which the block itself does not read.
AROUND = ("norm_position", "in_multiplier", "out_multiplier", "stream_multiplier", "canon")
S = TypeVar("S", bound="tuple[Tensor, ...]")
T = TypeVar("T")
# What a block carries from token to token: any tuple of tensors, plain or a NamedTuple, each with the batch first.
# A block without a state has the empty tuple.
State = tuple[Tensor, ...]
Role: TypeAlias = Literal["attention", "mixer", "feed_forward"]


def exportable(kind: type[T]) -> type[T]:
    """Class decorator for a NamedTuple of outputs or states: lets ``torch.export.save`` write programs that use it.

    Torch exports a NamedTuple as it is, and saves it under a name that has to be registered. This is the one call for
    it, which has no public name (its error message asks for it by this one).
    """
    pytree._register_namedtuple(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
    return kind


@exportable
class Aux(NamedTuple):
    """Named extras of a forward pass: losses to add (already weighted), statistics to log (detached).

    Statistics of integers are counts: training sums them over a step and hands them to ``Block.after_step``.
    ``first`` (B, L, any width) is what the first block of a letter hands to the later ones.
    """

    losses: Mapping[str, Tensor]
    stats: Mapping[str, Tensor]
    first: Tensor | None = None


NO_AUX = Aux({}, {})


@exportable
class BlockOutput(NamedTuple):
    """What a block returns: output, next state (None when none was given), extras."""

    y_BLD: Tensor
    state: State | None
    aux: Aux = NO_AUX


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Fields of a block's config under which the contract tests run it, and what is known to differ there."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    flop_fields: Mapping[str, Any] = field(default_factory=dict)  # laid over them where executed FLOPs are counted
    without_gradient: tuple[str, ...] = ()  # parameters that cannot change the output under these fields


@dataclass(frozen=True, kw_only=True)
class BlockConfig(FrozenConfig):
    """Fields of a block; subclasses add theirs and declare their cost.

    Those beside ``d_model`` say what the layer does around the block; neither the block nor its ``cost`` looks at them.
    """

    block_name: ClassVar[str] = "block"  # set by register_block, for messages
    widths: ClassVar[tuple[str, ...]] = ("d_expert", "d_ff", "d_inner")  # fields that size the block, where it has them
    state_sizes: ClassVar[tuple[str, ...]] = ("d_state",)  # fields that size the state, where it has them
    renamed: ClassVar[Mapping[str, str]] = {}  # former name of a field -> its name, still read and part of fingerprints

    d_model: int = option(doc="width of the residual stream [channels]", ge=1)
    norm_position: str = option(
        "pre",
        "where the layer's norm stands: pre x + block(norm(x)), post x + norm(block(x)), sandwich "
        "x + norm(block(norm(x))), stream n + block(n) with n = norm(x)",
        choices=NORM_POSITIONS,
    )
    in_multiplier: float = option(1.0, "factor on what the block reads, after the norm [1]", gt=0)
    out_multiplier: float = option(1.0, "factor on what the block adds to the residual stream [1]", gt=0)
    stream_multiplier: float = option(1.0, "factor on the residual stream that the block adds to [1]", gt=0)
    canon: int = option(
        0, "taps of a residual causal convolution over what the block reads (Canon layer); 0: none [tokens]", ge=0
    )

    @classmethod
    def label(cls) -> str:
        return cls.block_name

    @property
    def canon_params(self) -> int:
        """Weights of the block's Canon layer, and half of its FLOPs a token [count]."""
        return self.canon * self.d_model

    @property
    def first_width(self) -> int | None:
        """Channels of what the block hands to later ones of its letter, ``aux.first``; None: nothing."""
        return None

    @property
    def reads_first(self) -> bool:
        """Whether the block reads what the first of its letter hands on, and so cannot be the first."""
        return False

    @property
    def own_params(self) -> int:
        """Weights among ``cost``'s parameters that each layer has for itself where layers share the block [count]."""
        return 0

    @property
    def causal(self) -> bool:
        """Whether output t depends on inputs up to t alone, so that the block can generate."""
        return True

    def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
        """Return the block's cost at a sequence length, states that may be reduced in precision at ``dtype_bytes``."""
        raise NotImplementedError

    def kernel_flops(self) -> dict[str, float]:
        """Return kernel -> FLOPs of one token, of ``cost``'s, for kernels that are no matrix products.

        The keys are names of packages in ``hybridnas.kernels``. Such FLOPs are declared by a formula, since a kernel
        may compute the same in another way (chunks of matrix products, for example).
        """
        return {}

    def canonical(self) -> dict[str, Any]:
        """Return the fields that define the function computed, defaults resolved: the block's part of a fingerprint."""
        return self.to_dict()


class Block(nn.Module, ABC):
    """One residual sub-layer's inside: ``y = block(x)``, without the norm and the residual around it."""

    Config: ClassVar[type[BlockConfig]]
    letter: ClassVar[str]  # set by register_block
    name: ClassVar[str]  # set by register_block
    same_as: ClassVar[str] = ""  # letter whose block is this function at the same fields: fingerprints have that one
    float32: ClassVar[tuple[str, ...]] = ()  # parameters and buffers never narrower than float32 in any model
    no_decay: ClassVar[tuple[str, ...]] = ()  # matrices that weight decay leaves alone
    # modules or parameters that the output is linear in: zero, they make the block add nothing
    outputs: ClassVar[tuple[str, ...]] = ("out_proj",)
    role: ClassVar[Role] = "mixer"  # whether it mixes tokens, by attention or another way, or treats each by itself
    takes_segments: ClassVar[bool] = False  # whether forward has the parameter segments_BL, found by its signature
    takes_first: ClassVar[bool] = False  # the same for first_BLX
    takes_embedding: ClassVar[bool] = False  # the same for embedding_BLD

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        parameters = inspect.signature(cls.forward).parameters
        cls.takes_segments, cls.takes_first = "segments_BL" in parameters, "first_BLX" in parameters
        cls.takes_embedding = "embedding_BLD" in parameters

    def __init__(self, config: Any, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__()
        self.config = config
        self.impl = impl

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        """Return the configurations that the contract tests run; override it so that every code path is in one."""
        return [Variant()]

    @abstractmethod
    def forward(self, x_BLD: Tensor, state: State | None = None) -> BlockOutput:
        """Map (B, L, D) to (B, L, D). With a state, continue from it and return the next one; without, start fresh.

        A block that mixes tokens should have a third parameter ``segments_BL: Tensor | None = None``: the number of
        each token's document, int64 (B, L), never given with a state. No document sees another, and each is read as a
        sequence of its own. Without that parameter a model reads packed documents as padded rows, one of each.

        Beside the residual stream a model hands a tensor from the first block of a letter to the later ones, for the
        same tokens: what the first returns as ``aux.first``, those with a parameter ``first_BLX: Tensor | None
        = None`` read, which is None for the first one itself. A parameter ``embedding_BLD: Tensor | None = None`` is
        what the model's first layer reads. A block with ``own_weights`` has a parameter ``own``: those of the place.
        """

    @abstractmethod
    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Return the state of a sequence of which nothing has been read yet."""

    def one_token(self, norm: nn.Module, state: State) -> Callable[[Tensor], Tensor] | None:
        """Return a fast x (B, D) -> x + block(norm(x)) for decoding, or None where there is none but ``forward``.

        It owns the state from now on and overwrites it, and may overwrite x. It may read the weights once, here. The
        norm is any module from (B, D) to (B, D), called once a token, whose numbers may change from call to call: with
        options around the block it hands over what the block reads, and x is 0.
        Called without gradients, in evaluation.
        """
        return None

    @abstractmethod
    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw fresh weights; ``init_scale`` is the s of truncated normal std sqrt(s / fan_in)."""

    def own_weights(self, init_scale: float) -> nn.Module | None:
        """Return fresh weights that one more layer which shares the block has for itself; None: it shares all.

        They come as ``own`` to ``forward``; the first layer gets None and uses those in the block.
        """
        return None

    def after_step(self, counts: Mapping[str, Tensor]) -> None:
        """Update what is learned without gradients; training calls it once after every optimizer step.

        ``counts``: the block's statistics of integers, by name, each summed over all uses of the block, passes and
        ranks of that step. Called without gradients.
        """

    def implementations(self, device: torch.device) -> dict[str, str]:
        """Return operation -> words on what computes it on a device, for ``describe``."""
        return {}

    def widen(self) -> None:
        """Make what is named in ``float32`` and is narrower (bfloat16, float16) float32."""
        self._apply(lambda tensor: tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Block:
        """Convert as torch does (``to``, ``bfloat16``, ``cuda`` ... all end here), but narrow nothing in ``float32``.

        A parameter or buffer named there goes to the device that ``fn`` puts it on; where ``fn`` would leave it
        narrower than float32 it is float32 there, without being rounded on the way.
        """
        named = [t for name, t in (*self.named_parameters(), *self.named_buffers()) if name in self.float32]
        kept = {id(tensor) for p in named for tensor in (p, p.grad) if tensor is not None}

        def convert(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            if id(tensor) in kept and found.is_floating_point() and torch.finfo(found.dtype).bits < 32:
                return tensor.to(found.device, torch.float32)
            return found

        super()._apply(convert, recurse)  # type: ignore[no-untyped-call]
        return self


def map_state(function: Callable[..., Tensor], first: S, *others: State) -> S:
    """Return the state of ``function(tensor, *others' tensors)`` for each tensor of a state, of the same tuple class.

    A state may be a plain tuple, of one tensor or of none too, or a NamedTuple.
    """
    tensors = [function(*parts) for parts in zip(first, *others, strict=True)]
    kind = type(first)
    return kind(*tensors) if hasattr(kind, "_fields") else kind(tensors)


def truncated_normal_(weight: Tensor, fan_in: int, scale: float) -> None:
    """Fill with N(0, scale / fan_in) cut at +-2 * scale, as the MoE-Mamba code does (not at 2 std)."""
    with torch.no_grad():
        nn.init.trunc_normal_(weight, mean=0.0, std=math.sqrt(scale / fan_in), a=-2 * scale, b=2 * scale)
