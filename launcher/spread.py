"""Working on many items at once, over the processors of a Ray cluster or of this machine."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

from armillary.launcher import cluster

ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@contextlib.contextmanager
def spread(address: str, workers: int) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """Within, a `map` that gives results as they come, `workers` at a time.

    address: of a Ray cluster to join; empty: this machine. Ray is started once, and only for more than one item. An
    error of one item is raised, and ends the others.
    """
    with contextlib.ExitStack() as session:
        connected = False

        def each(function: Callable, items: Iterable) -> Iterator:
            nonlocal connected
            waiting = list(items)
            if workers == 1 or len(waiting) < 2:
                yield from map(function, waiting)
                return
            if not connected:
                session.enter_context(cluster.connected(address, workers))
                connected = True
            import ray

            remote = ray.remote(num_cpus=1, max_retries=0, runtime_env={"env_vars": ENVIRONMENT})(function)
            running = []
            while waiting or running:
                while waiting and len(running) < workers:
                    running.append(remote.remote(waiting.pop(0)))
                done, running = ray.wait(running)
                try:
                    yield ray.get(done[0])
                except ray.exceptions.RayTaskError as error:
                    for one in running:
                        ray.cancel(one, force=True)
                    ray.wait(running, num_returns=len(running), timeout=30)  # or they go on to write
                    raise error.cause from None

        yield each
