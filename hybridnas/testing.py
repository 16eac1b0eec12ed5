"""The contract of blocks and tasks as checks, for tests of one's own::

    from hybridnas.testing import check_block

    def test_my_block():
        check_block("V")

The same checks run over every block of this package. A check raises AssertionError that names the block, its options
and what does not hold. Shapes: B batch, L length, D d_model.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.layers.block import Block, State, Variant, map_state
from hybridnas.registry import BLOCKS

WIDTH = 16  # d_model of most checks
Check = Callable[[type[Block], Variant], None]
CHECKS: dict[str, Check] = {}  # what a block promises, as a sentence -> the check of it under one variant
CAUSAL: set[str] = set()  # of these, those that only a causal block promises
SLOW = {"it exports"}  # more than a second each


def check_block(block: str | type[Block], *, skip: Sequence[str] = ()) -> None:
    """Check a registered block, given as its letter or class, under all variants of its ``test_configs()``.

    ``skip`` leaves out checks by their names in ``CHECKS``. Raises AssertionError for the first that does not hold.
    """
    cls = BLOCKS.get(block) if isinstance(block, str) else block
    variants = list(cls.test_configs())
    for name in skip:
        if name not in CHECKS:
            raise ConfigError(
                f"check_block has no check {name!r}; allowed: {', '.join(CHECKS)}",
                field="skip",
                got=name,
                allowed=tuple(CHECKS),
            )
    for name, check in CHECKS.items():
        for variant in variants:
            if name in skip or (name in CAUSAL and not config_of(cls, variant).causal):
                continue
            try:
                check(cls, variant)
            except Exception as error:
                where = f"block {cls.letter} {cls.name} with {dict(variant.fields) or 'its defaults'}"
                raise AssertionError(f"{where}: not so that {name}: {type(error).__name__}: {error}") from error


def check_task(name: str, settings: Mapping[str, Any] | None = None) -> None:
    """Check a registered task, ``data=NAME``, with its default settings or the given ones.

    Ids lie inside the vocabulary, something is scored, equal numbers give equal examples, another seed gives others,
    and no example is both trained on and held out. Raises AssertionError.
    """
    from hybridnas.data import open_source, source_config

    config = source_config({"kind": name, **(settings or {})})
    source, again = open_source(config), open_source(config)
    length = source.seq_len
    _require(length is not None, f"task {name}: its seq_len must say how long an example is")
    assert length is not None
    first, same = source.train_batch(0, 8, length, 0), again.train_batch(0, 8, length, 0)
    held_out = next(iter(source.valid_batches(8 * length, 8, length)))
    for words, batch in (("training", first), ("held-out", held_out)):
        for part, ids_BL in (("inputs", batch.inputs_BL), ("targets", batch.targets_BL)):
            scored = ids_BL if batch.mask_BL is None or part == "inputs" else ids_BL[batch.mask_BL]
            inside = bool(((scored >= 0) & (scored < source.vocab_size)).all())
            _require(inside, f"task {name}: {part} of {words} examples lie outside 0..{source.vocab_size - 1}")
        _require(
            batch.mask_BL is None or bool(batch.mask_BL.any(dim=1).all()),
            f"task {name}: a {words} example has no place that is scored (mask_BL)",
        )
    _require(
        torch.equal(first.inputs_BL, same.inputs_BL) and torch.equal(first.targets_BL, same.targets_BL),
        f"task {name}: the same step gives other examples when the task is opened again; draw from 'draws' alone",
    )
    other = source.train_batch(1, 8, length, 0)
    _require(
        not torch.equal(first.inputs_BL, other.inputs_BL), f"task {name}: every step has the same inputs; draw new ones"
    )
    seen = {tuple(row) for batch in (first, other) for row in batch.inputs_BL.tolist()}
    both = seen & {tuple(row) for row in held_out.inputs_BL.tolist()}
    _require(not both, f"task {name}: an example is both trained on and held out")


# What the checks stand on.


def config_of(cls: type[Block], variant: Variant, d_model: int = WIDTH) -> Any:
    """Return a block's config under a variant."""
    return cls.Config(d_model=d_model, **variant.fields)


