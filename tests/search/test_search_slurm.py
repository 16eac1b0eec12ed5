"""launch=slurm: a batch script that bash reads, that names what the user asked for and holds no secret."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hybridnas.errors import ConfigError
from hybridnas.search.config import Budget, SearchConfig
from hybridnas.search.workers.slurm import write_script

SECRET = "postgresql+psycopg://ann:s3cret@db.example/studies"


def launch(folder: Path, *settings: str, storage: str | None = None) -> tuple[str, str]:
    environment = {**os.environ, **({"HYBRIDNAS_STORAGE": storage} if storage else {})}
    done = subprocess.run(
        [sys.executable, "-m", "hybridnas.search", "launch=slurm", "study=demo", *settings],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, (folder / "runs" / "demo" / "slurm.sh").read_text()


@pytest.mark.parametrize("nodes", [1, 8])
def test_the_script_is_an_array_of_one_worker_a_node_that_bash_can_read(tmp_path: Path, nodes: int) -> None:
    own = ["storage=env"] if nodes > 1 else []
    printed, script = launch(tmp_path, f"nodes={nodes}", "budget=smoke", "space=hybrid", *own, storage=SECRET)
    assert f"sbatch {tmp_path}/runs/demo/slurm.sh" in printed
    command = script.split("\nsrun ")[1].replace("\\\n", " ").split()
    assert ("storage=env" in command) == (nodes > 1)
    assert f"#SBATCH --array=0-{nodes - 1}\n" in script
    command = script.split("\nsrun ")[1].replace("\\\n", " ").split()
    assert command[1:3] == ["-m", "hybridnas.search"]
    assert {"space=hybrid", "budget=smoke"} <= set(command)
    assert {"study=demo", f"runs={tmp_path}/runs", "worker=create"} <= set(command)
    assert not [item for item in command if item.startswith(("launch", "nodes"))]
    assert f"\ncd {shlex.quote(str(tmp_path))} " in script  # sbatch may be called in any folder
    bash = subprocess.run(["bash", "-n", str(tmp_path / "runs" / "demo" / "slurm.sh")], capture_output=True, text=True)
    assert (bash.returncode, bash.stderr) == (0, "")


def test_the_script_starts_nothing_and_holds_no_password(tmp_path: Path) -> None:
    printed, script = launch(tmp_path, "nodes=2", "storage=env", storage=SECRET)
    assert [path.name for path in (tmp_path / "runs" / "demo").iterdir()] == ["slurm.sh"]
    assert "s3cret" not in printed + script
    assert "HYBRIDNAS_STORAGE" in script
    assert re.search(r"\bstorage=env\b", script)


def test_nodes_must_be_some(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hybridnas.search", "launch=slurm", "nodes=0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "nodes=0 must be >= 1" in done.stderr


def test_several_nodes_need_a_database(tmp_path: Path) -> None:
    config = SearchConfig(space={"name": "s"}, data={"kind": "stdlib"}, budget=Budget(d_model=8, depth=1), study="demo")
    with pytest.raises(ConfigError) as caught:
        write_script(config.replace(runs=str(tmp_path)), [], 2)
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("storage", None, "env")
    assert list(tmp_path.iterdir()) == []
