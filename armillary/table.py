"""The base of every job-file table: typed, frozen, and closed to unknown keys."""

from pydantic import BaseModel, ConfigDict


class Table(BaseModel):
    """One table of the job file. The class lives with its component; field descriptions are its manual."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())
