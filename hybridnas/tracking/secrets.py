"""Masking of passwords, tokens and keys in texts that leave the process: files, logs, MLflow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SECRET = re.compile(r"(?<=://)(?!/)[^\s'\"]*@(?=[^\s'\"@]+)")
_SECRET_FIELD = re.compile(r"((?:password|passwd|token|secret|api_key)=)[^&\s'\"]+", re.IGNORECASE)


def masked(value: Any) -> Any:
    """Return text, or every text inside mappings and lists, with passwords in URLs replaced by ``***``."""
    if isinstance(value, str):
        return _SECRET_FIELD.sub(r"\1***", _SECRET.sub("***@", value))
    if isinstance(value, Mapping):
        return {str(key): masked(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(item) for item in value]
    return value
