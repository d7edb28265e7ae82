"""The job file: one TOML file is one run. Everything wrong with it is refused here, before anything starts."""

import difflib
import hashlib
import json
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, Field, ValidationError

from armillary.data_pipeline.mixture import BLOCK_ROWS
from armillary.errors import JobError
from armillary.k8s.config import KubernetesConfig
from armillary.storage import is_url
from armillary.table import Table
from armillary.training.config import TrainJob
from armillary.training.support import problems


class ClusterConfig(Table):
    """The `[cluster]` table: what the launcher asks of the machines."""

    address: str = Field("", description="Ray cluster to join, as host:port; empty: start one on this machine")
    cpus_per_rank: int = Field(0, ge=0, description="processors of one rank; 0: this machine's, shared out evenly")
    max_restarts: int = Field(
        3,
        ge=0,
        description="times that a run which lost a process or a machine may start again without a new checkpoint",
    )
    min_ranks: int = Field(1, ge=1, description="where machines are lost, go on with fewer ranks, down to so many")
    standby: bool = Field(
        False, description="beside each rank a process that waits, to take its place at once; it needs host memory"
    )
    hang_timeout: float = Field(
        600.0, gt=0, description="seconds in which no rank moves, after which the run starts anew from its checkpoint"
    )
    grace: float = Field(30.0, gt=0, description="seconds from a SIGTERM within which a checkpoint is to be saved")
    start_timeout: float = Field(300.0, gt=0, description="seconds that ranks may take to find machines and meet")


class Job(TrainJob):
    """A whole job file."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run's directory and metrics"
    )
    cluster: ClusterConfig = ClusterConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()

    def hash(self) -> str:
        """Names the resolved job: 16 hex digits of the SHA-256 of its canonical JSON."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:16]

    def to_toml(self) -> str:
        """The resolved job, every key with its value."""
        return tomli_w.dumps(self.model_dump(mode="json"))

    def with_absolute_paths(self) -> "Job":
        """The same job from whatever folder it is resumed, on whatever node its ranks run."""
        sources = [source.model_copy(update={"path": _absolute(source.path)}) for source in self.data.sources]
        paths = {key: _absolute(getattr(self.data, key)) for key in ("path", "cache", "tokenizer")}
        data = self.data.model_copy(update=paths | {"sources": tuple(sources)})
        checkpoint = self.checkpoint.model_copy(
            update={key: _absolute(getattr(self.checkpoint, key)) for key in ("path", "start")}
        )
        return self.model_copy(update={"data": data, "checkpoint": checkpoint})

    def warnings(self) -> list[str]:
        """What is likely to be a mistake, or is missing on this machine, each with its key."""
        found = []
        data = self.with_absolute_paths().data
        there = is_url(data.path) or os.path.exists(data.path)
        if not there:
            paths = {f"data.sources: {source.name}": source.path for source in data.sources}
            paths["data.tokenizer"] = data.tokenizer
            found += [f"{key}: there is nothing at {path}" for key, path in paths.items() if not _exists(path)]
        end, block = self.training.steps * self.training.global_batch * data.seq_length, BLOCK_ROWS * data.seq_length
        for stage in data.schedule:
            begin = -(-stage.from_positions // block) * block
            if begin >= end:
                found.append(f"data.schedule: a change at {begin:,} positions never comes, the run ends at {end:,}")
        return found

    def train_job(self) -> TrainJob:
        """The part that training sees."""
        return TrainJob.model_validate(self.model_dump(include=set(TrainJob.model_fields)))


def _absolute(path: str) -> str:
    return path if not path or is_url(path) else os.path.abspath(os.path.expanduser(path))


def _exists(path: str) -> bool:
    return not path or os.path.exists(path)


WANTED = {  # by pydantic's name for the problem
    "int": "a whole number is needed",
    "float": "a number is needed",
    "finite_number": "a finite number is needed",
    "int_from_float": "a whole number is needed",
    "bool": "true or false is needed",
    "string": "a string is needed",
    "tuple": "a list is needed",
    "model": "a table is needed",
    "dict": "a table is needed",
}


def load_job(path: Path, overrides: list[str] = ()) -> Job:
    """Read a job file and apply `table.key=value` overrides; JobError names the file, key, reason and remedy."""
    return resolve(apply_overrides(read_toml(path), overrides), str(path))


def read_toml(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError("there is no such job file", path, "check the path; examples/ has some") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"the job file cannot be read: {error}", path, "check the path and its permissions") from None
    return parse_toml(text, str(path))


def parse_toml(text: str, where: str) -> dict:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"the job file is not valid TOML: {error}", where, "correct that line") from None


