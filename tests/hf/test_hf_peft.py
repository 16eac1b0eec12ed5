"""Adapters of PEFT on our blocks: no block reads the weight of a linear layer past the adapter around it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hybridnas
from hybridnas.registry import BLOCKS
from tests.oracles import randomize, relative

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
import hybridnas.hf  # noqa: E402
from hybridnas.hf import HybridNASForCausalLM  # noqa: E402

LATENT = {"A": {"kv_rank": 6, "head_dim": 4, "n_heads": 2, "rope_dim": 2}}
ROUTED = {"E": {"n_experts": 3, "router": "top_k", "top_k": 2, "renormalize": True, "d_shared": 8}}
CASES: list[tuple[str, dict[str, Any]]] = [(letter, {}) for letter in sorted(BLOCKS)]
CASES += [("A", LATENT), ("E", ROUTED), ("L", {"L": {"kind": "gla"}})]


def adapted(pattern: str, fields: dict[str, Any]) -> Any:
    model = hybridnas.build(f"{pattern}F", d_model=16, vocab_size=29, **fields).eval()
    randomize(model)
    linears = [name for name, part in model.named_modules() if type(part) is nn.Linear]
    config = peft.LoraConfig(r=2, target_modules=[f"model.{name}" for name in linears], task_type="CAUSAL_LM")
    found = peft.get_peft_model(HybridNASForCausalLM.wrap(model), config).eval()
    randomize(found)
    return found


@pytest.mark.parametrize(("pattern", "fields"), CASES, ids=[f"{p} {f or ''}" for p, f in CASES])
@torch.no_grad()
def test_an_adapter_changes_what_its_merged_weights_change(pattern: str, fields: dict[str, Any]) -> None:
    model = adapted(pattern, fields)
    ids_BL = torch.randint(1, 29, (2, 7), generator=torch.Generator().manual_seed(0))
    inner = model.get_base_model().model  # a HybridLM whose layers the adapters are in
    logits, drawn = model(ids_BL).logits, model.generate(ids_BL, max_new_tokens=5, do_sample=False, pad_token_id=0)
    fast = inner.generate(ids_BL, 5, temperature=0.0)
    merged = model.merge_and_unload().model
    assert relative(logits, merged(ids_BL).logits) < 1e-4
    wanted = merged.generate(ids_BL, 5, temperature=0.0)
    assert drawn.tolist() == fast.tolist() == wanted.tolist()


def test_an_adapter_is_trained_alone_saved_and_loaded(tmp_path: Path) -> None:
    path = hybridnas.build("MA", d_model=16, vocab_size=29).save_pretrained(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=2, target_modules=["in_proj", "qkv_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path), config)
    ids_BL = torch.randint(29, (2, 7), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    for _ in range(2):
        model(ids_BL, labels=ids_BL).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(again(ids_BL).logits, model.eval()(ids_BL).logits)
        assert not torch.allclose(again(ids_BL).logits, hybridnas.load(path)(ids_BL).logits)
