"""Where documents come from before they are tokens: one file a kind, each cut into parts that are read by themselves.

A kind is two functions: `parts(source)` lists a source's parts, `read(source, part)` gives a part's records as they
stand in its files. What a record may hold is in record.py, for all kinds alike.
"""

from collections.abc import Iterator
from types import ModuleType

from armillary.data_pipeline.config import SourceConfig
from armillary.data_pipeline.document import Document
from armillary.data_pipeline.sources import easy_vqa, images, jsonl, pydoc, tables, text, webdataset
from armillary.data_pipeline.sources.part import Part
from armillary.data_pipeline.sources.record import document_of
from armillary.errors import DataError

KINDS: dict[str, ModuleType] = {
    "easy_vqa": easy_vqa,
    "pydoc": pydoc,
    "text": text,
    "jsonl": jsonl,
    "parquet": tables,
    "huggingface": tables,
    "webdataset": webdataset,
    "images": images,
}


def parts_of(source: SourceConfig) -> list[Part]:
    """The source's parts, in a fixed order; DataError where there are none."""
    found = KINDS[source.kind].parts(source)
    if not found:
        raise DataError(
            f"the source {source.name} has no files of its kind", source.path, "correct its `path` or `kind`"
        )
    return found


def read_part(source: SourceConfig, part: Part) -> Iterator[Document | DataError]:
    """The part's documents in order; in the place of one that cannot be used, the reason.

    DataError where a file cannot be read to its end.
    """
    for record in KINDS[source.kind].read(source, part):
        try:
            yield document_of(record, source)
        except DataError as error:
            yield error
