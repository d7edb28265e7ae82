"""Documents laid out on positions one by one, in plain Python: the yardstick of what batches hold."""

from dataclasses import dataclass

from armillary.data_pipeline.batch import PackedBatch, assemble, whole_documents
from armillary.data_pipeline.document import Encoded, Role
from armillary.data_pipeline.images import ImageShape
from armillary.data_pipeline.shards import Columns, schema_of
from armillary.data_pipeline.write import record_batch


@dataclass
class Laid:
    """Input positions of one document: tokens[i] predicts labels[i] with weight mask[i]."""

    tokens: list[int]
    labels: list[int]
    mask: list[float]
    image_starts: list[int]


def lay_out(document: Encoded, image: int, positions: int) -> Laid:
    """Widen each image token to `positions` positions, and shift."""
    spans = document.spans or [(len(document.tokens), Role.TEXT)]
    wide, learned, starts = [], [], []
    for number, token in enumerate(document.tokens):
        role = next(role for end, role in spans if number < end)
        if token == image:
            starts.append(len(wide))
        copies = positions if token == image else 1
        wide += [token] * copies
        learned += [document.weight if role in (Role.TEXT, Role.ANSWER) else 0.0] * copies
    return Laid(wide[:-1], wide[1:], learned[1:], starts)


def batch_of(
    documents: list[Encoded], seq_length: int, shape: ImageShape, image: int, vocab_size: int = 512
) -> PackedBatch:
    """The documents packed whole, through the code under test."""
    columns = Columns.of(record_batch(documents, schema_of(vocab_size)))
    return assemble(whole_documents(columns, seq_length, shape, image), columns.tokens.dtype, shape)


def decoded(columns: Columns, row: int) -> Encoded:
    """A document read back from its columns."""
    images = range(columns.image_offsets[row], columns.image_offsets[row + 1])
    spans = range(columns.span_offsets[row], columns.span_offsets[row + 1])
    return Encoded(
        tokens=columns.tokens[columns.offsets[row] : columns.offsets[row + 1]].tolist(),
        spans=[(int(columns.span_ends[i]), Role(columns.span_roles[i])) for i in spans],
        images=[(int(columns.image_at[i]), columns.image(i).tobytes()) for i in images],
        name=columns.names[row].as_py(),
        weight=float(columns.weight[row]),
    )