def build(
    cls: type[Block], variant: Variant, d_model: int = WIDTH, seed: int = 0, fields: Mapping[str, Any] | None = None
) -> Block:
    """Return a block in evaluation mode with weights of order one, so that an error shows at the tolerances below."""
    torch.manual_seed(seed)
    block = cls(cls.Config(d_model=d_model, **(variant.fields if fields is None else fields)))
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name in block.float32 and "router" not in name:
                continue  # step sizes and decays keep the range of their initialisation
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter.shape[-2] ** -0.5)
            elif parameter.dim() == 1 and name.endswith("bias"):
                parameter.normal_(std=0.1)
    return block.eval()


def tokens(batch: int, length: int, d_model: int = WIDTH, seed: int = 1) -> Tensor:
    """Return inputs (B, L, D), the same for the same seed."""
    return torch.randn(batch, length, d_model, generator=torch.Generator().manual_seed(seed))


def run_in_chunks(block: Block, x_BLD: Tensor, lengths: Sequence[int]) -> tuple[Tensor, State]:
    """Return output (B, L, D) and last state of a sequence that is read in pieces of these lengths."""
    state: State | None = block.init_state(x_BLD.shape[0], device=x_BLD.device, dtype=x_BLD.dtype)
    outputs = []
    for part in torch.split(x_BLD, list(lengths), dim=1):
        y_BLD, state, _ = block(part, state)
        outputs.append(y_BLD)
    assert state is not None
    return torch.cat(outputs, dim=1), state


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Raise AssertionError unless two tensors agree to 1e-5 of the largest value."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * max(scale, 1.0))


def _require(holds: bool, words: str) -> None:
    if not holds:
        raise AssertionError(words)


def _check(name: str, *, causal: bool = False) -> Callable[[Check], Check]:
    def decorate(function: Check) -> Check:
        CHECKS[name] = function
        if causal:
            CAUSAL.add(name)
        return function

    return decorate


# The checks, cheapest first.


