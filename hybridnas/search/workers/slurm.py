"""``launch=slurm nodes=N``: a batch script that people can read, change and submit; nothing runs before they do."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from hybridnas.errors import ConfigError
from hybridnas.files import write_text
from hybridnas.search.config import SearchConfig
from hybridnas.search.storage.database import ENVIRONMENT, database_url

SCRIPT = "slurm.sh"
OWN = ("launch", "nodes", "workers", "worker", "storage", "study", "runs")  # settings that the script writes itself
_TEMPLATE = """\
#!/bin/bash
# Study {study}: {nodes} workers, each on a node of its own, none of them in charge. Written by hybridnas; change it
# as your cluster needs (partition, account, --gpus-per-task=1, time) and submit it:
#     {submit}
# A worker that is stopped saves, and its trial goes on elsewhere; submit the script again at any time to go on.
#SBATCH --job-name={job}
#SBATCH --array=0-{last}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=INT@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={output}

set -euo pipefail
cd {here}  # relative paths, search_spaces/ and experiments/ are meant from here
{where}
export OMP_NUM_THREADS="${{SLURM_CPUS_PER_TASK:-1}}"

# srun passes on the signal that comes two minutes before the end of the time.
srun {python} -m hybridnas.search \\
{settings}
"""


def write_script(config: SearchConfig, given: Sequence[str], nodes: int, *, python: str = "python") -> tuple[Path, str]:
    """Write the study's sbatch array and return its path and the command that submits it.

    ``given``: the user's own settings as ``key=value``. The database's URL is never in the script: the workers read it
    from the environment that sbatch hands on.
    """
    if nodes < 1:
        raise ConfigError(
            f"search nodes={nodes} must be 1 or more: launch=slurm starts one worker on each",
            field="nodes",
            got=nodes,
            allowed=">= 1",
        )
    in_database = database_url(config.storage) is not None
    if nodes > 1 and not in_database:
        raise ConfigError(
            f"search launch=slurm nodes={nodes} needs storage=env, a PostgreSQL database that all nodes reach: locks "
            f"between hosts cannot be relied upon on a shared file system; without one take nodes=1 (and workers=N)",
            field="storage",
            got=None,
            allowed="env",
        )
    runs = Path(config.runs).expanduser().absolute()
    folder = runs / config.name
    path = folder / SCRIPT
    kept = [item for item in given if item.partition("=")[0].lstrip("+") not in OWN]
    settings = [
        *kept,
        f"study={config.name}",
        f"runs={runs}",
        *(["storage=env"] if in_database else []),
        "worker=create",
    ]
    submit = f"sbatch {shlex.quote(str(path))}"
    if in_database:
        submit = f"{ENVIRONMENT}='postgresql+psycopg://USER:PASSWORD@HOST/DATABASE' {submit}"
        where = f': "${{{ENVIRONMENT}:?set it to the URL of the database when you submit}}"'
    else:
        where = f"# The study lies in {shlex.quote(str(folder))}."
    text = _TEMPLATE.format(
        study=config.name,
        nodes=nodes,
        last=nodes - 1,
        job=shlex.quote(f"hybridnas-{config.name}"),
        submit=submit,
        output=shlex.quote(str(folder / "slurm-%A_%a.log")),
        here=shlex.quote(str(Path.cwd())),
        where=where,
        python=shlex.quote(python),
        settings=" \\\n".join(f"    {shlex.quote(item)}" for item in settings),
    )
    write_text(path, text)
    return path, submit
