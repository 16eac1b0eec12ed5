"""mLSTM against transformers' xLSTM layer: outputs, gradients, states; large gates; documents."""

import pytest
import torch
from oracles import randomize, relative, relative_errors

from hybridnas.blocks.mlstm import Mlstm
from hybridnas.errors import ConfigError

pytest.importorskip("transformers")
WIDTH, HEADS = 32, 2
SMALL_EPS = 1e-30  # theirs passes a gradient through the maximum, which eps alone makes differ from none


def pair(dtype, *, bias=False, eps=1e-6, cap=15.0):
    """Return our block, their layer with the step-by-step kernel of its own, and which parameter is which."""
    from transformers.models.xlstm import modeling_xlstm as module
    from transformers.models.xlstm.configuration_xlstm import xLSTMConfig

    config = xLSTMConfig(
        hidden_size=WIDTH, num_heads=HEADS, num_hidden_layers=1, use_bias=bias,
        norm_reduction_force_float32=False,
    )  # fmt: skip
    vars(config)["gate_soft_cap"] = cap  # the class takes no None, its function does
    torch.manual_seed(0)
    theirs = module.xLSTMLayer(config).to(dtype)
    randomize(theirs)

    def backend(query, key, value, igate, fgate, c_initial=None, n_initial=None, m_initial=None):
        return module.mlstm_recurrent_sequence_native(
            query, key, value, igate, fgate, c_initial, n_initial, m_initial, return_last_states=True, eps=eps,
            dtype_state=dtype,
        )  # fmt: skip

    theirs.mlstm_backend.forward = backend
    options = {"n_heads": HEADS, "head_dim": 8, "bias": bias, "gate_softcap": cap, "denominator_eps": eps}
    ours = Mlstm(Mlstm.Config(d_model=WIDTH, **options)).to(dtype)
    pairs, start = [], 0
    for kind in ("weight", "bias") if bias else ("weight",):
        start = 0
        for name, size in zip(("q", "k", "v", "ogate_preact"), ours.config.columns, strict=True):
            pairs.append((f"in_proj.{kind}", slice(start, start + size), f"{name}.{kind}", None))
            start += size
        pairs += [
            (f"out_proj.{kind}", None, f"out_proj.{kind}", None),
            (f"norm.{kind}", None, f"multihead_norm.{kind}", None),
        ]
    for kind in ("weight", "bias"):
        pairs.append((f"gates.{kind}", slice(0, HEADS), f"igate_preact.{kind}", None))
        pairs.append((f"gates.{kind}", slice(HEADS, None), f"fgate_preact.{kind}", None))
    return ours, theirs, pairs


def run_ours(block, x):
    return block(x).y_BLD


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-4), (torch.float64, 1e-11)])
def test_outputs_and_gradients_equal_the_layer_of_xlstm(dtype, most, bias):
    # float32: h is a quotient whose denominator may be small, and both round it
    ours, theirs, pairs = pair(dtype, bias=bias, eps=SMALL_EPS)
    x = torch.randn(2, 31, WIDTH, generator=torch.Generator().manual_seed(1), dtype=dtype)
    output, gradients = relative_errors(ours, theirs, pairs, x, run_ours=run_ours)
    assert output <= most
    assert gradients <= most


def test_with_the_released_epsilon_outputs_and_states_are_equal_and_gradients_to_its_size():
    ours, theirs, pairs = pair(torch.float64)
    x = torch.randn(2, 31, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output, gradients = relative_errors(ours, theirs, pairs, x, run_ours=run_ours)
    assert output <= 1e-12
    assert gradients <= 1e-4
    with torch.no_grad():
        _, (c, n, m) = theirs(x)
        _, state, _ = ours(x, ours.init_state(2, device=x.device, dtype=x.dtype))
    assert relative(state.memory_BHKV[..., :-1], c) <= 1e-12
    assert relative(state.memory_BHKV[..., -1], n) <= 1e-12
    assert relative(state.maximum_BH, m.squeeze(-1)) <= 1e-12


def test_gates_without_a_cap_may_be_of_any_size():
    ours, theirs, pairs = pair(torch.float64, cap=None, eps=SMALL_EPS)
    with torch.no_grad():
        theirs.igate_preact.weight.mul_(100)
    x = torch.randn(2, 40, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output, gradients = relative_errors(ours, theirs, pairs, x, run_ours=run_ours)
    assert torch.exp(ours._log_gates(x)[0].float()).isinf().any()  # would overflow without the running maximum
    assert output <= 1e-11
    assert gradients <= 1e-8  # through gates of up to e^100


def test_documents_in_a_row_are_the_documents_alone():
    ours, _, _ = pair(torch.float64)
    randomize(ours)
    x = torch.randn(1, 20, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        packed = ours(x, segments_BL=torch.tensor([[0] * 7 + [3] * 1 + [5] * 12])).y_BLD
        alone = torch.cat([ours(part).y_BLD for part in (x[:, :7], x[:, 7:8], x[:, 8:])], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-9)


def test_heads_must_divide_the_values():
    with pytest.raises(ConfigError) as caught:
        Mlstm.Config(d_model=16, n_heads=3)
    assert (caught.value.field.rpartition(".")[2], caught.value.got) == ("n_heads", 3)
