"""GGUF files: every tensor under a name of gguf's map for the architecture, with llama.cpp's shapes."""

import pytest
import torch

import hybridnas
from hybridnas.errors import ConfigError
from hybridnas.export.gguf import TARGETS, export_gguf, gguf_fit
from hybridnas.export.hf.fitting import fit
from tests.export.test_hf_writing import OURS, RMS

gguf = pytest.importorskip("gguf")

PATTERNS = {"nemotron_h": ["NENAEA", "NFNAFA"]}  # llama.cpp's has MLPs or experts
CASES = [(name, pattern) for name in TARGETS for pattern in PATTERNS.get(name, [OURS[name][0]])]


def built(name, pattern):
    fields = {key: value for key, value in OURS[name][1].items() if len(key) > 1 or key in pattern}
    return hybridnas.build(hybridnas.Arch.from_pattern(pattern, **RMS, **fields))


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_a_file_has_the_tensors_that_the_architecture_of_llama_cpp_has(name, pattern, tmp_path):
    model = built(name, pattern)
    path, architecture = export_gguf(model, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == architecture
    kinds = gguf.MODEL_TENSORS[{value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture]]
    known = {gguf.TENSOR_NAMES[kind] for kind in kinds}
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


def test_what_llama_cpp_lacks_is_refused():
    mixed = built("nemotron_h", "NFAE").arch
    assert fit(mixed, "nemotron_h")
    with pytest.raises(ConfigError) as error:
        gguf_fit(mixed)
    assert (error.value.field, error.value.got) == ("format", "gguf")
    assert "MLPs or experts" in str(error.value)
    with pytest.raises(ConfigError):
        gguf_fit(hybridnas.preset("moe_mamba"))
