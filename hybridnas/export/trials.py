"""What the model card of a search's trial says: the facts of its record and of the study's settings."""

from __future__ import annotations

from typing import Any, Protocol

from hybridnas.export.card import TEST_LABELS


class Plain(Protocol):
    """Anything that gives its fields as plain values: a trial's record, a search's config."""

    def to_dict(self) -> dict[str, Any]: ...


def card_facts(record: Plain, study: str, config: Plain) -> dict[str, Any]:
    """Return the ``card`` for a trial (its TrialRecord) of a study (its name and SearchConfig)."""
    trial, search = record.to_dict(), config.to_dict()
    budget, space, data = search.get("budget") or {}, search.get("space") or {}, search.get("data") or {}
    active = (trial.get("cost") or {}).get("active_params")
    tokens = trial.get("tokens") or 0
    facts = {
        "study": study,
        "trial": trial["number"],
        "space": space.get("name"),
        "preset": trial.get("preset"),
        "choices": trial.get("choices") or None,
        "data": data_words(data),
        "tokenizer": data.get("tokenizer"),
        "tokens": tokens,
        "tokens_per_active_param": tokens / active if active else None,
        **{key: budget.get(key) for key in ("batch_size", "seq_len", "lr", "weight_decay")},
        **{key: trial.get(key) for key in ("seed", "valid_loss", "bits_per_byte", "accuracy", *TEST_LABELS)},
        "valid_tokens": budget.get("valid_tokens"),
        **{key: trial.get(key) for key in ("seconds", "tokens_per_second")},
        "state": None if trial.get("state") == "COMPLETE" else trial.get("reason") or trial.get("state"),
    }
    return {key: value for key, value in facts.items() if value is not None}


def data_words(data: dict[str, Any]) -> str | None:
    """Return in words what was trained on: its kind, and the name or the paths that tell it apart; no folders."""
    kind = data.get("kind")
    if kind is None:
        return None
    path = data.get("path")
    parts = [str(part) for part in (path if isinstance(path, (list, tuple)) else [path]) if part]
    # A card is given to others: the last part of a path says what the text is, the rest is somebody's home.
    named = [data.get("name"), data.get("config"), *(part.rstrip("/").rpartition("/")[2] for part in parts)]
    return " ".join([str(kind), *(str(name) for name in named if name)])
