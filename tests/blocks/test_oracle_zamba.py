"""Zamba's block against transformers' Zamba2 layer: outputs, gradients; each place's weights; one branch as a layer."""

import pytest
import torch
from oracles import randomize, relative_errors

import hybridnas
from hybridnas.arch.model import HybridLM
from hybridnas.blocks.zamba import Zamba
from hybridnas.errors import ConfigError

pytest.importorskip("transformers")
WIDTH, HEADS, HIDDEN, RANK = 16, 4, 40, 3


class Theirs(torch.nn.Module):
    """Their shared layer at its second place, and the linear layer behind it."""

    def __init__(self, adapted, rope):
        super().__init__()
        from transformers.models.zamba2 import modeling_zamba2 as module

        config = module.Zamba2Config(
            hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=HIDDEN, adapter_rank=RANK,
            num_hidden_layers=2, layers_block_type=["hybrid", "hybrid"], use_shared_attention_adapter=adapted,
            use_mem_rope=rope, attn_implementation="eager",
        )  # fmt: skip
        self.layer = module.Zamba2AttentionDecoderLayer(config, block_id=0)
        self.linear = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.turn = module.Zamba2RotaryEmbedding(config) if rope else None

    def forward(self, x, embedding):
        length = x.shape[1]
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)[None, None]
        positions = None if self.turn is None else self.turn(x, torch.arange(length)[None])
        return self.linear(self.layer(x, embedding, 1, attention_mask=mask, position_embeddings=positions))


@pytest.mark.parametrize(("adapted", "rope"), [(False, False), (True, True)])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_outputs_and_gradients_equal_the_shared_layer_of_zamba2(dtype, most, adapted, rope):
    # their norms and angles are float32 in any model
    torch.manual_seed(0)
    theirs = Theirs(adapted, rope).to(dtype)
    randomize(theirs)
    positions = "rope" if rope else "none"
    ours = Zamba(
        Zamba.Config(
            d_model=WIDTH, n_heads=HEADS, d_ff=HIDDEN, mlp_rank=RANK, attention_rank=RANK if adapted else 0,
            positions=positions,
        )
    ).to(dtype)  # fmt: skip
    names = {"norm": "input_layernorm", "ff_norm": "pre_ff_layernorm", "out_proj": "self_attn.o_proj"}
    names |= {"up_proj": "feed_forward.gate_up_proj", "down_proj": "feed_forward.down_proj"}
    pairs = [(f"{own}.weight", None, f"layer.{other}.weight", None) for own, other in names.items()]
    pairs.append(("own.linear.weight", None, "linear.weight", None))
    for half in (0, 1):
        adapter = f"layer.feed_forward.gate_up_proj_adapter_list.1.{half}.weight"
        pairs.append((f"own.up.{half}.weight", None, adapter, None))
        if adapted:
            pairs += [
                (f"own.qkv.{i}.{half}.weight", None, f"layer.self_attn.linear_{x}_adapter_list.1.{half}.weight", None)
                for i, x in enumerate("qkv")
            ]
    for i, x in enumerate("qkv"):
        rows = slice(2 * WIDTH * i, 2 * WIDTH * (i + 1))
        pairs.append(("qkv_proj.weight", rows, f"layer.self_attn.{x}_proj.weight", None))
    make = torch.Generator().manual_seed(1)
    x, embedding = (torch.randn(2, 21, WIDTH, generator=make, dtype=dtype) for _ in range(2))
    output, gradients = relative_errors(
        ours, theirs, pairs, x,
        run_ours=lambda block, x: block(x, embedding_BLD=embedding).y_BLD,
        run_theirs=lambda block, x: block(x, embedding),
    )  # fmt: skip
    assert output <= most
    assert gradients <= most


SHARED = "[Z{skip=true,norm_position=post,mlp_rank=2,attention_rank=3}@sM]"


def test_layers_that_share_the_block_have_linear_layers_and_adapters_of_their_own():
    arch = hybridnas.Arch.from_pattern(f"M{SHARED}M{SHARED}", d_model=16, vocab_size=23)
    model, cost = HybridLM(arch), arch.cost(8)
    assert sum(p.numel() for p in model.parameters()) == cost.params + cost.embedding_params
    first, second = (dict(model.layers[i].named_parameters()) for i in (1, 3))
    assert first["branches.0.0.qkv_proj.weight"] is second["branches.0.0.qkv_proj.weight"]
    own = {name.removeprefix("own.0_0.") for name in second if name.startswith("own.0_0.")}
    assert own == {name.removeprefix("branches.0.0.own.") for name in first if name.startswith("branches.0.0.own.")}
    assert not torch.equal(first["branches.0.0.own.linear.weight"], second["own.0_0.linear.weight"])


def test_the_block_reads_the_embedding_whatever_stands_before_it():
    model = hybridnas.build("FZ", d_model=16, vocab_size=23).eval()
    read = []
    model.layers[1].branches[0][0].norm.register_forward_hook(lambda module, given, out: read.append(given[0]))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        model(ids)
        assert torch.equal(read[0][..., 16:], model.embedding(ids))
        assert not torch.equal(read[0][..., :16], read[0][..., 16:])


def test_one_branch_of_several_blocks_is_one_residual_layer():
    arch = hybridnas.Arch.from_pattern("[FM]", d_model=16, vocab_size=23)
    assert (len(arch.layers), str(arch.pattern)) == (1, "[FM]")
    assert arch.fingerprint() != hybridnas.Arch.from_pattern("FM", d_model=16, vocab_size=23).fingerprint()
    model, ids = HybridLM(arch).eval(), torch.arange(10)[None]
    mlp, mamba = model.layers[0].branches[0]
    with torch.no_grad():
        x = model.embedding(ids)
        expected = model.head(x + mamba(mlp(model.layers[0].norm(x)).y_BLD).y_BLD)
        torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("fields", "field", "got"),
    [
        ({"n_heads": 3}, "n_heads", 3),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads", 3),
        ({"head_dim": 5, "positions": "rope"}, "head_dim", 5),
    ],
)
def test_heads_that_do_not_fit_are_refused(fields, field, got):
    with pytest.raises(ConfigError) as caught:
        Zamba.Config(d_model=16, **fields)
    assert (caught.value.field.rpartition(".")[2], caught.value.got) == (field, got)
