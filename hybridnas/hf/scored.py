"""Scores of a folder on tasks of lm-eval (EleutherAI's evaluation harness), which needs ``hybridnas[eval]``."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from hybridnas.errors import ConfigError, DataError


def lm_eval_scores(
    folder: Path,
    tasks: Sequence[str],
    *,
    device: str = "cpu",
    batch_size: int = 16,
    max_length: int | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Return task -> metric -> value, as lm-eval computes them with the folder's own tokenizer.

    ``tasks``: names that lm-eval knows, or files of tasks (``*.yaml``). ``max_length``: context; None: lm-eval's
    default [tokens]. ``limit``: documents of a task; None: all. A text is read from the tokenizer's separator on.

    Raises ConfigError where lm-eval is not installed or knows no such task, ExportError for a folder that is not ours
    or has no tokenizer, DataError for task data that cannot be had.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"lm_eval=[...] needs the package lm-eval ({error}); run pip install 'hybridnas[eval]'",
            field="lm_eval",
            got=list(tasks),
            allowed="an installed lm-eval",
        ) from None
    from transformers import AutoTokenizer

    from hybridnas.export.load import load, load_tokenizer
    from hybridnas.hf.model import HybridNASForCausalLM

    own = load_tokenizer(folder)
    model = load(folder, device)
    names, folders = _named(tasks)
    # lm-eval reads the files of all its tasks, thousands, before it finds one by name: known files need none.
    found_all = len(folders) == len(names)
    manager = TaskManager(include_path=[str(f) for f in dict.fromkeys(folders)] or None, include_defaults=not found_all)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"lm_eval={unknown[0]!r} is no task of the installed lm-eval, nor a file of one; "
            "'lm_eval ls tasks' prints its tasks",
            field="lm_eval",
            got=unknown[0],
            allowed="a task's name, or a file NAME.yaml",
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token_id = own.separator  # padding is not read
    reader = HFLM(
        pretrained=HybridNASForCausalLM.wrap(model),
        backend="causal",
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        prefix_token_id=own.separator,
    )
    try:
        found = simple_evaluate(
            model=reader, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
        )
    except (OSError, ConnectionError) as error:
        raise DataError(
            f"lm_eval={names}: the data of a task cannot be had ({' '.join(str(error).split())[:200]}); "
            "give a task of your own whose data_files are here",
            field="lm_eval",
            got=names,
        ) from None
    return {
        name: {
            metric.removesuffix(",none"): float(value)
            for metric, value in values.items()
            if isinstance(value, (int, float)) and not metric.endswith(("_len",)) and "_stderr" not in metric
        }
        for name, values in found["results"].items()
    }


def _named(tasks: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Return the tasks' names, and the folders of those whose file is known: files, and single tasks of lm-eval."""
    import lm_eval

    names, folders = [], []
    shipped = Path(lm_eval.__file__).parent / "tasks"
    for task in tasks:
        if not task.endswith((".yaml", ".yml")):
            names.append(task)
            line = re.compile(rf"^task:\s*['\"]?{re.escape(task)}['\"]?\s*$".encode(), re.MULTILINE)
            at = [path.parent for path in sorted(shipped.rglob("*.yaml")) if line.search(path.read_bytes())]
            folders += at if len(at) == 1 else []
            continue
        path = Path(task).expanduser().absolute()
        if not path.is_file():
            raise ConfigError(f"lm_eval={task!r} is no file", field="lm_eval", got=task, allowed="a task of lm-eval")
        said = re.search(r"^task:\s*['\"]?([\w.-]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if said is None:
            raise ConfigError(
                f"{path} names no task; it needs a line 'task: NAME'", field="lm_eval", got=task, allowed="task: NAME"
            )
        names.append(said[1])
        folders.append(path.parent)
    return names, folders
