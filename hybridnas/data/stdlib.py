"""``data=stdlib``: the source text of the running Python's standard library, which every machine has."""

from __future__ import annotations

import os
import platform
import sysconfig
from pathlib import Path

from hybridnas.data.config import DataConfig
from hybridnas.data.files import FileCorpus
from hybridnas.data.opening import CorpusFile
from hybridnas.data.source import Source, register_source
from hybridnas.data.windows import open_text
from hybridnas.errors import DataError

# encodings: tables of character codes, most of them copies of one another; pydoc_data: one generated table
LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "encodings", "pydoc_data"}
)


@register_source("stdlib", config=DataConfig)
def open_stdlib(config: DataConfig) -> Source:
    """Open the standard library's sources; raises DataError where Python came without them."""
    corpus = FileCorpus(stdlib_files(), config, name=f"standard library of Python {platform.python_version()}")
    return open_text(corpus, config)


def stdlib_files(root: Path | None = None) -> list[CorpusFile]:
    """Return the library's modules, sorted, without tests, packages, tables and this build's own settings."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        for name in names:
            # _sysconfigdata holds paths of the machine that built Python; without it one release is one corpus
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                files.append(CorpusFile(path, path.relative_to(root).as_posix()))
    if not files:
        raise DataError(
            f"the standard library's source text is not at {root}; use data=text data.path=FILES with text of your own"
        )
    return sorted(files, key=lambda file: file.key)
