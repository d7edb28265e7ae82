"""The `[data]` table."""

from typing import Literal

from pydantic import Field, model_validator

from armillary.table import Table


class SourceConfig(Table):
    """One source of documents."""

    kind: Literal["easy_vqa", "pydoc"] = Field(
        description="easy_vqa: questions about images of coloured shapes; pydoc: Python's own documentation topics"
    )
    weight: float = Field(1.0, gt=0, description="share of the positions that it fills, relative to the others")
    augment: bool = Field(False, description="mirror and shift its images, anew each time they are seen")
    path: str = Field("", description="folder with the source's files; empty: the copy in the installed package")


class DataConfig(Table):
    """Where documents come from and how they become sequences."""

    path: str = Field("data/shards", description="folder of the Arrow shards; built on first use")
    sources: tuple[SourceConfig, ...] = Field(
        (SourceConfig(kind="easy_vqa"),), description="sources mixed by weight; each kind at most once"
    )
    vocab_size: int = Field(512, ge=260, description="entries of the byte-level BPE, special tokens included")
    documents_per_shard: int = Field(8192, ge=1, description="documents in one shard file")
    seq_length: int = Field(512, ge=8, description="tokens in one packed row")
    seed: int = Field(1234, ge=0, description="seed of the global shuffle")

    @model_validator(mode="after")
    def _each_source_once(self):
        kinds = [source.kind for source in self.sources]
        if not kinds:
            raise ValueError("at least one source is needed")
        if len(set(kinds)) != len(kinds):
            raise ValueError("a source is listed twice; give it one entry with the sum of the weights")
        return self
