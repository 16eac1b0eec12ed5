"""Zero-cost proxies: scores of an architecture at initialization, from one batch and no training.

Short trainings are compared with them: one that orders architectures no better is not worth its tokens.
Shapes: B batch, L length, D d_model, N tokens that are compared.
"""

from __future__ import annotations

import torch

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.data.source import Source
from hybridnas.train.objective import Objective

_TOKENS = 256  # that naswot compares with each other


def proxies(arch: Arch, source: Source, *, batch_size: int = 8, seq_len: int = 128, seed: int = 0) -> dict[str, float]:
    """Return name -> score of a freshly drawn model on one training batch; by each proxy's paper more is better.

    ``gradient norm``: of the loss (Abdelfattah et al., 2101.08134). ``snip``: sum over weights of |w dL/dw| (Lee et
    al., 1810.02340). ``naswot``: log determinant of the similarity of tokens, by which channels of the last layer are
    positive (Mellor et al., 2006.04647, who use the codes of ReLUs).
    """
    with torch.random.fork_rng(devices=[]):
        model = HybridLM(arch, seed=seed)
        torch.manual_seed(seed)
        batch = source.train_batch(0, batch_size, seq_len, seed)
        objective = Objective(model, vocab_size=source.vocab_size)
        (objective(batch).total / batch.targets_BL.numel()).backward()
        weights = [(weight.detach(), weight.grad) for weight in model.parameters() if weight.grad is not None]
        with torch.no_grad():
            x_ND = model.hidden(batch.inputs_BL, segments_BL=batch.segments_BL).x_BLD.flatten(0, 1)
    x_ND = x_ND[:: max(1, len(x_ND) // _TOKENS)][:_TOKENS]
    codes_ND = torch.where(x_ND > 0, 1.0, -1.0).double()
    alike_NN = (codes_ND @ codes_ND.T + codes_ND.shape[1]) / (2 * codes_ND.shape[1])
    return {
        "gradient norm": float(sum(grad.square().sum() for _, grad in weights)) ** 0.5,
        "snip": float(sum((weight * grad).abs().sum() for weight, grad in weights)),
        "naswot": float(torch.linalg.slogdet(alike_NN + 1e-3 * torch.eye(len(alike_NN))).logabsdet),
    }
