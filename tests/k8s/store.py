"""What an API server remembers: objects, their versions, and every change, for those who watch."""

import copy
import datetime
import re
import threading
import uuid
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Key(NamedTuple):
    """Where an object is. namespace: "" of those that have none."""

    api: str
    plural: str
    namespace: str
    name: str


class Change(NamedTuple):
    version: int
    type: str
    key: Key
    thing: dict


class Store:
    """Objects by their keys; each method is one step for all threads."""

    def __init__(self):
        self.objects: dict[Key, dict] = {}
        self.changes: list[Change] = []
        self.version = 1000
        self.lock = threading.RLock()

    def get(self, key: Key) -> dict | None:
        with self.lock:
            return copy.deepcopy(self.objects.get(key))

    def add(self, key: Key, thing: dict) -> dict:
        """A new object, with what a server gives it."""
        meta = {"uid": str(uuid.uuid4()), "creationTimestamp": now(), "generation": 1}
        return self._put("ADDED", key, thing | {"metadata": thing["metadata"] | meta})

    def replace(self, key: Key, thing: dict) -> dict:
        return self._put("MODIFIED", key, thing)

    def update(self, key: Key, change: dict) -> dict:
        """Merge `change` into it, its status too."""
        with self.lock:
            return self.replace(key, merged(self.objects[key], change))

    def remove(self, key: Key) -> None:
        """With all that it owns."""
        with self.lock:
            if key not in self.objects:
                return
            uid = self.objects[key]["metadata"]["uid"]
            self._put("DELETED", key, self.objects[key])
            del self.objects[key]
            for other, thing in list(self.objects.items()):
                if any(owner["uid"] == uid for owner in thing["metadata"].get("ownerReferences") or ()):
                    self.remove(other)

    def select(self, api: str, plural: str, namespace: str = "", query: Mapping[str, str] = {}) -> list[dict]:
        with self.lock:
            return [
                copy.deepcopy(thing) for key, thing in sorted(self.objects.items())
                if key[:2] == (api, plural) and namespace in ("", key.namespace) and matches(thing, query)
            ]  # fmt: skip

    def since(self, number: int) -> list[Change]:
        """The changes from this place in `changes` on."""
        with self.lock:
            return self.changes[number:]

    def _put(self, type_: str, key: Key, thing: dict) -> dict:
        with self.lock:
            self.version += 1
            thing = copy.deepcopy(thing)
            thing["metadata"]["resourceVersion"] = str(self.version)
            self.objects[key] = thing
            self.changes.append(Change(self.version, type_, key, copy.deepcopy(thing)))
            return copy.deepcopy(thing)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def merged(thing, change):
    """RFC 7396."""
    if not isinstance(change, dict):
        return copy.deepcopy(change)
    out = dict(thing) if isinstance(thing, dict) else {}
    for key, value in change.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merged(out.get(key), value)
    return out


def matches(thing: dict, query: Mapping[str, str]) -> bool:
    """Whether an object is of a label and a field selector."""
    labels = thing["metadata"].get("labels") or {}
    wanted = re.split(r",(?![^(]*\))", query.get("labelSelector", ""))
    fields = filter(None, query.get("fieldSelector", "").split(","))
    return all(_has(labels, one.strip()) for one in wanted if one) and all(_is(thing, one) for one in fields)


def _has(labels: dict, one: str) -> bool:
    if listed := re.fullmatch(r"(\S+) (in|notin) \((.*)\)", one):
        return (labels.get(listed[1]) in re.split(r"\s*,\s*", listed[3])) == (listed[2] == "in")
    if "!=" in one:
        key, value = one.split("!=")
        return labels.get(key) != value
    if "=" in one:
        key, value = re.split("==?", one)
        return labels.get(key) == value
    return (one.lstrip("!") in labels) != one.startswith("!")


def _is(thing: dict, one: str) -> bool:
    path, value = re.split("==?", one)
    return _at(thing, path.split(".")) == value


def _at(thing, path: Iterable[str]):
    for part in path:
        thing = thing.get(part) if isinstance(thing, dict) else None
    return thing


def cell(thing: dict, path: str):
    """What a printer column shows: a path as .status.conditions[0].type."""
    for part in re.findall(r"[^.\[\]]+", path):
        if isinstance(thing, list):
            thing = thing[int(part)] if part.isdigit() and int(part) < len(thing) else None
        else:
            thing = thing.get(part) if isinstance(thing, dict) else None
    return thing
