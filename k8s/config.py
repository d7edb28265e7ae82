"""The `[kubernetes]` table: what a run's pods are, and who admits them."""

from typing import Annotated

from pydantic import Field, StringConstraints

from armillary.table import Table

NAME = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?"  # RFC 1123, as names of objects are
LABEL = rf"({NAME}/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
Name = Annotated[str, StringConstraints(pattern=rf"^({NAME})?$", max_length=253)]
Label = Annotated[str, StringConstraints(pattern=rf"^({LABEL})?$", max_length=316)]
Memory = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,8}(Mi|Gi|Ti)$")]


class KubernetesConfig(Table):
    """Read by `armillary submit` and `render` alone. What is empty is left out."""

    image: str = Field("", description="container image with this package, by digest: NAME@sha256:...")
    queue: Name = Field("", description="Kueue's LocalQueue that admits the run; empty: it starts at once, unqueued")
    priority: Name = Field("", description="Kueue's WorkloadPriorityClass")
    ranks_per_pod: int = Field(8, ge=1, le=64, description="most ranks of one pod: the GPUs of a node")
    gpu: Label = Field("nvidia.com/gpu", description="resource of a rank's GPU; empty: ranks run on processors")
    gpu_model: str = Field("", description="which GPU that is, for the planner: see `armillary plan --help`")
    network: Label = Field("", description="resource of a rank's network device: rdma/hca_shared_devices, say")
    cpus_per_rank: int = Field(8, ge=1, le=256, description="processors of a rank")
    memory_per_rank: Memory = Field("64Gi", description="host memory of a rank")
    head_cpus: int = Field(4, ge=1, le=256, description="processors of the pod of Ray's head and the driver")
    head_memory: Memory = Field("16Gi", description="host memory of that pod; shards are built there if there are none")
    rack: Label = Field("", description="node label of the topology level that all pods shall share, if they can")
    volume: Name = Field("", description="PersistentVolumeClaim for runs, shards and checkpoints, on all nodes; "
                         "empty: pods keep nothing, and checkpoint.path is a URL")  # fmt: skip
    secret: Name = Field("", description="Secret whose keys become environment variables: an object store's keys")
    service_account: Name = Field("", description="of the pods, for a cloud's identity; no token is mounted")
    start_deadline: int = Field(1800, ge=1, description="seconds that admitted pods may take until the driver runs")
    retries: int = Field(3, ge=0, le=100, description="times that a run whose head was lost or drained gets a new one")
