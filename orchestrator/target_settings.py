"""``target.yaml``: what a Kubernetes cluster offers to runs. Pure but for the loaders, which read one file.

The run file says what to train, this file where: written once per cluster, by whoever runs it. Every field with its
default is in k8s/target.example.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from orchestrator.document import ABSOLUTE_PATH, CURRENCY, NAME, QUANTITY, RELEASE, Part, check, read_yaml
from orchestrator.errors import SpecError
from orchestrator.spec import EnvName, PositiveInt

DEFAULT_FILE = Path("target.yaml")
PRICES_VARIABLE = "HEADWAY_PRICES"
_EXAMPLE = "k8s/target.example.yaml"
_PRICES_PAGE = "docs/record.md"
CPU_POOL = "cpu"
"""The pool of runs without a GPU."""


def _number_as_text(value: object) -> object:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Label = Annotated[str, Field(pattern=NAME, max_length=63)]
Quantity = Annotated[str, BeforeValidator(_number_as_text), Field(pattern=QUANTITY)]
"""Kubernetes' own notation, such as ``500m`` or ``64Gi``; a plain number too, as YAML reads ``cpu: 2``."""
Seconds = Annotated[int, Field(ge=1, le=2**31 - 1)]
Price = Annotated[float, Field(ge=0.0)]

_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def amount(quantity: str) -> float:
    """A Kubernetes quantity as a number: CPUs, or bytes."""
    digits = re.match(r"[0-9.]+", quantity)
    if digits is None:
        raise ValueError(f"{quantity!r} is not a quantity")
    return float(digits[0]) * _UNITS[quantity[digits.end() :]]


class PodSize(Part):
    """CPU and memory of one container: requested and limit alike, so that a pod is never evicted for its neighbours."""

    cpu: Quantity = "1"
    memory: Quantity = "4Gi"
    cpu_request: Quantity | None = None
    """Less than ``cpu`` where nodes are shared; null requests all of it."""


class Toleration(Part):
    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Pool(Part):
    """One kind of worker pod and how many there may be."""

    gpus_per_pod: Annotated[int, Field(ge=0)] = 0
    gpu_resource: str = "nvidia.com/gpu"
    max_pods: PositiveInt
    """Capacity: ``plan`` counts with it, and a run that needs more is refused before it waits for ever."""
    size: PodSize = PodSize()
    shared_memory: Quantity = "2Gi"
    """``/dev/shm``: NCCL, gloo and Ray's object store. Counts toward the pod's memory."""
    node_selector: dict[str, str] = Field(default={})
    tolerations: tuple[Toleration, ...] = ()
    extended_resources: dict[str, PositiveInt] = Field(default={})
    """More that each pod asks for, such as ``rdma/ib: 1``."""
    env: dict[EnvName, str] = Field(default={})
    """Variables of this pool's pods, such as NCCL's."""


class ClaimMount(Part):
    """A PersistentVolumeClaim mounted into every pod."""

    claim: Label
    path: Annotated[str, Field(pattern=ABSOLUTE_PATH)]
    read_only: bool = True


class S3Settings(Part):
    """How pods reach the store; its address is ``HEADWAY_STORE`` or ``--store``, as for every command."""

    endpoint_url: str | None = None
    """Null is AWS."""
    region: str | None = None
    trainer_secret: Label | None = "headway-s3-trainer"
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; null where the service account carries a role."""
    server_secret: Label | None = "headway-s3-server"


class Prices(Part):
    """What an hour costs, for the cost of a run."""

    currency: Annotated[str, Field(pattern=CURRENCY)] = "USD"
    gpu_hour: dict[Label, Price] = Field(default={})
    """By kind of GPU in lower case, as the pools are named."""
    cpu_hour: Price = 0.0
    """Of each worker's ``cpus_per_worker``, beside a GPU too."""


class PriceFile(Prices):
    """A whole ``prices.yaml``, for targets that have no settings of their own."""

    apiVersion: Literal["headway/v1"]  # noqa: N815  the file's own spelling
    kind: Literal["prices"]


class Deadlines(Part):
    """Seconds; null sets none."""

    start: Seconds | None = None
    """From admission to the job's start, on each cluster that the run gets."""
    run: Seconds | None = None
    """Of each cluster that the run gets."""