def apply_overrides(job: dict, overrides: list[str] = ()) -> dict:
    """A copy of `job` with each "table.key=value" set; a value is TOML, or else taken as a string."""
    job = json.loads(json.dumps(job, default=str))
    for override in overrides:
        key, separator, text = override.partition("=")
        names = key.strip().split(".")
        if not separator or not all(names):
            raise JobError(f"an override is not of the form table.key=value: {override}", "command line",
                           "for example training.steps=100")  # fmt: skip
        table = job
        for name in names[:-1]:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise JobError(f"{name} in {key} is not a table", "command line", "see `armillary job explain`")
        try:
            table[names[-1]] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError as error:
            if text.lstrip().startswith(("[", "{", '"', "'")):
                fix = "put the whole override in single quotes: the shell eats the inner ones"
                raise JobError(f"the value of {key} is not valid TOML: {error}", "command line", fix) from None
            table[names[-1]] = text
    return job


def resolve(tables: dict, where: str) -> Job:
    """Check a job's tables and fill in what they leave out."""
    model = tables.get("model")
    data = tables.get("data", {})
    if isinstance(model, dict) and isinstance(data, dict) and not model.get("vocab_size"):
        size = data.get("vocab_size", TrainJob.model_fields["data"].default.vocab_size)
        if isinstance(size, int):
            tables = tables | {"model": model | {"vocab_size": -(-size // 64) * 64}}
    elif model is None:
        return resolve(tables | {"model": {}}, where)
    try:
        job = Job.model_validate(tables)
    except ValidationError as error:
        raise _refusal(error, where) from None
    if job.data.vocab_size > job.model.vocab_size:
        raise JobError(
            f"model.vocab_size: {job.model.vocab_size} is less than data.vocab_size = {job.data.vocab_size}", where,
            "raise it, or leave it out",
        )  # fmt: skip
    if job.image_shape.positions > job.data.seq_length:
        raise JobError(
            f"data.seq_length: an image takes {job.image_shape.positions} positions, a row has {job.data.seq_length}",
            where, f"set it to at least {job.image_shape.positions}, or take larger patches (model.patch_size)",
        )  # fmt: skip
    if found := problems(job.setting):
        reasons = "; ".join(f"{key}: {reason}" for key, reason in found)
        raise JobError(f"the layout cannot run this model: {reasons}", where, "change the layout or the dimension")
    return job


def explain() -> Iterator[tuple[str, str, str, str]]:
    """Every key of a job file: (name, type, default, meaning), from the classes themselves."""
    return _explain(Job, "")


def _explain(table: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    scalars = [(n, f) for n, f in table.model_fields.items() if _table_in(f.annotation) is None]
    tables = [(n, f) for n, f in table.model_fields.items() if _table_in(f.annotation) is not None]
    for name, field in scalars:
        default = "(required)" if field.is_required() else json.dumps(field.default)
        yield f"{prefix}{name}", _type_name(field.annotation), default, field.description or ""
    for name, field in tables:
        listed = get_origin(field.annotation) is tuple
        yield from _explain(_table_in(field.annotation), f"{prefix}{name}{'[]' if listed else ''}.")


def _table_in(annotation: Any) -> type[BaseModel] | None:
    """The table class of a field, or of the items of its list."""
    inner = get_args(annotation)[0] if get_origin(annotation) is tuple else annotation
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(_type_name, get_args(annotation)))
    if get_origin(annotation) is dict:
        return f"table of {_type_name(get_args(annotation)[1])}s"
    if isinstance(annotation, type):
        return {"str": "string", "int": "integer", "float": "number", "bool": "true/false"}[annotation.__name__]
    return " | ".join(json.dumps(choice) for choice in get_args(annotation))


def _refusal(error: ValidationError, where: str) -> JobError:
    """One message for everything that pydantic found wrong."""
    reasons, fixes = [], []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"])) or "job"
        if problem["type"] == "extra_forbidden":
            reasons.append(f"{key}: there is no such key")
            fixes.append(_nearest([part for part in problem["loc"] if not isinstance(part, int)]))
        elif problem["type"] == "value_error":
            reasons.append(f"{key}: {problem['ctx']['error']}")
        else:
            wanted = WANTED.get(problem["type"].removesuffix("_parsing").removesuffix("_type"))
            reasons.append(f"{key}: {wanted or problem['msg']}, not {problem['input']!r}")
    fixes.append("`armillary job explain` says what every key takes")
    return JobError("; ".join(reasons), where, " ".join(filter(None, fixes)))


def _nearest(path: list[str]) -> str:
    """The key that was probably meant by one that is not there."""
    same = [key for key, *_ in explain() if key.rpartition(".")[2] == path[-1]]
    near = difflib.get_close_matches(path[-1], list(_table_at(path[:-1]).model_fields), n=1, cutoff=0.5)
    meant = same or [".".join([*path[:-1], name]) for name in near]
    return f"did you mean {' or '.join(meant)}?" if meant else ""


def _table_at(path: list) -> type[BaseModel]:
    table: type[BaseModel] = Job
    for name in path:
        table = _table_in(table.model_fields[name].annotation) or table
    return table
