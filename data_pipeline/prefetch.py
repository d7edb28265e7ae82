"""Running an iterator ahead of its reader, in a thread."""

import queue
import threading
from collections.abc import Iterator


def prefetch(items: Iterator, ahead: int) -> Iterator:
    """Run `items` in a thread, at most `ahead` items before the reader; its exception is raised here."""
    ready: queue.Queue = queue.Queue(ahead)
    closed = threading.Event()

    def fill():
        try:
            for item in items:
                if not _put(ready, (item, None), closed):
                    return
            _put(ready, (None, StopIteration()), closed)
        except BaseException as error:
            _put(ready, (None, error), closed)

    thread = threading.Thread(target=fill, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()


def _put(ready: queue.Queue, item: object, closed: threading.Event) -> bool:
    while not closed.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
