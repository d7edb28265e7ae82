"""Running one function in several processes that form a gloo group."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch.multiprocessing

from armillary.training.process_group import Rank, leave


def in_group(world: int, port: int, function: Callable[..., None], *args) -> None:
    """Call function(rank, *args) in `world` new processes; `rank` is ready for process_group.join.

    An exception in any of them is raised here. The processes are copies of one that has done the imports, which cost
    ten seconds of a processor; still, many cases in one call are faster.
    """
    multiprocessing.set_forkserver_preload(["armillary.training.loop", "deepspeed"])
    torch.multiprocessing.start_processes(
        _enter, (world, port, function, args), nprocs=world, start_method="forkserver"
    )


def _enter(number: int, world: int, port: int, function: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    function(Rank(number, world, number, "127.0.0.1", port), *args)
    leave()


def checkpoint_of(trainer, target: Path) -> None:
    """Save a trainer's state as a committed checkpoint. Collective."""
    import torch.distributed as dist

    from armillary.storage import LocalStorage
    from armillary.training.checkpoint.commit import commit
    from armillary.training.checkpoint.saver import Saver

    store, ranks = LocalStorage(target.parent), trainer.rank.world_size
    saver = Saver(
        store, 0, trainer.rank.rank, ranks, False, lambda name, state: commit(store.folder(name), state, 0, ranks)
    )
    saver.save(target.name, trainer.engine.state(), trainer.engine.live, trainer.state())
    saver.wait()
    if (error := saver.failure()) is not None:
        raise error
    dist.barrier()
