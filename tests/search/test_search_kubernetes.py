"""launch=k8s: a Job that Kubernetes' own schema allows, that names what the user asked for and holds no secret."""

import json
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from hybridnas.cli import run
from hybridnas.cli.compose import read_settings
from hybridnas.errors import ConfigError
from hybridnas.search.config import Budget, SearchConfig
from hybridnas.search.workers.kubernetes import LONGEST, Pod, job_name, write_manifest

SECRET = "postgresql+psycopg://ann:s3cret@db.example/studies"
IMAGE = "image=registry.example:5000/team/hybridnas:1.0"
VERSIONS = ("1.33", "1.37")


def launch(capsys: pytest.CaptureFixture[str], *settings: str) -> tuple[dict, str]:
    """Return what the command found, and the manifest as text."""
    assert run(["search", "launch=k8s", "study=demo", *settings, "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    return found, Path(found["script"]).read_text()


def worker(manifest: dict) -> dict:
    [container] = manifest["spec"]["template"]["spec"]["containers"]
    return container


def plain_config(folder: Path) -> SearchConfig:
    budget = Budget(d_model=8, depth=1)
    return SearchConfig(space={"name": "s"}, data={"kind": "stdlib"}, budget=budget, study="demo", runs=folder)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("settings", [(), ("gpus=2", "claim=studies", "memory=1.5Ti", "cpus=4")], ids=["plain", "gpus"])
def test_the_schema_of_kubernetes_allows_the_job(settings, version, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRIDNAS_STORAGE", SECRET)
    _, text = launch(capsys, IMAGE, "nodes=8", "storage=env", *settings)
    kubernetes_validate.validate(yaml.safe_load(text), version, strict=True)


def test_the_schema_would_refuse_a_job_that_is_none(tmp_path):
    path, _ = write_manifest(plain_config(tmp_path), [], 1, Pod(image="i"))
    manifest = yaml.safe_load(path.read_text())
    manifest["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSIONS[0], strict=True)


def test_each_pod_is_one_worker_of_the_study_with_what_it_asks_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRIDNAS_STORAGE", SECRET)
    asked = ["space=hybrid", "budget=smoke", "tracking=off", "space.letters=[M,E,[M,E]]"]
    found, text = launch(
        capsys, IMAGE, "nodes=8", "storage=env", "gpus=1", "memory=8Gi", "cpus=3", "claim=mine", *asked
    )
    manifest = yaml.safe_load(text)
    spec = manifest["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 8, 8)
    command = worker(manifest)["command"]
    assert command[:3] == ["python", "-m", "hybridnas.search"]
    assert not [item for item in command if item.partition("=")[0] in ("launch", "nodes", *Pod.field_names())]
    given, wanted = read_settings("search", command[3:]), read_settings("search", [*asked, "study=demo"])
    assert given.search().identity() == wanted.search().identity()
    assert (given.study, str(given.runs), given.storage, given.worker) == ("demo", "/runs", "env", "create")
    want = {"cpu": 3, "memory": "8Gi", "nvidia.com/gpu": 1}
    assert worker(manifest)["resources"] == {"requests": want, "limits": want}
    assert worker(manifest)["image"] == IMAGE.removeprefix("image=")
    [volume] = spec["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"] == {"claimName": "mine"}
    assert found["submit"] == f"kubectl apply -f {tmp_path}/runs/demo/k8s.yaml"


def test_the_database_is_read_from_a_secret_and_nothing_else_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRIDNAS_STORAGE", SECRET)
    _, text = launch(capsys, IMAGE, "nodes=2", "storage=env", "secret=db")
    environment = {entry["name"]: entry for entry in worker(yaml.safe_load(text))["env"]}
    assert environment["HYBRIDNAS_STORAGE"]["valueFrom"] == {"secretKeyRef": {"name": "db", "key": "url"}}
    assert "s3cret" not in text
    assert [path.name for path in (tmp_path / "runs/demo").iterdir()] == ["k8s.yaml"]


def test_one_worker_needs_no_database(tmp_path):
    path, _ = write_manifest(plain_config(tmp_path), ["seed=3"], 1, Pod(image="i"))
    container = worker(yaml.safe_load(path.read_text()))
    assert "HYBRIDNAS_STORAGE" not in {entry["name"] for entry in container["env"]}
    assert container["command"][3:] == ["seed=3", "study=demo", "runs=/runs", "worker=create"]


@pytest.mark.parametrize(
    ("own", "field", "got"),
    [
        ({"image": None}, "image", None),
        ({"image": "my image"}, "image", "my image"),
        ({"memory": "16GB"}, "memory", "16GB"),
        ({"secret": "My_Secret"}, "secret", "My_Secret"),
        ({"claim": "-x"}, "claim", "-x"),
    ],
    ids=str,
)
def test_what_kubernetes_would_refuse_is_one_sentence_and_no_file(own, field, got, tmp_path):
    with pytest.raises(ConfigError) as caught:
        write_manifest(plain_config(tmp_path), [], 1, Pod(**{"image": "i", **own}))
    assert (caught.value.field, caught.value.got) == (field, got)
    assert list(tmp_path.iterdir()) == []


def test_several_pods_need_a_database(tmp_path):
    with pytest.raises(ConfigError) as caught:
        write_manifest(plain_config(tmp_path), [], 2, Pod(image="i"))
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("storage", None, "env")


@pytest.mark.parametrize("study", ["demo", "My study: größe 2", "x" * 80, "-", "a" * (LONGEST - 11) + "-b"], ids=str)
def test_the_name_of_a_job_is_one_that_its_pods_can_carry(study):
    name = job_name(study)
    assert len(name) <= LONGEST
    assert name[0].isalnum() and name[-1].isalnum()
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
