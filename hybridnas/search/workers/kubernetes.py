"""``launch=k8s nodes=N``: a manifest of a Kubernetes Job that people can read, change and apply; nothing runs before.

An indexed Job (batch/v1) of one worker in each pod. In a pod that is deleted or evicted the preStop hook interrupts the
worker first, as Ctrl-C does, so that it saves and gives its trial back.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridnas.config import FrozenConfig, option
from hybridnas.errors import ConfigError
from hybridnas.files import write_text
from hybridnas.search.config import SearchConfig
from hybridnas.search.storage.database import ENVIRONMENT, database_url
from hybridnas.search.workers.slurm import OWN

MANIFEST = "k8s.yaml"
KEY = "url"  # of the secret: the database's URL
RUNS = "/runs"  # where studies lie in a pod
LONGEST = 46  # characters of a Job's name: its pods are called NAME-INDEX-XXXXX, of 63 at most
_NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_PARTS = {  # field of Pod -> what it must look like, and in words
    "secret": (rf"{_NAME}(\.{_NAME})*", "a name of lower-case letters, digits, '-' and '.'"),
    "claim": (rf"{_NAME}(\.{_NAME})*", "a name of lower-case letters, digits, '-' and '.'"),
    "memory": (r"[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?", "a Kubernetes quantity such as 16Gi"),
    "image": (r"[^\s\"'\\]+", "REGISTRY/NAME:TAG of a container image in which hybridnas is installed"),
}
_TEMPLATE = """\
# Study {study}: {nodes} workers, each in a pod of its own, none of them in charge. Written by hybridnas; change it as
# your cluster needs (namespace, nodeSelector, tolerations, imagePullSecrets) and apply it:
{steps}
# A worker that is stopped saves, and its trial goes on elsewhere; delete the Job and apply it again to go on.
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
  labels: {{app.kubernetes.io/name: hybridnas, app.kubernetes.io/instance: {name}}}
spec:
  completionMode: Indexed
  completions: {nodes}
  parallelism: {nodes}
  backoffLimitPerIndex: 6
  template:
    metadata:
      labels: {{app.kubernetes.io/name: hybridnas, app.kubernetes.io/instance: {name}}}
    spec:
      restartPolicy: Never
      terminationGracePeriodSeconds: 120
      containers:
        - name: worker
          image: {image}
          workingDir: {runs}
          command:
{command}
          env:
            - {{name: OMP_NUM_THREADS, value: "{cpus}"}}
            - {{name: HYBRIDNAS_CACHE, value: {runs}/.cache}}
{storage}
          resources:
            requests: {resources}
            limits: {resources}
          lifecycle:
            preStop:
              exec:
                command: ["sh", "-c", "kill -INT 1; while kill -0 1; do sleep 1; done"]
          volumeMounts:
            - {{name: runs, mountPath: {runs}}}
      volumes:
        - {{name: runs, {volume}}}
"""


@dataclass(frozen=True, kw_only=True)
class Pod(FrozenConfig):
    """What a worker's pod has, with ``launch=k8s``."""

    image: str | None = option(None, "with launch=k8s: container image with hybridnas [REGISTRY/NAME:TAG]")
    cpus: int = option(8, "with launch=k8s: processor cores of a worker [count]", ge=1)
    memory: str = option("16Gi", "with launch=k8s: memory of a worker [Kubernetes quantity]")
    gpus: int = option(0, "with launch=k8s: NVIDIA GPUs of a worker [count]", ge=0)
    secret: str = option("hybridnas-storage", "with launch=k8s: secret whose key url is the URL of the database [name]")
    claim: str | None = option(
        None,
        "with launch=k8s: PersistentVolumeClaim for the studies, of all workers; none: a folder that ends with its pod",
    )

    @classmethod
    def label(cls) -> str:
        return "search"

    def check(self) -> None:
        """Raise ConfigError for a setting that Kubernetes would refuse, or an image that is missing."""
        if self.image is None:
            raise ConfigError(
                "search launch=k8s needs image=REGISTRY/NAME:TAG, a container image in which hybridnas is installed",
                field="image",
                got=None,
                allowed="REGISTRY/NAME:TAG",
            )
        for field, (pattern, allowed) in _PARTS.items():
            value = getattr(self, field)
            if value is not None and not re.fullmatch(pattern, value):
                raise ConfigError(
                    f"search {field}={value!r} must be {allowed}", field=field, got=value, allowed=allowed
                )


def write_manifest(config: SearchConfig, given: Sequence[str], nodes: int, pod: Pod) -> tuple[Path, str]:
    """Write the study's Job and return its path and the command that applies it.

    ``given``: the user's own settings as ``key=value``. The database's URL is never in the manifest: pods read it from
    the secret. Raises ConfigError for a pod that cannot be, and for several workers without a database.
    """
    pod.check()
    in_database = database_url(config.storage) is not None
    if nodes > 1 and not in_database:
        raise ConfigError(
            f"search launch=k8s nodes={nodes} needs storage=env, a PostgreSQL database that all pods reach; without "
            f"one take nodes=1 (and workers=N)",
            field="storage",
            got=None,
            allowed="env",
        )
    path = Path(config.runs).expanduser().absolute() / config.name / MANIFEST
    kept = [item for item in given if item.partition("=")[0].lstrip("+") not in (*OWN, *Pod.field_names())]
    own = [f"study={config.name}", f"runs={RUNS}", *(["storage=env"] if in_database else []), "worker=create"]
    apply = f"kubectl apply -f {shlex.quote(str(path))}"
    make = f"kubectl create secret generic {pod.secret} --from-literal={KEY}=postgresql+psycopg://USER:PASSWORD@HOST/DB"
    secret = {"name": ENVIRONMENT, "valueFrom": {"secretKeyRef": {"name": pod.secret, "key": KEY}}}
    resources: dict[str, Any] = {"cpu": pod.cpus, "memory": pod.memory}
    if pod.gpus:
        resources["nvidia.com/gpu"] = pod.gpus
    steps = [make, apply] if in_database else [apply]
    text = _TEMPLATE.format(
        study=config.name,
        nodes=nodes,
        steps="\n".join(f"#     {step}" for step in steps),
        name=job_name(config.name),
        image=json.dumps(pod.image),
        runs=RUNS,
        command="\n".join(
            f"            - {json.dumps(item)}" for item in ("python", "-m", "hybridnas.search", *kept, *own)
        ),
        cpus=pod.cpus,
        storage=f"            - {json.dumps(secret)}" if in_database else "            # The study lies in the volume.",
        resources=json.dumps(resources),
        volume="emptyDir: {}" if pod.claim is None else f"persistentVolumeClaim: {{claimName: {pod.claim}}}",
    )
    write_text(path, text)
    return path, apply


def job_name(study: str) -> str:
    """Return a name that Kubernetes takes: lower-case letters, digits and '-', at most 46 characters."""
    words = re.sub(r"[^a-z0-9]+", "-", study.lower()).strip("-")
    return f"hybridnas-{words}"[:LONGEST].rstrip("-")
