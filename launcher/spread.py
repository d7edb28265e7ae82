"""Working on many items at once, over the processors of a Ray cluster or of this machine."""

from collections.abc import Callable, Iterable, Iterator

from armillary.launcher import cluster


def spread(address: str, workers: int) -> Callable[[Callable, Iterable], Iterator]:
    """A `map` that gives results as they come, `workers` at a time; Ray is started only if there is more than one item.

    address: of a Ray cluster to join; empty: this machine. An error of one item is raised here, and ends the others.
    """

    def each(function: Callable, items: Iterable) -> Iterator:
        waiting = list(items)
        if workers == 1 or len(waiting) < 2:
            yield from map(function, waiting)
            return
        with cluster.connected(address, min(workers, len(waiting))):
            import ray

            environment = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            remote = ray.remote(num_cpus=1, max_retries=0, runtime_env={"env_vars": environment})(function)
            running = []
            while waiting or running:
                while waiting and len(running) < workers:
                    running.append(remote.remote(waiting.pop(0)))
                done, running = ray.wait(running)
                try:
                    yield ray.get(done[0])
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None

    return each