class TargetSettings(Part):
    """A whole ``target.yaml``."""

    apiVersion: Literal["headway/v1"]  # noqa: N815  the file's own spelling
    kind: Literal["kubernetes"]
    context: str | None = None
    """Of the kubeconfig; null is its current one."""
    namespace: Label = "headway"
    image: Annotated[str, Field(min_length=1)]
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[Label, ...] = ()
    ray_version: Annotated[str, Field(pattern=RELEASE)] = "2.60.0"
    """The image's."""
    queue: Label | None = "headway"
    """Kueue's LocalQueue; null starts pods at once, without gang admission."""
    training_priority: Label | None = "headway-training"
    serving_priority: Label | None = "headway-serving"
    trainer_account: Label = "headway-trainer"
    server_account: Label = "headway-server"
    token_secret: Label = "headway-ray-token"
    """Secret whose ``auth_token`` Ray asks of everyone who talks to it."""
    s3: S3Settings = S3Settings()
    pools: Annotated[dict[Label, Pool], Field(min_length=1)]
    """By kind of GPU in lower case, such as ``a100``; ``cpu`` is for runs without one."""
    head: PodSize = PodSize()
    server: PodSize = PodSize()
    """A serving replica's pod; its GPU comes from ``serve_pool``."""
    serve_pool: Label = CPU_POOL
    env: dict[EnvName, str] = Field(default={})
    secrets: tuple[Label, ...] = ()
    """Secrets whose keys become variables of every training pod."""
    serve_secrets: tuple[Label, ...] = ()
    """The same of every serving pod, such as one that holds HEADWAY_API_KEYS."""
    claims: tuple[ClaimMount, ...] = ()
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 5
    """Attempts that may fail in one submission before it needs a person. A lost head counts until there is a newer
    checkpoint."""
    deadlines: Deadlines = Deadlines()
    grace: Annotated[int, Field(ge=30)] = 180
    """Seconds that a pod has to save and end before it is killed."""
    keep_finished: Annotated[int, Field(ge=0)] = 10
    """Seconds that a finished run's pods stay."""
    prices: Prices | None = None
    """Null tells no cost."""

    @field_validator("pools")
    @classmethod
    def _cpu_has_no_gpus(cls, pools: dict[str, Pool]) -> dict[str, Pool]:
        for name, pool in pools.items():
            if (name == CPU_POOL) != (pool.gpus_per_pod == 0):
                raise ValueError(
                    f"{name} has gpus_per_pod {pool.gpus_per_pod}; cpu has none, every other kind has some"
                )
        return pools

    @model_validator(mode="after")
    def _serve_pool_exists(self) -> TargetSettings:
        if self.serve_pool not in self.pools:
            raise ValueError(f"serve_pool {self.serve_pool} is none of the pools: {', '.join(self.pools)}")
        return self

    def pool_of(self, gpu: str | None) -> tuple[str, Pool]:
        """The pool, with its name, of a run that asks for this kind of GPU.

        Raises:
            SpecError: there is none.
        """
        gpu_pools = [name for name in self.pools if name != CPU_POOL]
        if gpu is None:
            wanted = CPU_POOL
        elif gpu == "any":
            wanted = gpu_pools[0] if gpu_pools else ""
        else:
            wanted = gpu.lower()
        if wanted not in self.pools:
            raise SpecError(
                f"resources.gpu {gpu or 'null'}: this target has no such pool; it has {', '.join(self.pools)}.",
                next_step="Choose one of those, or add a pool to target.yaml.",
            )
        return wanted, self.pools[wanted]


def load_settings(path: Path) -> TargetSettings:
    """Read and check a target's settings.

    Raises:
        SpecError: the file is missing, not YAML, or says something that is not allowed.
    """
    document = read_yaml(path, what="file of target settings", compare=_EXAMPLE)
    return check(TargetSettings, document, source=str(path), compare=_EXAMPLE, all_fields=_EXAMPLE)


def find_prices(environ: Mapping[str, str], target_file: Path = DEFAULT_FILE) -> Prices | None:
    """The prices of the file that ``HEADWAY_PRICES`` names; where it names none, those of a ``target.yaml``.

    Raises:
        SpecError: the file that was named is missing, or one is wrong.
    """
    if environ.get(PRICES_VARIABLE):
        path = Path(environ[PRICES_VARIABLE])
        document = read_yaml(path, what="file of prices", compare=_PRICES_PAGE)
        return check(PriceFile, document, source=str(path), compare=_PRICES_PAGE, all_fields=_PRICES_PAGE)
    return load_settings(target_file).prices if target_file.is_file() else None
