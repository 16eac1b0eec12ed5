"""The model card: README.md of an exported folder, for people and for model hubs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hybridnas.arch.arch import Arch
from hybridnas.export.layout import LINEAGE, plugins_of
from hybridnas.registry import BLOCKS

TEST_LABELS = {
    "test_loss": "test loss [nats per token]",
    "test_bits_per_byte": "test bits per byte",
    "test_accuracy": "test accuracy [share of tokens]",
}
# Facts of the training that have words of their own; any other key of the card is shown under its name.
_LABELS = {
    "study": "study",
    "trial": "trial",
    "preset": "preset",
    "data": "data",
    "tokenizer": "tokenizer",
    "tokens": "training tokens",
    "tokens_per_active_param": "training tokens per active parameter",
    "steps": "steps",
    "batch_size": "batch [sequences]",
    "seq_len": "context in training [tokens]",
    "lr": "peak learning rate",
    "seed": "seed",
    "valid_loss": "validation loss [nats per token]",
    "bits_per_byte": "validation bits per byte",
    "accuracy": "validation accuracy [share of tokens]",
    **TEST_LABELS,
    "seconds": "training time [s]",
    "tokens_per_second": "training speed [tokens/s]",
    "machine": "machine",
}
_TAGS = {"M": "mamba", "N": "mamba2", "A": "attention", "E": "mixture-of-experts", "S": "sliding-window-attention"}


def model_card(
    arch: Arch,
    config: Mapping[str, Any],
    name: str,
    *,
    has_tokenizer: bool,
    class_name: str | None = None,
    ids: str = "text",
) -> str:
    """Return README.md: front matter, the pattern and its drawing, counts, how it was trained, how to use it.

    ``class_name``: transformers' class whose layout the folder has; None: it has our own. ``ids``: the kind of its
    tokenizer, which says what to show: dna, audio, else text.
    """
    facts: Mapping[str, Any] = config["training"]
    parts = [
        _front_matter(arch, can_generate=has_tokenizer and arch.causal, native=class_name is not None),
        f"# {_title(arch, facts)}",
        _summary(arch, facts),
        "## Architecture",
        f"Pattern `{arch.pattern}`, expanded `{arch.pattern.letters}`: " + _legend(arch),
        f"```mermaid\n{_drawing(arch)}\n```",
        _counts(arch, config["cost"]),
        "## Training",
        _training(facts),
        *(["## Grafts", _grafts(config[LINEAGE])] if config.get(LINEAGE) else []),
        "## Use",
        _usage(arch, name or ".", has_tokenizer=has_tokenizer, ids=ids)
        if class_name is None
        else _native_usage(class_name, name or ".", has_tokenizer=has_tokenizer),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(arch: Arch, *, can_generate: bool, native: bool) -> str:
    letters = sorted({slot.letter for slot in arch.pattern.slots})
    tags = ["hybridnas", "hybrid", *(_TAGS[letter] for letter in letters if letter in _TAGS)]
    lines = [
        "---",
        f"library_name: {'transformers' if native else 'hybridnas'}",
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    if can_generate:
        lines.append("pipeline_tag: text-generation")
    return "\n".join([*lines, "---"])


def _title(arch: Arch, facts: Mapping[str, Any]) -> str:
    return str(facts.get("name") or facts.get("preset") or f"hybridnas {arch.short}")


def _summary(arch: Arch, facts: Mapping[str, Any]) -> str:
    text = f"A {len(arch.pattern)}-layer language model of width {arch.d_model}, fingerprint `{arch.short}`"
    loss = facts.get("valid_loss")
    if isinstance(loss, (int, float)):
        text += f", validation loss {loss:.4f} nats per token"
    return text + ". Found and trained with hybridnas."


def _legend(arch: Arch) -> str:
    letters = dict.fromkeys(slot.letter for slot in arch.pattern.slots)
    return ", ".join(f"{letter} is {BLOCKS.get(letter).name}" for letter in letters) + "."


def _drawing(arch: Arch) -> str:
    from hybridnas.draw.mermaid import mermaid

    return str(mermaid(arch)).strip()


def _counts(arch: Arch, cost: Mapping[str, Any]) -> str:
    rows = [
        ("parameters, without embedding and head", f"{cost['params']:,}"),
        ("of these active for one token", f"{cost['active_params']:,}"),
        ("embedding and head", f"{cost['embedding_params']:,}" + (" (tied)" if arch.model.tie_embeddings else "")),
        (f"forward FLOPs per token at {cost['seq_len']:,} tokens", f"{cost['flops_per_token']:,.0f}"),
        (f"state of one sequence at {cost['seq_len']:,} tokens [bytes, float32]", f"{cost['state_bytes']:,}"),
        ("vocabulary", f"{arch.vocab_size:,}"),
    ]
    return _table(("figure", "value"), rows)


def _training(facts: Mapping[str, Any]) -> str:
    known = [(label, facts[key]) for key, label in _LABELS.items() if facts.get(key) is not None]
    other = [(key, value) for key, value in facts.items() if key not in _LABELS and key != "name" and value is not None]
    if not known and not other:
        return "Nothing was recorded: the model was exported without facts of its training."
    return _table(("fact", "value"), [(label, _text(value)) for label, value in known + other])


def graft_losses(record: Mapping[str, Any]) -> str:
    """Return the validation losses of a graft as words; empty where none was measured."""
    loss: Mapping[str, float] = record.get("loss") or {}
    named = {"parent": "before", "start": "grafted", "end": f"after {record.get('tokens', 0):,} tokens"}
    return ", ".join(f"{text} {loss[name]:.4f}" for name, text in named.items() if name in loss)


def _grafts(lineage: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each graft that led to the model, the oldest first."""
    lines: list[str] = []
    for record in lineage:
        words = [f"`{'; '.join(record.get('edits', []))}` of `{record.get('parent', {}).get('pattern')}`"]
        if found := graft_losses(record):
            words.append(f"validation loss [nats per token] {found}")
        lines.append(f"{len(lines) + 1}. {'; '.join(words)}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else f"`{json.dumps(value)}`"


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {_cell(left)} | {_cell(right)} |" for left, right in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _native_usage(class_name: str, name: str, *, has_tokenizer: bool) -> str:
    code = ["from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if has_tokenizer else ""), ""]
    code.append(f'model = AutoModelForCausalLM.from_pretrained("{name}")  # {class_name}')
    if has_tokenizer:
        code.append(f'tokenizer = AutoTokenizer.from_pretrained("{name}")')
        code.append('ids = tokenizer("def ", return_tensors="pt").input_ids')
        code.append("print(tokenizer.decode(model.generate(ids)[0]))")
    text = "```python\n" + "\n".join(code) + "\n```"
    return text + f'\n\n`hybridnas.from_hf("{name}")` reads the folder back as a model of hybridnas.'


def _usage(arch: Arch, name: str, *, has_tokenizer: bool, ids: str = "text") -> str:
    prompt = "ACGT" if ids == "dna" else "def "
    needed = plugins_of(arch)
    load = [f'model = hybridnas.load("{name}")  # needs nothing but this folder']
    if needed:
        load = ['hybridnas.load_plugins(".")  # runs ./blocks/*.py', f'model = hybridnas.load("{name}")']
    code = ["import hybridnas", "", *load]
    if has_tokenizer and arch.causal and ids != "audio":
        code = [
            "import torch",
            "",
            "import hybridnas",
            "from hybridnas.export.load import load_tokenizer",
            "",
            *load,
            f'tokenizer = load_tokenizer("{name}")',
            f'ids_BL = torch.tensor([tokenizer.encode("{prompt}")], device=model.embedding.weight.device)',
            "print(tokenizer.decode(model.generate(ids_BL, 200, temperature=0.8, top_k=40)[0].tolist()))",
        ]
    text = "```python\n" + "\n".join(code) + "\n```"
    if needed:
        files = [f"{letter} is that of `{own['name']}` (SHA-256 `{own['sha256']}`)" for letter, own in needed.items()]
        text = (
            f"The block of letter {'; of letter '.join(files)}, which is no part of hybridnas: put the file into the "
            f"folder below the one where you run this; commands load it with `plugins=true`.\n\n{text}"
        )
    if not arch.causal:
        return text + "\n\nThe model has a block that is not causal, so it cannot generate text."
    if not has_tokenizer:
        return text + "\n\nThe folder has no tokenizer, so the model takes and gives token ids."
    what, given = ("A recording", "out=sample.wav") if ids == "audio" else ("Text", f'prompt="{prompt}"')
    return text + f"\n\n{what} on the command line:\n\n```bash\npython -m hybridnas.generate model={name} {given}\n```"
