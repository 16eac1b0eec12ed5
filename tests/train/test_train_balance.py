"""The correction bias of routed experts in training: once per optimizer step, from all of the step's choices."""

import pytest
import torch
from counting import Counting, arch_of, ctrl_c_at, run, same_bits, settings

from hybridnas.arch.model import HybridLM
from hybridnas.train.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

BALANCED = {
    "router": "top_k",
    "top_k": 2,
    "scores": "sigmoid",
    "correction_bias": True,
    "bias_update_rate": 0.01,
    "load_balance_weight": 0.0,
    "capacity_factor": None,
}


def balanced(pattern="ME"):
    return arch_of(pattern, **BALANCED)


def biases(model):
    return torch.stack([value for name, value in model.state_dict().items() if name.endswith("correction_bias")])


def test_a_step_moves_each_bias_once_however_the_batch_is_cut():
    whole = run(None, settings(tokens=64), balanced())
    steps = biases(whole.model) / 0.01
    assert set(steps.flatten().tolist()) <= {-1.0, 0.0, 1.0}
    assert steps.abs().sum() > 0
    cut = run(None, settings(tokens=64, batch_size=1, accumulate=4), balanced())
    assert torch.equal(biases(cut.model), biases(whole.model))


def test_a_run_that_was_interrupted_has_the_same_biases(tmp_path):
    undisturbed = run(tmp_path / "whole", arch=balanced())
    assert biases(undisturbed.model).abs().sum() > 0
    source = Counting(ctrl_c_at(4))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", arch=balanced(), source=source)
    same_bits(run(tmp_path / "cut", arch=balanced(), source=source), undisturbed)


def test_measuring_moves_no_bias():
    model = HybridLM(balanced())
    evaluate(model, Counting(), n_tokens=64, batch_size=2, seq_len=16, device=torch.device("cpu"), precision="float32")
    assert not biases(model).any()


def test_a_shared_block_learns_from_all_its_uses():
    model = HybridLM(balanced("E@a E@a"))
    model.after_step(
        {"layer00.E.chosen_E": torch.tensor([4, 0, 0, 0]), "layer01.E.chosen_E": torch.tensor([0, 2, 1, 1])}
    )
    (bias,) = {tuple(bias.tolist()) for bias in biases(model)}
    torch.testing.assert_close(torch.tensor(bias), torch.tensor([-0.01, 0.0, 0.01, 0.01]))
