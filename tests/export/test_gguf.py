"""GGUF files: every tensor under a name of gguf's map for the architecture, with llama.cpp's shapes."""

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

import hybridnas
from hybridnas.data.tokenizers import END_OF_TEXT, ByteTokenizer, FastTokenizer, train_bpe
from hybridnas.errors import ConfigError
from hybridnas.export.gguf import TARGETS, export_gguf, gguf_fit
from hybridnas.export.hf.fitting import fit
from tests.export.test_hf_writing import DELTA, OURS, RMS

gguf = pytest.importorskip("gguf")

PATTERNS = {"nemotron_h": ["NENAEA", "NFNAFA"], "qwen3_next": ["GEAEGE"]}  # llama.cpp's has MLPs or experts
CASES = [(name, pattern) for name in TARGETS for pattern in PATTERNS.get(name, [OURS[name][0]])]


LIKE_KEYS = {"qwen3_next": {"G": {**DELTA, "n_value_heads": 4, "value_head_dim": DELTA["head_dim"]}}}


def built(name, pattern, **changes):
    given = {**OURS[name][1], **LIKE_KEYS.get(name, {})}
    fields = {key: value for key, value in given.items() if len(key) > 1 or key in pattern}
    return hybridnas.build(hybridnas.Arch.from_pattern(pattern, **{**RMS, **fields, **changes}))


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_a_file_has_the_tensors_that_the_architecture_of_llama_cpp_has(name, pattern, tmp_path):
    model = built(name, pattern)
    path, architecture, _ = export_gguf(model, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == architecture
    kinds = gguf.MODEL_TENSORS[{value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture]]
    known = {gguf.TENSOR_NAMES[kind] for kind in kinds} | {
        "output"
    }  # which gguf leaves out of some, and llama.cpp reads
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for key in stored:
        stem = key.removesuffix(".weight").removesuffix(".bias")
        parts = stem.split(".")
        assert (".".join(["blk", "{bid}", *parts[2:]]) if parts[0] == "blk" else stem) in known, key
    blocks = reader.fields[f"{architecture}.block_count"].contents()
    assert {int(key.split(".")[1]) for key in stored if key.startswith("blk.")} == set(range(blocks))
    expected = sum(parameter.numel() for parameter in model.parameters())
    added = [key for key in stored if "exp_probs_b" in key or ("shexp" in key and not _has_shared(model))]
    assert sum(int(stored[key].n_elements) for key in set(stored) - set(added)) == expected
    embedding = torch.from_numpy(stored["token_embd.weight"].data.copy())
    assert torch.equal(embedding, model.embedding.weight)


def _has_shared(model):
    return any(getattr(node.config, "d_shared", 0) for node in model.arch.nodes)


def test_a_file_has_the_tokenizer_of_the_model(tmp_path):
    bpe = train_bpe(["the cat sat on the mat, the cat sat"] * 9, 264)
    for tokenizer in (ByteTokenizer(), bpe):
        model = built("llama", "AF", vocab_size=270)
        path, _, without = export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
        assert without == ""
        found = {key: value.contents() for key, value in gguf.GGUFReader(path).fields.items() if "tokenizer" in key}
        tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
        assert (len(tokens), len(set(tokens))) == (270, 270)
        assert tokens[tokenizer.separator] == END_OF_TEXT
        assert [number for number, kind in enumerate(kinds) if kind == 3] == [tokenizer.separator]
        assert kinds.count(5) == 270 - tokenizer.vocab_size
        assert found["tokenizer.ggml.eos_token_id"] == tokenizer.separator
    assert len(found["tokenizer.ggml.merges"]) == bpe.vocab_size - 257
    assert found["tokenizer.ggml.merges"][0] == "a t"


def other_tokenizer(model, pre, decoder=None):
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer, fast.decoder = pre, decoder
    return FastTokenizer(fast, separator=0)


@pytest.mark.parametrize(
    "tokenizer",
    [
        None,
        other_tokenizer(models.WordLevel({"a": 0}, "a"), pre_tokenizers.Whitespace()),
        other_tokenizer(
            models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            decoders.ByteLevel(),
        ),
    ],
    ids=["none", "words", "another-way-to-split"],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_left_out_with_the_reason(tokenizer, tmp_path):
    path, _, without = export_gguf(built("llama", "AF"), tmp_path / "model.gguf", tokenizer=tokenizer)
    assert "tokenizer" in without
    fields = gguf.GGUFReader(path).fields
    assert [key for key in fields if key.startswith("tokenizer")] == ["tokenizer.ggml.model"]
    assert fields["tokenizer.ggml.model"].contents() == "no_vocab"


def multiplied():
    """A tied Falcon-H1 with a multiplier of every kind."""
    factors = {"in_multiplier": 0.5, "out_multiplier": 3.0}
    own = OURS["falcon_h1"][1]
    blocks = {"A": {**own["A"], **factors}, "N": factors, "F": {**own["F"], "out_multiplier": 0.25}}
    around = {"tie_embeddings": True, "embedding_multiplier": 2.0, "logits_multiplier": 5.0}
    return built("falcon_h1", "[A,N]F", vocab_size=260, **blocks, **around)


def test_multipliers_of_falcon_h1_become_part_of_the_matrices(tmp_path):
    model = multiplied()
    path, _, _ = export_gguf(model, tmp_path / "model.gguf")
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(path).tensors}
    assert torch.equal(stored["token_embd.weight"], 2 * model.embedding.weight)
    assert torch.equal(stored["output.weight"], 5 * model.embedding.weight)
    attention, mlp = (next(n.module for n in model.arch.nodes if n.slot.letter == letter) for letter in "AF")
    own = dict(zip((node.module for node in model.arch.nodes), model.blocks(), strict=True))
    assert torch.equal(stored["blk.0.attn_output.weight"], 3 * own[attention].out_proj.weight)
    assert torch.equal(stored["blk.0.ffn_down.weight"], 0.25 * own[mlp].ff.down_proj.weight)


@pytest.mark.parametrize(
    ("name", "pattern", "changes", "field"),
    [
        ("qwen3_next", "GEAE", {"G": DELTA}, "linear_value_head_dim"),
        ("llama", "AF", {"F": {"activation": "gelu", "gated": True, "bias": False}}, "hidden_act"),
        ("mamba", "MM", {"M": {"expand": 3}}, "expand"),
    ],
)
def test_an_option_that_llama_cpp_lacks_is_named(name, pattern, changes, field):
    arch = built(name, pattern, **changes).arch
    assert fit(arch, name)
    with pytest.raises(ConfigError) as error:
        gguf_fit(arch)
    assert f"has {field}=" in str(error.value)
    assert "layer 0 is" not in str(error.value)  # of the architectures with another pattern nothing is said


def test_what_llama_cpp_lacks_is_refused():
    mixed = built("nemotron_h", "NFAE").arch
    assert fit(mixed, "nemotron_h")
    with pytest.raises(ConfigError) as error:
        gguf_fit(mixed)
    assert (error.value.field, error.value.got) == ("format", "gguf")
    assert "MLPs or experts" in str(error.value)
    with pytest.raises(ConfigError):
        gguf_fit(hybridnas.preset("moe_mamba"))
