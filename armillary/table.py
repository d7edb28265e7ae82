"""The base of every job-file table and of what is written as JSON: typed, frozen, and closed to unknown keys."""

import json

import xxhash
from pydantic import BaseModel, ConfigDict


class Table(BaseModel):
    """One table of the job file. The class lives with its component; field descriptions are its manual."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )


class SealedTable(Table):
    """A table that knows when a byte of its file has changed: `xxh3` is a checksum of all its other fields."""

    xxh3: str = ""

    def sealed(self):
        """A copy with its checksum, ready to be written."""
        return self.model_copy(update={"xxh3": self._checksum()})

    @property
    def intact(self) -> bool:
        return self.xxh3 == self._checksum()

    def _checksum(self) -> str:
        fields = self.model_dump(mode="json", exclude={"xxh3"})
        return xxhash.xxh3_64_hexdigest(json.dumps(fields, sort_keys=True).encode())
