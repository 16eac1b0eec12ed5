"""Our folders through transformers' own classes: logits, generation, padding, caches, saving, training, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hybridnas
from hybridnas.data.tokenizers import ByteTokenizer
from hybridnas.errors import ConfigError, ExportError
from hybridnas.registry import BLOCKS
from tests.oracles import randomize, relative

transformers = pytest.importorskip("transformers")
import hybridnas.hf  # noqa: E402
from hybridnas.hf import HybridNASCache, HybridNASConfig, HybridNASForCausalLM  # noqa: E402

V = 37
PATTERNS = [*(f"{letter}F" for letter in sorted(BLOCKS)), "AMES{window=4}", "F@s M F@s"]


def folder(path: Path, pattern: str, **fields: Any) -> Path:
    model = hybridnas.build(pattern, **{"d_model": 16, "vocab_size": V, **fields})
    randomize(model)
    return model.save_pretrained(
        path / "model", **({"tokenizer": ByteTokenizer()} if model.arch.vocab_size == 256 else {})
    )


def auto(path: Path, **settings: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **settings)


def some(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def generated(model: Any, ids_BL: Tensor, **settings: Any) -> Tensor:
    torch.manual_seed(3)
    return model.generate(ids_BL, max_new_tokens=5, pad_token_id=0, **{"do_sample": False, **settings})


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_every_architecture_works_in_transformers(pattern: str, tmp_path: Path) -> None:
    path, ids_BL = folder(tmp_path, pattern), some(3, 9)
    ours, theirs = hybridnas.load(path), auto(path)
    assert torch.equal(ours(ids_BL).logits, theirs(ids_BL).logits)
    assert generated(theirs, ids_BL).tolist() == ours.generate(ids_BL, 5, temperature=0.0).tolist()

    lengths = torch.tensor([9, 4, 7])
    columns_L = torch.arange(9)
    left_BL = columns_L >= 9 - lengths[:, None]
    found = generated(theirs, ids_BL, attention_mask=left_BL.long())
    for row, own_L in enumerate(left_BL):
        alone = ours.generate(ids_BL[row][own_L][None], 5, temperature=0.0)
        assert found[row, 9:].tolist() == alone[0, -5:].tolist()
        for cached in (False, True):
            logits = theirs(ids_BL, attention_mask=left_BL.long(), use_cache=cached).logits[row, own_L]
            assert relative(logits, ours(ids_BL[row][own_L][None]).logits[0]) < 1e-5

    for how in ({"do_sample": True, "top_k": 9, "temperature": 1.3}, {"num_beams": 3, "num_return_sequences": 2}):
        cached, recomputed = (
            generated(theirs, ids_BL, attention_mask=left_BL.long(), use_cache=use, **how) for use in (True, False)
        )
        assert cached.tolist() == recomputed.tolist()

    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(hybridnas.load(tmp_path / "again")(ids_BL).logits, ours(ids_BL).logits)


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True}, {"final_softcap": 3.0}], ids=str)
@torch.no_grad()
def test_embedding_and_head_grow_and_shrink(fields: dict[str, Any], tmp_path: Path) -> None:
    path, ids_BL = folder(tmp_path, "MAF", **fields), some(2, 9) % (V - 8)
    before, model = hybridnas.load(path)(ids_BL).logits, auto(path)
    for how in ({}, {"pad_to_multiple_of": 8}, {"mean_resizing": False}):
        for size in (V + 3, V - 8):
            model.resize_token_embeddings(size, **how)
            rows = model.get_input_embeddings().weight.shape[0]
            assert rows == (size if "pad_to_multiple_of" not in how else -(-size // 8) * 8)
            logits = model(ids_BL).logits
            assert logits.shape[-1] == rows == model.config.vocab_size
            kept = min(rows, V - 8)
            assert relative(logits[..., :kept], before[..., :kept]) < 1e-6
            assert generated(model, ids_BL).max() < rows
            model.save_pretrained(tmp_path / "again")
            assert torch.equal(hybridnas.load(tmp_path / "again")(ids_BL).logits, logits)
            assert torch.equal(auto(tmp_path / "again")(ids_BL).logits, logits)


@torch.no_grad()
def test_padding_on_the_right_and_between_is_not_read(tmp_path: Path) -> None:
    path, ids_BL = folder(tmp_path, "AMC"), some(2, 8)
    ours, theirs = hybridnas.load(path), auto(path)
    mask_BL = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1, 1, 0]])
    found = generated(theirs, ids_BL, attention_mask=mask_BL)
    for row, own_L in enumerate(mask_BL.bool()):
        alone_1l = ids_BL[row][own_L][None]
        assert found[row, 8:].tolist() == ours.generate(alone_1l, 5, temperature=0.0)[0, -5:].tolist()
        logits = theirs(ids_BL, attention_mask=mask_BL, use_cache=False).logits[row]
        assert relative(logits[own_L], ours(alone_1l).logits[0]) < 1e-5
        assert torch.equal(logits[-1], logits[own_L][-1])  # nothing was read since


@torch.no_grad()
def test_positions_that_start_again_are_documents(tmp_path: Path) -> None:
    path, ids_BL = folder(tmp_path, "AM"), some(1, 7)
    ours, theirs = hybridnas.load(path), auto(path)
    found = theirs(ids_BL, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]])).logits
    wanted = torch.cat([ours(ids_BL[:, :3]).logits, ours(ids_BL[:, 3:]).logits], dim=1)
    assert relative(found, wanted) < 1e-5
    padded = {
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 0, 0, 1, 2, 3, 4]]),
    }
    assert theirs(ids_BL, **padded).past_key_values is not None  # one document, whose padding has positions, too
    shifted = theirs(ids_BL, position_ids=torch.arange(5, 12)[None]).logits  # attention sees differences alone
    assert relative(shifted, ours(ids_BL).logits) < 1e-5
    cache = theirs(ids_BL[:, :3], position_ids=torch.arange(3)[None]).past_key_values
    for wrong, given in (([0, 2, 3], None), ([7, 8, 9], cache), ([0, 1, 2], cache)):
        with pytest.raises(ConfigError) as error:
            theirs(
                ids_BL[:, 3:6], position_ids=torch.tensor([wrong]), past_key_values=given, use_cache=given is not None
            )
        assert error.value.field == "position_ids"


@torch.no_grad()
def test_a_cache_goes_on_over_turns_and_back_where_states_can(tmp_path: Path) -> None:
    ids_BL = some(2, 9)
    for pattern, back in (("AF", True), ("S{window=4} F", False), ("MA", False)):
        model = auto(folder(tmp_path / pattern, pattern))
        cache = HybridNASCache()
        model(ids_BL[:, :4], past_key_values=cache)
        logits = model(ids_BL[:, 4:], past_key_values=cache).logits
        assert relative(logits, model(ids_BL).logits[:, 4:]) < 1e-5
        assert (cache.get_seq_length(), cache.is_croppable, model._is_stateful) == (9, back, not back)
        if back:
            cache.crop(-6)
            assert relative(model(ids_BL[:, 3:], past_key_values=cache).logits, model(ids_BL).logits[:, 3:]) < 1e-5
            looked_up = generated(model, ids_BL[:1], prompt_lookup_num_tokens=3)
            assert looked_up.tolist() == generated(model, ids_BL[:1]).tolist()
        else:
            with pytest.raises(ConfigError) as error:
                cache.crop(-1)
            assert error.value.field == "tokens_to_remove"
        cache.reset()
        assert relative(model(ids_BL, past_key_values=cache).logits, model(ids_BL).logits) < 1e-5


@torch.no_grad()
def test_text_goes_in_and_out_by_name(tmp_path: Path) -> None:
    path = folder(tmp_path, "MEAF", vocab_size=256)
    ours = hybridnas.load(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token_id = 0
    write = transformers.pipeline("text-generation", auto(path), tokenizer=tokenizer)
    texts = ["def f(x):", "ä"]
    for found in (
        write(texts, max_new_tokens=6, do_sample=False),
        write(texts, max_new_tokens=6, do_sample=False, batch_size=2),
    ):
        for text, (one,) in zip(texts, found, strict=True):
            ids = ours.generate(torch.tensor([list(text.encode())]), 6, temperature=0.0)[0].tolist()
            assert one["generated_text"] == ByteTokenizer().decode(ids)


def test_the_loss_is_ours_and_in_training_has_that_of_the_experts(tmp_path: Path) -> None:
    path, ids_BL = folder(tmp_path, "ME", E={"n_experts": 2}), some(2, 9)
    ours, theirs = hybridnas.load(path), auto(path)
    labels_BL = ids_BL.masked_fill(torch.arange(9) < 3, -100)
    out = ours(ids_BL, labels=labels_BL)
    assert torch.allclose(theirs(ids_BL, labels=labels_BL).loss, out.loss)
    half = theirs(ids_BL, labels=labels_BL, num_items_in_batch=24).loss
    assert torch.allclose(half, out.loss / 2)
    theirs.train()
    ours.train()
    out = ours(ids_BL, labels=labels_BL)
    assert torch.allclose(theirs(ids_BL, labels=labels_BL).loss, out.loss + sum(out.aux.losses.values()))
    theirs(ids_BL, labels=labels_BL, attention_mask=(torch.arange(9) > 1).expand(2, 9).long()).loss.backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())


def test_trainer_trains_and_saves_a_folder_of_ours(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    path = folder(tmp_path, "MA")
    model = auto(path)
    texts = [{"input_ids": ids, "labels": ids} for ids in some(8, 12)]
    settings = transformers.TrainingArguments(
        tmp_path / "run", per_device_train_batch_size=4, max_steps=3, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = transformers.Trainer(model, settings, train_dataset=texts)
    trainer.train()
    trainer.save_model(tmp_path / "trained")
    again, ids_BL = hybridnas.load(tmp_path / "trained"), some(1, 5)
    assert torch.equal(again(ids_BL).logits, model.eval()(ids_BL).logits)
    assert not torch.equal(again(ids_BL).logits, hybridnas.load(path)(ids_BL).logits)


@torch.no_grad()
def test_tied_and_shared_tensors_and_float32_survive(tmp_path: Path) -> None:
    path = folder(tmp_path, "M@s F M@s E", tie_embeddings=True)
    model = auto(path, dtype=torch.bfloat16)
    wanted = hybridnas.load(path).to(torch.bfloat16)
    for name, tensor in wanted.state_dict().items():
        found = model.model.state_dict()[name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
    assert model.model.head.weight is model.model.embedding.weight
    assert len({id(p) for p in model.parameters()}) == len(list(wanted.parameters()))
    model.save_pretrained(tmp_path / "narrow")
    assert torch.equal(hybridnas.load(tmp_path / "narrow").head.weight, wanted.head.weight)


def test_a_model_in_memory_is_wrapped_and_configured_from_scratch() -> None:
    ours, ids_BL = hybridnas.build("MA", d_model=16, vocab_size=V), some(1, 5)
    theirs = HybridNASForCausalLM.wrap(ours)
    assert torch.equal(theirs(ids_BL).logits, ours(ids_BL).logits)
    assert {id(p) for p in theirs.parameters()} == {id(p) for p in ours.parameters()}
    torch.manual_seed(1)
    fresh = transformers.AutoModelForCausalLM.from_config(HybridNASConfig.from_arch(ours.arch))
    assert fresh.model.arch == ours.arch and not torch.equal(fresh.model.head.weight, ours.head.weight)


def test_a_model_that_is_not_causal_gives_logits_and_does_not_generate(tmp_path: Path) -> None:
    path = folder(tmp_path, "AE", E={"router": "expert_choice", "n_experts": 2})
    model, ids_BL = auto(path), some(2, 6)
    assert torch.equal(model(ids_BL).logits, hybridnas.load(path)(ids_BL).logits)
    with pytest.raises(ConfigError):
        generated(model, ids_BL)


def changed(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


def test_bad_folders_are_refused_in_one_sentence(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder(tmp_path, "MA")
    whole = load_file(path / "model.safetensors")
    save_file({k: v for k, v in whole.items() if k != "head.weight"}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError) as error:
        auto(path)
    assert error.value.field == "head.weight"
    save_file({**whole, "more": torch.zeros(3)}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError) as error:
        auto(path)
    assert error.value.field == "more"
    changed(path, fingerprint="0" * 64)
    with pytest.raises(ExportError) as error:
        auto(path)
    assert error.value.field == "fingerprint"
    path = folder(tmp_path / "cut", "MA")
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:100])
    with pytest.raises(ExportError) as error:
        auto(path)
    assert error.value.field == "model.safetensors"
    path = folder(tmp_path / "pickle", "MA")
    torch.save(whole, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        auto(path)
    path = folder(tmp_path / "size", "MA")
    changed(path, vocab_size=V + 1)
    with pytest.raises(ExportError) as error:
        auto(path)
    assert (error.value.field, error.value.got, error.value.allowed) == ("vocab_size", V + 1, V)


def test_inputs_that_mean_nothing_to_these_models_are_refused(tmp_path: Path) -> None:
    model, ids_BL = auto(folder(tmp_path, "MA")), some(2, 4)
    wrong: dict[str, dict[str, Any]] = {
        "inputs_embeds": {"inputs_embeds": torch.zeros(2, 4, 16)},
        "output_attentions": {"output_attentions": True},
        "past_key_values": {"past_key_values": transformers.DynamicCache(config=model.config)},
        "attention_mask": {"attention_mask": torch.ones(2, 1, 4, 4)},
    }
    for field, given in wrong.items():
        with pytest.raises(ConfigError) as error:
            model(ids_BL, **given)
        assert error.value.field == field


def test_segments_are_refused_and_positions_named_instead() -> None:
    model = HybridNASForCausalLM.wrap(hybridnas.build("M", d_model=16, vocab_size=V))
    with pytest.raises(ConfigError) as caught:
        model(some(1, 4), segments=torch.zeros(1, 4, dtype=torch.long))
    assert caught.value.field == "segments"
    assert "position_ids" in str(caught.value)
