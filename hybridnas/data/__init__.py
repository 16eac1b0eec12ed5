"""Data: where tokens come from, split by document, in an order that is a pure function of seed and step.

One kind of data is one file here and one registration: ``stdlib.py``, ``text.py``, ``hub.py``. They are found by
themselves; importing this package loads neither torch nor datasets nor tokenizers.
"""

from hybridnas.data.config import DataConfig
from hybridnas.data.source import (
    SOURCES,
    Batch,
    Source,
    SourceConfig,
    check_vocab,
    open_source,
    register_source,
    source_config,
)

__all__ = [
    "SOURCES",
    "Batch",
    "DataConfig",
    "Source",
    "SourceConfig",
    "check_vocab",
    "open_source",
    "register_source",
    "source_config",
]
