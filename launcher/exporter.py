"""All metrics of a pod on one port: each exporter there signs into a folder, and is asked at each scrape.

Who does not answer within ASK_SECONDS is left out, and shows by that it is stuck; whose port is closed is gone.
"""

import contextlib
import http.client
import json
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from armillary.errors import ClusterError

ASK_SECONDS = 3.0
LOOK_SECONDS = 0.5
AT_ONCE = 32


def serve(folder: Path, port: int) -> None:
    """Answer for all of the folder, on every interface. Told to end (SIGTERM), it does when nobody there answers any
    more: the last figures are to be seen. ClusterError where the port is taken."""
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: told.set())  # the first process of a container has no default
    registry = CollectorRegistry()
    registry.register(Together(folder))
    try:
        start_http_server(port, "0.0.0.0", registry)
    except OSError as error:
        raise ClusterError(f"the metrics cannot be served: {error}", f"port {port}", "name another --port") from None
    told.wait()
    while any(ask(address) for address in addresses(folder)):
        time.sleep(LOOK_SECONDS)


class Together(Collector):
    """The metrics of every exporter whose address is in a folder."""

    def __init__(self, folder: Path):
        self._folder = folder

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        found: dict[str, Metric] = {}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for text in pool.map(ask, addresses(self._folder)):
                for family in text_string_to_metric_families(text):
                    whole = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                    whole.samples += family.samples
        yield from found.values()


def signed_in(folder: Path) -> dict[str, dict]:
    """{"pid", "address"} of every process that is there (see training.metrics.sign_in), by its name."""
    found = {}
    for path in sorted(folder.glob("[!.]*")):
        with contextlib.suppress(FileNotFoundError):  # it has just gone
            found[path.name] = json.loads(path.read_text())
    return found


def addresses(folder: Path) -> list[str]:
    """Where those have metrics who have some."""
    return [one["address"] for one in signed_in(folder).values() if one["address"]]


def ask(address: str) -> str:
    """The metrics there; "" where nobody answers in time."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=ASK_SECONDS)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()
