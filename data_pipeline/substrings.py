"""Whether a stretch of 50 characters occurs in the training data: what contamination checks ask.

Texts are compared by their letters and digits alone (GPT-4 Technical Report, appendix C). Of each document the 25
characters from every 26th on are hashed: any 50 characters hold exactly one such run whole, so that 26 look-ups find
every document that may hold them, and reading it decides.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from armillary.data_pipeline.corpus import Corpus
from armillary.data_pipeline.document import Document
from armillary.data_pipeline.folder import Folder, checksum, open_checked
from armillary.data_pipeline.shards import Manifest, SubstringFile
from armillary.data_pipeline.tokenizer import Tokenizer
from armillary.errors import DataError, JobError

STRETCH, RUN, EVERY = 50, 25, 26
SCHEMA = pa.schema([("hash", pa.uint64()), ("document", pa.uint32())])


def normalise(text: str) -> str:
    """The letters and digits of a text, in their order."""
    return "".join(filter(str.isalnum, text))


class SubstringWriter:
    """The index of one part's documents, in the making."""

    def __init__(self):
        self._hashes: list[int] = []
        self._documents: list[int] = []

    def add(self, number: int, document: Document) -> None:
        """`number`: the document's place among those of its part that are kept."""
        text = normalise("".join(document.texts))
        for start in range(0, len(text) - RUN + 1, EVERY):
            self._hashes.append(xxhash.xxh3_64_intdigest(text[start : start + RUN].encode()))
            self._documents.append(number)

    def write(self, path: Path, documents: int) -> SubstringFile:
        """Write the index, sorted by hash; `documents`: how many the part has."""
        hashes, numbers = np.array(self._hashes, np.uint64), np.array(self._documents, np.uint32)
        order = np.argsort(hashes, kind="stable")
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            arrays = [pa.array(hashes[order]), pa.array(numbers[order])]
            writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
        return SubstringFile(file=path.name, documents=documents, bytes=path.stat().st_size, xxh3=checksum(path))


class SubstringIndex:
    """The indexes of a data set that was built with `data.substrings = true`; DataError where there are none."""

    def __init__(self, folder: Folder, manifest: Manifest):
        if not any(manifest.substrings.values()):
            raise DataError(
                "the shards have no index of substrings", folder.at(""), "build them with data.substrings=true"
            )
        self._tokenizer = Tokenizer.from_json(manifest.tokenizer)
        self._corpora = {source: Corpus(folder, manifest, source, self._tokenizer) for source in manifest.sources}
        self._files = []
        for source, files in manifest.substrings.items():
            before = 0
            for file in files:
                self._files.append((source, before, *_opened(folder, file)))
                before += file.documents

    def find(self, stretch: str) -> list[tuple[str, int]]:
        """(source, number) of every document that holds the letters and digits of `stretch` behind each other.

        JobError where those are fewer than 50.
        """
        wanted = normalise(stretch)
        if len(wanted) < STRETCH:
            raise JobError(
                f"it has {len(wanted)} letters and digits, {STRETCH} are needed", stretch[:50], "take a longer one"
            )
        runs = [wanted[start : start + RUN].encode() for start in range(EVERY)]
        hashes = np.sort(np.array([xxhash.xxh3_64_intdigest(run) for run in runs], np.uint64))
        found: set[tuple[str, int]] = set()
        for source, before, kept, documents in self._files:
            low, high = np.searchsorted(kept, hashes, "left"), np.searchsorted(kept, hashes, "right")
            for first, last in zip(low.tolist(), high.tolist(), strict=True):
                found |= {(source, before + number) for number in documents[first:last].tolist()}
        return sorted(place for place in found if wanted in normalise(self._text(*place)))

    def _text(self, source: str, number: int) -> str:
        entry = self._corpora[source].look_up(np.array([number]))
        columns, row = self._corpora[source].columns(int(entry.shard[0]), int(entry.batch[0])), int(entry.row[0])
        return self._tokenizer.decode(columns.tokens[columns.offsets[row] : columns.offsets[row + 1]].tolist())


def _opened(folder: Folder, file: SubstringFile) -> tuple[np.ndarray, np.ndarray]:
    content = open_checked(folder, file.file, file.bytes, file.xxh3, "an index of substrings")
    batch = pa.ipc.open_file(content).get_batch(0)
    return batch.column(0).to_numpy(), batch.column(1).to_numpy()
