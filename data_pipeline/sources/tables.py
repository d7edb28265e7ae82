"""Tables: Parquet files, and folders that the Hugging Face `datasets` library saved to disk. A row is a record."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from armillary.data_pipeline.config import SourceConfig
from armillary.data_pipeline.sources.part import Part, files_of, name_in
from armillary.data_pipeline.sources.record import Record
from armillary.errors import DataError


def parts(source: SourceConfig) -> list[Part]:
    """Row groups of Parquet files, whole Arrow files."""
    if source.kind == "huggingface":
        return [Part(files=(str(file),)) for file in files_of(source)]
    found = []
    for file in files_of(source):
        with _opened(file) as table:
            found += [Part(files=(str(file),), start=n, stop=n + 1) for n in range(table.num_row_groups)]
    return found


def read(source: SourceConfig, part: Part) -> Iterator[Record]:
    """The rows."""
    path = Path(part.files[0])
    name = name_in(source, path)
    batches = _arrow(path) if source.kind == "huggingface" else _parquet(path, part.start)
    rows = (row for batch in _checked(batches, source, path) for row in batch.to_pylist())
    for number, row in enumerate(rows):
        yield Record(f"{name}, row {number} of group {part.start}", path.parent, lambda row=row: row)


def _checked(batches: Iterator[pa.RecordBatch], source: SourceConfig, path: Path) -> Iterator[pa.RecordBatch]:
    """The same; DataError where they lack a column that the source names, or any that a document could be made of."""
    for batch in batches:
        names, image = batch.schema.names, source.image_field
        wanted = [image] if image != SourceConfig.model_fields["image_field"].default else []
        if not {"parts", "answer"}.intersection(names):
            wanted.append(source.text_field)
        if missing := [name for name in wanted if name not in names]:
            raise DataError(
                f"the table has no column {missing[0]}, but {', '.join(names)}",
                path,
                "correct text_field or image_field",
            )
        yield batch


def _parquet(path: Path, group: int) -> Iterator[pa.RecordBatch]:
    with _opened(path) as table:
        try:
            yield from table.iter_batches(batch_size=256, row_groups=[group])
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from None


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _arrow(path: Path) -> Iterator[pa.RecordBatch]:
    """Batches of a stream, as `save_to_disk` writes it, or of a random-access file."""
    try:
        with pa.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(file)
                yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                file.seek(0)
                yield from pa.ipc.open_stream(file)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"a table cannot be read: {str(error).splitlines()[0]}", path, "restore or remove the file")