@_check("its state is a tuple of tensors, batch first", causal=True)
def _state_is_a_tuple(cls: type[Block], variant: Variant) -> None:
    block = build(cls, variant)
    first = block.init_state(2, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        _, after, _ = block(tokens(2, 3), first)
    for words, state in (("init_state returns", first), ("forward with a state returns", after)):
        _require(
            isinstance(state, tuple) and all(isinstance(tensor, Tensor) for tensor in state),
            f"{words} {type(state).__name__}; it must be a tuple of tensors (a NamedTuple will do), () without a state",
        )
        assert state is not None
        _require(
            all(tensor.shape[:1] == (2,) for tensor in state),
            f"{words} shapes {[tuple(tensor.shape) for tensor in state]}; the first dimension must be the batch, 2",
        )
    assert after is not None
    _require(len(first) == len(after), f"the state has {len(first)} tensors at first and {len(after)} later")


@_check("its declared parameters are the real ones")
def _declared_parameters(cls: type[Block], variant: Variant) -> None:
    for d_model in (16, 48):
        config = config_of(cls, variant, d_model)
        with torch.device("meta"):
            block = cls(config)
        cost = config.cost(64)
        real = sum(parameter.numel() for parameter in block.parameters())
        _require(cost.params == real, f"cost() declares {cost.params:,} parameters, the module has {real:,}")
        _require(0 < cost.active_params <= cost.params, f"cost() declares {cost.active_params:,} active of {real:,}")
        _require(cost.embedding_params == 0, "a block has no embedding_params")


@_check("its declared state bytes are the real ones", causal=True)
def _declared_state_bytes(cls: type[Block], variant: Variant) -> None:
    length, batch = 21, 3
    for dtype in (torch.float32, torch.bfloat16):
        block = build(cls, variant).to(dtype)
        with torch.no_grad():
            _, state = run_in_chunks(block, tokens(batch, length).to(dtype), [13, 1, 7])
        real = sum(tensor.numel() * tensor.element_size() for tensor in state) / batch
        declared = block.config.cost(length, dtype_bytes=dtype.itemsize).state_bytes
        _require(real == declared, f"cost() declares {declared:,} bytes of state in {dtype}, the state has {real:,}")


@_check("whole sequence, token by token and halves agree", causal=True)
def _pieces_agree(cls: type[Block], variant: Variant) -> None:
    block = build(cls, variant)
    for length in (1, 2, 7, 19):
        x_BLD = tokens(2, length)
        with torch.no_grad():
            whole_BLD, none, _ = block(x_BLD)
            _require(none is None, "forward without a state must return None as the state")
            _require(whole_BLD.shape == x_BLD.shape, f"maps {tuple(x_BLD.shape)} to {tuple(whole_BLD.shape)}")
            assert_same(run_in_chunks(block, x_BLD, [1] * length)[0], whole_BLD)
            assert_same(run_in_chunks(block, x_BLD, [length])[0], whole_BLD)
            if length > 1:
                assert_same(run_in_chunks(block, x_BLD, [length // 2, length - length // 2])[0], whole_BLD)


@_check("documents packed into one row give what each gives alone", causal=True)
def _documents_are_apart(cls: type[Block], variant: Variant) -> None:
    """Outputs and gradients, in float32 and float64; for a block that leaves documents to the model, nothing."""
    if not (cls.takes_segments or cls.role == "feed_forward"):
        return
    ends, length = [(5, 6, 15), (19,), (2, 11, 12, 18)], 19  # of the documents of each row
    for dtype in (torch.float32, torch.float64):
        block = build(cls, variant).to(dtype)
        x_BLD, weight_BLD = tokens(3, length).to(dtype), tokens(3, length, seed=2).to(dtype)
        segments_BL = torch.stack([2 * (torch.arange(length)[:, None] >= torch.tensor(of)).sum(1) for of in ends])
        packed = {"segments_BL": segments_BL} if cls.takes_segments else {}
        given_BLD = x_BLD.clone().requires_grad_()
        whole_BLD = block(given_BLD, **packed).y_BLD
        whole = torch.autograd.grad((whole_BLD * weight_BLD).sum(), [given_BLD, *block.parameters()], allow_unused=True)
        alone_BLD, alone = torch.zeros_like(x_BLD), [torch.zeros_like(t) for t in (x_BLD, *block.parameters())]
        for row, of in enumerate(ends):
            for first, last in zip((0, *of), (*of, length), strict=True):
                if first == last:
                    continue
                own_BLD = x_BLD[row : row + 1, first:last].clone().requires_grad_()
                y_BLD = block(own_BLD).y_BLD
                alone_BLD[row, first:last] = y_BLD[0].detach()
                loss = (y_BLD * weight_BLD[row, first:last]).sum()
                own, *rest = torch.autograd.grad(loss, [own_BLD, *block.parameters()], allow_unused=True)
                alone[0][row, first:last] = own[0]
                for total, gradient in zip(alone[1:], rest, strict=True):
                    total += 0 if gradient is None else gradient
        tolerance = 2e-5 if dtype == torch.float32 else 1e-10
        for got, expected in zip((whole_BLD, *whole), (alone_BLD, *alone), strict=True):
            scale = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(
                torch.zeros_like(expected) if got is None else got, expected, rtol=0, atol=tolerance * scale
            )


@_check("later inputs do not touch earlier outputs", causal=True)
def _is_causal(cls: type[Block], variant: Variant) -> None:
    block, x_BLD = build(cls, variant), tokens(2, 19)
    with torch.no_grad():
        before_BLD = block(x_BLD).y_BLD
        for t in (1, 11, 18):
            changed_BLD = x_BLD.clone()
            changed_BLD[:, t:] = 10 * tokens(2, 19, seed=5)[:, t:]
            after_BLD = block(changed_BLD).y_BLD
            torch.testing.assert_close(after_BLD[:, :t], before_BLD[:, :t], rtol=0, atol=1e-6)
            _require(not torch.allclose(after_BLD[:, t], before_BLD[:, t]), f"output {t} does not depend on input {t}")


def _with_gradients(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    return module


def _within_a_module(module: nn.Module) -> nn.Module:
    narrow = nn.Sequential(nn.Identity(), nn.ModuleList([module])).bfloat16()
    inner = narrow[1]
    assert isinstance(inner, nn.ModuleList)
    return inner[0]


_CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to": lambda module: module.to(torch.bfloat16),
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "type": lambda module: module.type(torch.bfloat16),
    "within a module": _within_a_module,
    "twice": lambda module: module.double().half().bfloat16(),
    "with a gradient": lambda module: _with_gradients(module).bfloat16(),
}


@_check("parameters declared float32 keep their bits when the block is narrowed")
def _float32_is_kept(cls: type[Block], variant: Variant) -> None:
    wide = build(cls, variant)
    before = dict(wide.named_parameters())
    for way, cast in _CASTS.items():
        block = copy.deepcopy(wide)
        _require(cast(block) is block, f"{way}: another module comes back")
        for name, parameter in block.named_parameters():
            kept = name in block.float32
            _require((parameter.dtype == torch.float32) == kept, f"{way}: {name} is {parameter.dtype}")
            _require(parameter.grad is None or parameter.grad.dtype == parameter.dtype, f"{way}: gradient of {name}")
            _require(not kept or torch.equal(parameter, before[name]), f"{way}: {name} was rounded")


@_check("parameters declared float32 move between devices and widen")
def _float32_moves(cls: type[Block], variant: Variant) -> None:
    block = build(cls, variant)
    wide = {parameter.dtype for parameter in copy.deepcopy(block).double().parameters()}
    _require(wide == {torch.float64}, f"double() leaves {wide}")
    there = copy.deepcopy(block).to("meta", torch.bfloat16).parameters()
    _require(all(parameter.is_meta for parameter in there), "a parameter does not move to another device")
    narrow = copy.deepcopy(block).bfloat16()
    stored = io.BytesIO()
    torch.save(narrow.state_dict(), stored)
    stored.seek(0)
    again = build(cls, variant, seed=1).bfloat16()
    again.load_state_dict(torch.load(stored, weights_only=True))
    for other in (again, copy.deepcopy(narrow)):
        for name, parameter in other.named_parameters():
            expected = torch.float32 if name in block.float32 else torch.bfloat16
            _require(parameter.dtype == expected, f"{name} is {parameter.dtype}")
            _require(torch.equal(parameter, narrow.get_parameter(name)), f"{name} does not come back")


@_check("names in float32 and no_decay exist in some variant")
def _names_exist(cls: type[Block], variant: Variant) -> None:
    blocks = [build(cls, one) for one in cls.test_configs()]
    parameters = {name for block in blocks for name, _ in block.named_parameters()}
    buffers = {name for block in blocks for name, _ in block.named_buffers()}
    unknown = set(cls.float32) - parameters - buffers
    _require(not unknown, f"float32 names {sorted(unknown)}, which it does not have")
    unknown = set(cls.no_decay) - parameters
    _require(not unknown, f"no_decay names {sorted(unknown)}, which it does not have")


@_check("bfloat16 computes the same within rounding")
def _bfloat16_agrees(cls: type[Block], variant: Variant) -> None:
    block, x_BLD = build(cls, variant), tokens(2, 24)
    narrow = copy.deepcopy(block).bfloat16()
    with torch.no_grad():
        # A router sees rounded inputs, and choosing another expert is no rounding error: most tokens must agree.
        exact_BLD, rounded_BLD = block(x_BLD).y_BLD, narrow(x_BLD.bfloat16()).y_BLD
        _require(rounded_BLD.dtype == torch.bfloat16, f"bfloat16 in, {rounded_BLD.dtype} out")
        _most_agree(rounded_BLD.float(), exact_BLD, exact_BLD, 0.05)
        if block.config.causal:
            stepped_BLD, _ = run_in_chunks(narrow, x_BLD.bfloat16(), [1] * 24)
            _most_agree(stepped_BLD.float(), rounded_BLD.float(), exact_BLD, 0.05)


def _most_agree(got_BLD: Tensor, expected_BLD: Tensor, scale_BLD: Tensor, share: float) -> None:
    near = (got_BLD - expected_BLD).norm(dim=-1) < share * scale_BLD.norm(dim=-1) + 0.02
    agreeing = near.float().mean().item()
    _require(agreeing > 0.9, f"{agreeing:.0%} of the tokens agree")


@_check("a batch without tokens gives an output without tokens")
def _no_tokens(cls: type[Block], variant: Variant) -> None:
    for training in (True, False):
        for batch, length in ((0, 5), (2, 0), (0, 1)):
            block = build(cls, variant).train(training)
            x_BLD = tokens(batch, length).requires_grad_()
            y_BLD, _, aux = block(x_BLD)
            _require(y_BLD.shape == x_BLD.shape, f"maps {tuple(x_BLD.shape)} to {tuple(y_BLD.shape)}")
            total = y_BLD.sum() + sum(aux.losses.values())
            _require(bool(total == 0), f"a loss of {total.item()} without any token")
            total.backward()
            _require(all(p.grad is None or not p.grad.any() for p in block.parameters()), "a gradient without tokens")
            finite = all(bool(torch.isfinite(value).all()) for value in aux.stats.values())
            _require(finite, "statistics that are not finite without tokens")
            if block.config.causal:
                before = block.init_state(batch, device=x_BLD.device, dtype=x_BLD.dtype)
                with torch.no_grad():
                    _, after, _ = block(x_BLD, before)
                _require([tensor.shape[0] for tensor in after] == [batch] * len(before), "the state's batch changes")
                if length == 0:
                    same = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
                    _require(same, "a step without tokens changes the first state")


@_check("a step without tokens leaves the state as it is", causal=True)
def _empty_step(cls: type[Block], variant: Variant) -> None:
    block = build(cls, variant)
    with torch.no_grad():
        _, state = run_in_chunks(block, tokens(2, 6), [6])
        kept = map_state(torch.clone, state)
        _, state, _ = block(tokens(2, 0), state)
    for got, expected in zip(state, kept, strict=True):
        torch.testing.assert_close(got, expected)


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one row for all": lambda t: t[:1].expand_as(t),
    "turned": lambda t: t.transpose(1, -1).contiguous().transpose(1, -1) if t.dim() > 2 else t,
    "no rows": lambda t: t[:0],
}


@_check("the fast step takes a state however it lies in memory", causal=True)
def _fast_step(cls: type[Block], variant: Variant) -> None:
    block = build(cls, variant)
    with torch.no_grad():
        _, state = run_in_chunks(block, tokens(3, 12)[:, :9], [9])
        for name, lay in _LAYOUTS.items():
            given = map_state(lay, state)
            x_BLD = tokens(3, 12)[: 0 if name == "no rows" else 3, 9:]
            y_BLD = block(x_BLD, given).y_BLD
            step = block.one_token(nn.Identity(), given)
            if step is None:
                return
            for x_BD, y_BD in zip(x_BLD.unbind(1), y_BLD.unbind(1), strict=True):
                assert_same(step(x_BD.clone()), x_BD + y_BD)


@_check("hooks on the parts of a block run at every fast step", causal=True)
def _hooks_run(cls: type[Block], variant: Variant) -> None:
    block, x_BLD = build(cls, variant), tokens(2, 6)
    calls: list[int] = []
    with torch.no_grad():
        _, state = run_in_chunks(block, x_BLD[:, :5], [5])
        for name, part in block.named_modules():
            if part is block:
                continue  # whoever decodes looks at these
            handle = part.register_forward_hook(lambda *_: calls.append(1))
            block(x_BLD[:, 5:], state)
            in_forward = bool(calls)
            calls.clear()
            step = block.one_token(nn.Identity(), map_state(torch.clone, state))
            if step is not None:
                step(x_BLD[:, 5].clone())
                _require(bool(calls) == in_forward, f"the hook on {name} does not run as in forward")
            calls.clear()
            handle.remove()


@_check("the default dtype does not touch the numbers", causal=True)
def _default_dtype(cls: type[Block], variant: Variant) -> None:
    block, x_BLD = build(cls, variant), tokens(2, 19)
    with torch.no_grad():
        expected_BLD, state = run_in_chunks(block, x_BLD, [11, 1, 7])
    for default in (torch.float64, torch.bfloat16):
        with _default(default), torch.no_grad():
            got_BLD, other = run_in_chunks(block, x_BLD, [11, 1, 7])
        _require(torch.equal(got_BLD, expected_BLD), f"another output with torch.set_default_dtype({default})")
        same = all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(state, other, strict=True))
        _require(same, f"another state with torch.set_default_dtype({default}); name the dtype of every buffer")


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@_check("gradients reach every parameter and the input")
def _gradients(cls: type[Block], variant: Variant) -> None:
    for training in (True, False):
        block, x_BLD = build(cls, variant).train(training), tokens(2, 24).requires_grad_()
        y_BLD, _, aux = block(x_BLD)
        (y_BLD.square().sum() + sum(aux.losses.values())).backward()
        for name, parameter in block.named_parameters():
            gradient = parameter.grad
            if gradient is None:
                raise AssertionError(f"{name} has no gradient")
            _require(bool(torch.isfinite(gradient).all()), f"the gradient of {name} is not finite")
            reached = bool(gradient.abs().max() > 0)
            _require(
                reached == (name not in variant.without_gradient),
                f"the gradient of {name} is {'not ' * reached}zero; Variant(without_gradient=...) names those that are",
            )
        assert x_BLD.grad is not None
        _require(bool((x_BLD.grad.abs().sum(dim=-1) > 0).float().mean() > 0.5), "most inputs have no gradient")


@_check("its declared FLOPs match torch's counter")
def _declared_flops(cls: type[Block], variant: Variant) -> None:
    d_model, length, batch = 64, 96, 2
    block = build(cls, variant, d_model=d_model, fields={**variant.fields, **variant.flop_fields}).train()
    by_formula = block.config.kernel_flops()
    inside = 0

    def outside_the_count(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            before = counter.get_total_flops()
            found = kernel(*args, **kwargs)
            inside += counter.get_total_flops() - before
            return found

        return run

    with contextlib.ExitStack() as stack:
        for name in by_formula:
            package = importlib.import_module(f"hybridnas.kernels.{name}")
            stack.callback(setattr, package, name, getattr(package, name))
            setattr(package, name, outside_the_count(getattr(package, name)))
        counter = stack.enter_context(FlopCounterMode(display=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.no_grad())
        block(tokens(batch, length, d_model))
    declared = block.config.cost(length).flops_per_token
    _require(all(0 < flops < declared for flops in by_formula.values()), "kernel_flops() must be parts of cost()'s")
    counted = (counter.get_total_flops() - inside) / (batch * length)
    products = declared - sum(by_formula.values())
    _require(
        abs(counted - products) <= 0.01 * abs(products),
        f"cost() declares {products:,.0f} FLOPs a token outside of kernels, torch counts {counted:,.0f}; "
        f"they must agree to 1 %",
    )


@_check("autocast stays finite and keeps state and auxiliary losses in float32")
def _autocast(cls: type[Block], variant: Variant) -> None:
    block, x_BLD = build(cls, variant).train(), tokens(2, 16)
    exact_BLD = block(x_BLD).y_BLD
    with torch.autocast("cpu", torch.bfloat16):
        y_BLD, _, aux = block(x_BLD)
        y_BLD.float().square().mean().backward()
    _require(bool(torch.isfinite(y_BLD).all()), "an output is not finite")
    _most_agree(y_BLD.float(), exact_BLD, exact_BLD, 0.1)
    _require(all(loss.dtype is torch.float32 for loss in aux.losses.values()), "an auxiliary loss is not float32")
    finite = all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in block.parameters())
    _require(finite, "a gradient is not finite")
    if block.config.causal:
        block.eval()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            out_BLD, state = run_in_chunks(block, x_BLD, [9, 1, 6])
        _require(bool(torch.isfinite(out_BLD).all()), "an output is not finite")
        declared = block.init_state(2, device=x_BLD.device, dtype=torch.bfloat16)
        wide = all(a.dtype is torch.float32 for a, b in zip(state, declared, strict=True) if b.dtype is torch.float32)
        _require(wide, "a state that init_state gives as float32 becomes narrower")


@_check("any small width works or is refused in words")
def _small_widths(cls: type[Block], variant: Variant) -> None:
    worked = []
    for d_model in (1, 2, 3, 4):
        try:
            block = cls(cls.Config(d_model=d_model))
        except ConfigError as error:
            _require(bool(error.field), f"d_model={d_model} is refused without naming a field: {error}")
            continue
        worked.append(d_model)
        _require(bool(torch.isfinite(block(tokens(1, 3, d_model)).y_BLD).all()), f"not finite at d_model={d_model}")
        real = sum(parameter.numel() for parameter in block.parameters())
        _require(block.config.cost(3).params == real, f"cost() is not the module's at d_model={d_model}")
    _require(2 in worked, "d_model=2 must work")


@_check("two spellings have one canonical form")
def _canonical(cls: type[Block], variant: Variant) -> None:
    config = config_of(cls, variant)
    canonical = config.canonical()
    names = set(config.field_names())
    spelled_out = config.replace(**{name: value for name, value in canonical.items() if name in names})
    _require(spelled_out.canonical() == canonical, "canonical() of the canonical fields is another one")
    _require(spelled_out.cost(32) == config.cost(32), "the canonical fields have another cost")


@_check("reset draws the same weights from the same seed and new ones from another")
def _reset(cls: type[Block], variant: Variant) -> None:
    block = cls(config_of(cls, variant))
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        block.reset_parameters(0.1)
        drawn.append(torch.cat([parameter.detach().flatten() for parameter in block.parameters()]))
    _require(torch.equal(drawn[0], drawn[1]), "the same seed draws other weights")
    _require(not torch.equal(drawn[0], drawn[2]), "another seed draws the same weights")
    _require(bool(torch.isfinite(drawn[0]).all()), "weights that are not finite")


@_check("the reference implementation agrees", causal=True)
def _reference_agrees(cls: type[Block], variant: Variant) -> None:
    fast = build(cls, variant)
    slow = cls(fast.config, impl=Impl.REFERENCE).eval()
    slow.load_state_dict(fast.state_dict())
    for block in (fast, slow):
        words = block.implementations(torch.device("cpu"))
        _require(all(words.values()), f"implementations() has empty words: {words}")
    with torch.no_grad():
        assert_same(fast(tokens(2, 11)).y_BLD, slow(tokens(2, 11)).y_BLD)


@_check("it exports")
def _exports(cls: type[Block], variant: Variant) -> None:
    block = build(cls, variant)
    program = torch.export.export(block, (tokens(2, 12),))
    with torch.no_grad():
        got, expected = program.module()(tokens(2, 12)), block(tokens(2, 12))
    torch.testing.assert_close(got.y_BLD, expected.y_BLD)
    _require(got.aux.stats.keys() == expected.aux.stats.keys(), "other statistics after torch.export")
