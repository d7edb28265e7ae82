"""One measurement in a process of its own: `python -m benchmarks.data.measure CONTENDER WHAT FOLDER`, one JSON line.

WHAT: text (windows of 2,048 tokens, batches of 64); ours alone: packed (documents), written (the same, with the labels,
positions and masks that follow written out), among and captions (packed, with images among the texts or beside them,
not decoded); images (files as they are), decoded (in one thread), decoded2 (in two), workers (batches of pixels, made
by two worker processes of PyTorch's DataLoader, or two threads of ours), patches (ours alone: the loader's own batches
of patches, by two threads); limits: gather (a memory map's rows, copied in
shuffled order), decoder (simplejpeg alone).
"""

import collections
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg

from benchmarks.data import corpora, ours, peers

SECONDS = 4.0
AT_ONCE = 16  # images that a thread decodes before it asks for more


def rate(counts: Iterable[int], started: float) -> dict:
    """Items a second after the first, over `SECONDS`, and how long the first took from `started` on."""
    counts = iter(counts)
    next(counts)
    begin = time.perf_counter()
    done, end = 0, begin
    for count in counts:
        done += count
        end = time.perf_counter()
        if end - begin > SECONDS:
            break
    return {"rate": done / (end - begin), "first": begin - started}


def gather(folder: Path) -> Iterator[int]:
    rows = peers.windows(folder)
    while True:
        order = np.random.default_rng(0).permutation(len(rows))
        for start in range(0, len(order) - peers.BATCH, peers.BATCH):
            yield rows[order[start : start + peers.BATCH]].size


def pixels(data: bytes) -> int:
    return simplejpeg.decode_jpeg(data, "RGB").shape[0] > 0


def decoder(folder: Path) -> Iterator[int]:
    held = [path.read_bytes() for path in peers.files(folder)[0][:2000]]
    return map(pixels, itertools.cycle(held))


def in_threads(images: Iterable[bytes], threads: int) -> Iterator[int]:
    """Decode with a bounded number of images in hand."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque()
        for data in images:
            waiting.append(pool.submit(pixels, data))
            if len(waiting) >= 8 * threads:
                yield waiting.popleft().result()


def in_batches(images: Iterable[bytes], threads: int) -> Iterator[int]:
    """Decode in threads, straight into batches of pixels: what `in_workers` gives."""

    def fill(pixels: np.ndarray, held: list[bytes]) -> None:
        for out, data in zip(pixels, held, strict=True):
            simplejpeg.decode_jpeg(data, "RGB", buffer=out)

    with ThreadPoolExecutor(threads) as pool:
        files = iter(images)
        waiting = collections.deque()
        while held := list(itertools.islice(files, peers.BATCH)):
            batch = np.empty((len(held), corpora.SIDE, corpora.SIDE, 3), np.uint8)
            parts = range(0, len(held), AT_ONCE)
            waiting.append([pool.submit(fill, batch[at : at + AT_ONCE], held[at : at + AT_ONCE]) for at in parts])
            if len(waiting) == 2:
                collections.deque((one.result() for one in waiting.popleft()), maxlen=0)
                yield peers.BATCH


def in_workers(contender, folder: Path) -> Iterator[int]:
    """Decode and batch in two processes; the pixels come over shared memory."""
    import torch

    class Decoded(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[np.ndarray]:
            return (simplejpeg.decode_jpeg(data, "RGB") for data in contender.images(folder))

    for batch in torch.utils.data.DataLoader(Decoded(), peers.BATCH, num_workers=2):
        yield len(batch)


def main() -> None:
    name, what, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    started = time.perf_counter()
    if what == "gather":
        found = rate(gather(folder), started)
    elif what == "decoder":
        found = rate(decoder(folder), started)
    else:
        contender = ours.Armillary() if name == "armillary" else peers.PEERS[name]()
        (
            contender.prepare_text
            if what in ("text", "packed", "among", "captions", "written")
            else contender.prepare_images
        )(folder)
        started = time.perf_counter()
        match what:
            case "text" | "packed" | "among" | "captions" | "written":
                found = rate(getattr(contender, what)(folder), started)
            case "images":
                found = rate((1 for _ in contender.images(folder)), started)
            case "decoded":
                found = rate(map(pixels, contender.images(folder)), started)
            case "decoded2":
                found = rate(in_threads(contender.images(folder), 2), started)
            case "workers" if name == "armillary":
                found = rate(in_batches(contender.images(folder), 2), started)
            case "patches":
                found = rate(contender.patches(folder, 2), started)
            case "workers":
                found = rate(in_workers(contender, folder), started)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
