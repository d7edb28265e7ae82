"""Joining the other ranks: torch.distributed and Megatron-core's groups, on GPU (NCCL) or CPU (gloo)."""

import datetime
import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from armillary.errors import FaultError
from armillary.training import cpu_runtime
from armillary.training.layout import Layout

# A collective waits as long as the slowest rank may take: over a whole checkpoint, or the building of shards.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class Rank:
    """One process of a run: its number, its number on its machine, and where rank 0 waits."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def join(rank: Rank, layout: Layout, timeout_seconds: float = 300.0) -> None:
    """Meet the other ranks within `timeout_seconds` and form the layout's groups. One process needs no address.

    May be called again in one process for another layout of the same world size.
    """
    cpu_runtime.install()
    os.environ["LOCAL_RANK"] = str(rank.local_rank)  # DeepSpeed reads its device from here
    if rank.device.type == "cuda":
        torch.cuda.set_device(rank.device)
    if not dist.is_initialized():
        store: dist.Store = dist.HashStore()
        try:
            if rank.world_size > 1:
                store = _meet(rank, datetime.timedelta(seconds=timeout_seconds))
            dist.init_process_group(
                "nccl" if rank.device.type == "cuda" else "gloo",
                store=store,
                rank=rank.rank,
                world_size=rank.world_size,
                timeout=COLLECTIVE_TIMEOUT,
            )
        except (dist.DistStoreError, dist.DistNetworkError, OSError) as error:
            raise FaultError(
                f"rank {rank.rank} could not meet the other {rank.world_size - 1}: {str(error).splitlines()[0]}",
                f"{rank.address}:{rank.port}",
                "see the other ranks' logs; raise the timeout if the machines are slow to start",
            ) from None
    _forget_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        create_gloo_process_groups=False,
        expert_tensor_parallel_size=1,  # an expert is small enough to be whole on a rank
    )
    # Sequence parallelism forks this random state; nothing is drawn from it while there is no dropout.
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def _meet(rank: Rank, timeout: datetime.timedelta) -> dist.TCPStore:
    """The store through which ranks find each other, on rank 0's own address only (a TCPStore by itself listens
    on every interface)."""
    listener = None
    if rank.rank == 0:
        listener = socket.create_server((rank.address, rank.port))
    return dist.TCPStore(
        rank.address,
        rank.port,
        rank.world_size,
        is_master=rank.rank == 0,
        timeout=timeout,
        master_listen_fd=None if listener is None else listener.detach(),
    )


def _forget_groups() -> None:
    """Leave the groups of an earlier layout, each of which has threads and connections."""
    for group in parallel_state._global_process_group_list or ():
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def leave() -> None:
    """Undo `join`."""
    _forget_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
