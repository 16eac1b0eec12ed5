"""The help text of a command, made from the dataclasses of its settings."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from hybridnas.cli.command import Command, groups_of, settings_class
from hybridnas.cli.compose import compose, fitting_experiments
from hybridnas.cli.sections import choices_of, entries
from hybridnas.config import allowed_text, plain, spell

ENVIRONMENT = {  # every variable that the package reads
    "HYBRIDNAS_CACHE": "folder of tokenized data and compiled kernels; else hybridnas in XDG_CACHE_HOME or ~/.cache",
    "XDG_CACHE_HOME": "folder of caches, where HYBRIDNAS_CACHE is not set",
    "HYBRIDNAS_STORAGE": "URL of the database of storage=env, so that its password is in no file and no command line",
    "CC": "C compiler of the CPU kernels; without any, plain torch is used",
    "OMP_NUM_THREADS": "threads of one process; a search divides the processor among its workers by it",
    "GLIBC_TUNABLES": "tuning of malloc; where it, or a MALLOC_ variable, is set, training leaves malloc as it is",
    "CUDA_VISIBLE_DEVICES": "GPUs that device=auto and train.devices see",
    "TRITON_INTERPRET": "1: run Triton kernels in its interpreter, without a GPU, for tests",
    "HYBRIDNAS_REHEARSE": "1: bench gpu and pytest -m gpu run on a processor at tiny shapes",
    "TRITON_CACHE_DIR": "folder of compiled Triton kernels",
    "ALL_PROXY": "proxy of downloads from the Hugging Face hub",
    "HF_HUB_OFFLINE": "1: datasets and tokenizers from the local cache alone",
    "SLURM_CPUS_PER_TASK": "threads of a worker that launch=slurm starts",
}
_WIDTH = 116


def help_text(command: str, summary: str, overrides: Sequence[str] = ()) -> str:
    """Return a command's help: groups with their choices, and every setting with value, meaning and allowed values.

    ``overrides`` are choices such as ``data=mqar``, whose settings are then listed. Raises ConfigError.
    """
    settings = settings_class(command)
    values = compose(command, overrides)
    lines = [f"python -m hybridnas.{command} [key=value ...]", "", summary[0].upper() + summary[1:] + ".", ""]
    groups = groups_of(settings)
    if groups:
        lines.append("choices:")
        for name, default in groups.items():
            names = fitting_experiments(command) if name == "experiment" else choices_of(name)
            shown = ", ".join(f"[{item}]" if item == default else item for item in names)
            lines += _wrapped(f"  {name}=", shown)
        lines += ["", "settings, each with the value that it has now:"]
    else:
        lines.append("settings and their defaults:")
    for field in dataclasses.fields(settings):
        if field.name not in (*groups, "train"):
            lines += _setting(field.name, values[field.name], field.metadata["doc"], allowed_text(field))
    for name in settings.field_names():
        section = values.get(name)
        if name == "experiment" or (section is None and name in groups) or (name not in groups and name != "train"):
            continue
        lines += ["", f"{name}.*  {_doc(settings, name)}"]
        for key, value, doc, allowed in entries(name, section or {}):
            lines += _setting(f"{name}.{key}", value, doc, allowed)
    unset = [name for name in groups if name != "experiment" and values.get(name) is None]
    if groups:
        lines += ["", f"A choice's settings: python -m hybridnas.{command} {(unset or ['data'])[0]}=NAME --help"]
    lines += ["", "environment variables:"]
    for name, doc in ENVIRONMENT.items():
        lines += _wrapped(f"  {name}  ", doc)
    return "\n".join(lines)


def _doc(settings: type[Command], name: str) -> str:
    return str(settings.field(name).metadata["doc"])


def _setting(key: str, value: Any, doc: str, allowed: str) -> Iterator[str]:
    """Yield the lines of one setting: ``key=value``, meaning, allowed values."""
    head = f"  {key}={_shown(value)}"
    text = f"{doc} ({allowed})" if doc and allowed else doc or allowed
    yield from _wrapped(f"{head:<34}  ", text)


def _shown(value: Any) -> str:
    """Write a value as it would be typed; a long mapping by its keys."""
    text = spell(plain(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=head, subsequent_indent=" " * min(len(head), 36), break_long_words=False
    ) or [head.rstrip()]
