"""Compares a block with a module that somebody else wrote: outputs, and gradients of inputs and parameters."""

import torch
from torch import nn


def relative_errors(ours, theirs, pairs, x_BLD, *, run_ours=None, run_theirs=None, seed=0):
    """Return the largest relative error of outputs and of gradients, after copying their weights into ours.

    ``x_BLD`` may be token ids, which have no gradient.

    ``pairs``: (our parameter, slice or None, their parameter, transform or None): the named parameter of ours (that
    part of it along the first dimension) holds what the transform makes of theirs, and so its gradient, or what the
    transform's ``gradient`` makes of it where there is one (:class:`Scaled`). Every parameter of ours has to be filled.
    ``run_*`` map (module, x) to an output. Errors are relative to the largest entry of the oracle's tensor; gradients
    are those of a random weighting of the outputs, of the input and of every parameter of ours.
    """
    own, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    covered = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in own.items()}
    with torch.no_grad():
        for name, part, their_name, transform in pairs:
            value = other[their_name]
            value = transform(value) if transform is not None else value
            (own[name] if part is None else own[name][part]).copy_(value)
            (covered[name] if part is None else covered[name][part]).fill_(True)
    assert all(bool(whole.all()) for whole in covered.values()), [n for n, w in covered.items() if not bool(w.all())]

    def outcome(module, run):
        x = x_BLD.clone().requires_grad_(x_BLD.is_floating_point())
        y = run(module, x) if run is not None else module(x)
        y = y if isinstance(y, torch.Tensor) else y[0]
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
        module.zero_grad()
        (y * weights).sum().backward()
        return y.detach(), x.grad

    (got, got_x), (expected, expected_x) = outcome(ours, run_ours), outcome(theirs, run_theirs)
    gradients = [] if got_x is None else [relative(got_x, expected_x)]
    for name, part, their_name, transform in pairs:
        wanted = other[their_name].grad if other[their_name].grad is not None else torch.zeros_like(other[their_name])
        wanted = getattr(transform, "gradient", transform)(wanted) if transform is not None else wanted
        gradients.append(relative(own[name].grad if part is None else own[name].grad[part], wanted))
    return relative(got, expected), max(gradients)


class Scaled:
    """A transform of a weight that their module multiplies by a factor, for ours that holds the product."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, weight):
        return weight * self.factor

    def gradient(self, gradient):
        return gradient / self.factor


def relative(got, expected):
    """Return max |got - expected| / max |expected|, the plain difference where all expected is 0."""
    scale = expected.abs().max().item()
    return (got.to(expected.dtype) - expected).abs().max().item() / (scale or 1.0)


def randomize(module: nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Fill every parameter with its present value plus noise, so that no bias, norm or gate hides at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * std)
