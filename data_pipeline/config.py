"""The `[data]` table."""

from typing import Literal

from pydantic import Field, model_validator

from armillary.data_pipeline.folder import CACHE_BYTES
from armillary.storage import Location
from armillary.table import Table


class SourceConfig(Table):
    """One source of documents."""

    kind: Literal["easy_vqa", "pydoc", "text", "jsonl", "parquet", "huggingface", "webdataset", "images"] = Field(
        description="how it is read; docs/data.md says what each kind reads"
    )
    name: str = Field(
        "", pattern=r"^[A-Za-z0-9_-]*$", description="names the source in shards and metrics; empty: its kind"
    )
    weight: float = Field(1.0, ge=0, description="share of the positions that it fills, relative to the others")
    augment: bool = Field(False, description="mirror and shift its images, anew each time they are seen")
    path: Location = Field("", description="its file or folder; empty: the copy in the installed package (easy_vqa)")
    text_field: str = Field("text", description="field of a record that holds its text or caption")
    image_field: str = Field("image", description="field of a record that holds its image")
    bad: Literal["stop", "skip"] = Field(
        "stop", description="what to do about a record that cannot be used; skip counts it"
    )
    min_chars: int = Field(1, ge=0, description="documents with fewer characters are dropped, unless they have images")
    max_chars: int = Field(10_000_000, ge=1, description="documents with more characters are dropped")
    quality: bool = Field(False, description="drop documents of nothing but text that break the Gopher rules for prose")

    @model_validator(mode="after")
    def _has_path(self):
        if not self.path and self.kind not in ("easy_vqa", "pydoc"):
            raise ValueError(f"a source of kind {self.kind} needs a path")
        return self

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given):
        if isinstance(given, dict) and not given.get("name") and isinstance(given.get("kind"), str):
            return given | {"name": given["kind"]}
        return given


class StageConfig(Table):
    """Other weights from some point of the run on."""

    from_positions: int = Field(ge=1, description="positions after which these weights hold, rounded up to a block")
    weights: dict[str, float] = Field(description="weight by source name; the others keep theirs")


class DataConfig(Table):
    """Where documents come from and how they become sequences."""

    path: Location = Field(
        "data/shards", description="folder of the Arrow shards, built on first use; or its URL (s3://bucket/folder)"
    )
    sources: tuple[SourceConfig, ...] = Field(
        (SourceConfig(kind="easy_vqa"),), description="sources mixed by weight; each name once"
    )
    schedule: tuple[StageConfig, ...] = Field((), description="changes of the weights, in the order of the run")
    tokenizer: str = Field("", description="a tokenizer.json or .tiktoken file; empty: a byte-level BPE is trained")
    dedup: Literal["none", "exact", "near"] = Field(
        "none",
        description="drop copies of documents: exact ones, or near ones too (MinHash, about 0.7 of 5-word runs alike)",
    )
    substrings: bool = Field(
        False, description="index every 50 characters, for contamination checks; 0.6 bytes a character"
    )
    vocab_size: int = Field(512, ge=260, description="entries of the BPE that is trained, special tokens included")
    shard_bytes: int = Field(128 << 20, ge=1, description="bytes of one shard file, about")
    compression: Literal["none", "zstd"] = Field("none", description="of shards: none is fastest, zstd smallest")
    cache: str = Field(
        "", description="folder for copies of shards that `path` has at a URL; empty: ~/.cache/armillary/shards"
    )
    cache_bytes: int = Field(CACHE_BYTES, ge=1, description="bytes that the cache holds at most")
    seq_length: int = Field(512, ge=8, description="positions in one packed row")
    max_images: int = Field(256, ge=1, description="images in one packed row at most")
    packing: Literal["greedy", "best_fit", "windows"] = Field(
        "greedy",
        description="greedy: in order, text cut at rows' ends; best_fit: only what is longer than a row is cut; "
        "windows: stretches of the token stream, which see across documents (text only)",
    )
    threads: int = Field(2, ge=1, description="threads of a rank that decode images")
    shuffle_shards: int = Field(
        0, ge=0, description="shards that are shuffled together, for shards that are far away; 0: all of a source"
    )
    seed: int = Field(1234, ge=0, description="seed of the global shuffle")

    @model_validator(mode="after")
    def _check(self):
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError("at least one source is needed")
        if len(set(names)) != len(names):
            raise ValueError("two sources have the same name; give each `name` once")
        previous = 0
        for stage in self.schedule:
            if unknown := set(stage.weights) - set(names):
                raise ValueError(f"the schedule names a source that is not there: {', '.join(sorted(unknown))}")
            if stage.from_positions <= previous:
                raise ValueError("the schedule's from_positions must rise")
            previous = stage.from_positions
        for start, weights in self.stages():
            if min(weights) < 0 or sum(weights) == 0:
                raise ValueError(f"the weights from position {start} on are {weights}: none below 0, not all 0")
        return self

    def stages(self) -> list[tuple[int, list[float]]]:
        """(first position, weights of all sources) of each stretch of the run."""
        weights = {source.name: source.weight for source in self.sources}
        found = [(0, list(weights.values()))]
        for stage in self.schedule:
            weights |= stage.weights
            found.append((stage.from_positions, list(weights.values())))
        return found
