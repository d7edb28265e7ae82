"""What an API server checks of an object: schema with no unknown field, defaults, CEL rules."""

import copy
import functools
import importlib.resources
import json
import re
from collections.abc import Iterator
from pathlib import Path

import cel
import jsonschema
import yaml
from referencing import Registry, Resource

from tests.conftest import ROOT

CRDS = ROOT.parent / "shared" / "crds"
RELEASE = "v1.37.0-local-strict"
META = "k8s:meta"
KEPT = ("enum", "minimum", "maximum", "minLength", "maxLength", "pattern", "minItems", "maxItems", "uniqueItems",
        "required", "minProperties", "maxProperties", "multipleOf")  # fmt: skip
IN_ALTERNATIVES = ("type", "enum", "minimum", "maximum", "pattern", "required", "properties", "minLength", "maxLength",
                   "format")  # fmt: skip


@functools.cache
def crds() -> dict[tuple[str, str], tuple[dict, dict]]:
    """(definition, version) of each kind that ../shared/crds has, by (API version, kind). YAML of megabytes takes
    seconds to read."""
    found = {}
    for file in sorted(CRDS.glob("*.yaml")):
        for crd in yaml.load_all(file.read_text(), Loader=yaml.CSafeLoader):
            for version in crd["spec"]["versions"] if crd else ():
                if version["served"]:
                    key = f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]
                    found[key] = crd, version
    return found


def check(thing: dict, old: dict | None = None) -> tuple[dict, list[str]]:
    """(the object with its defaults, what is wrong with it); old: what it is to take the place of."""
    key = thing.get("apiVersion", ""), thing.get("kind", "")
    schema = crds()[key][1]["schema"]["openAPIV3Schema"] if key in crds() else None
    validator = _of_crd(key) if schema else _of_kubernetes(key)
    if validator is None:
        return thing, []
    found = sorted(validator.iter_errors(thing), key=lambda error: [str(part) for part in error.absolute_path])
    errors = [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in found]
    thing = copy.deepcopy(thing)
    if schema and not errors:
        _fill_in(schema, thing)
        errors = [f"{path}: {message}" for path, message in _broken_rules(schema, thing, old, "")]
    return thing, errors


@functools.cache
def _of_crd(key: tuple[str, str]) -> jsonschema.Draft202012Validator:
    schema = _strict(crds()[key][1]["schema"]["openAPIV3Schema"], top=True)
    return jsonschema.Draft202012Validator(schema, registry=_registry())


@functools.cache
def _of_kubernetes(key: tuple[str, str]) -> jsonschema.Draft202012Validator | None:
    """None where Kubernetes has no such kind: one of a CRD that is not at hand."""
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", lambda match: f"{match[1]}-", key[0])
    file = _folder() / f"{key[1].lower()}-{group}.json"
    if not file.is_file():
        return None
    registry = Resource.from_contents(_definitions()) @ Registry()
    return jsonschema.Draft202012Validator(json.loads(file.read_text()), registry=registry)


def _folder():
    return importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / RELEASE


@functools.cache
def _definitions() -> dict:
    return json.loads((_folder() / "_definitions.json").read_text())


@functools.cache
def _registry() -> Registry:
    definitions = _definitions()
    name = next(name for name in definitions["$defs"] if name.endswith("meta.v1.ObjectMeta"))
    meta = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$ref": f"{definitions['$id']}#/$defs/{name}"}
    return (Resource.from_contents(definitions) @ Registry()).with_resource(META, Resource.from_contents(meta))


def _strict(schema: dict, top: bool = False) -> dict:
    """A CRD's structural schema as a JSON schema that refuses unknown fields."""
    out = {key: schema[key] for key in KEPT if key in schema}
    if "type" in schema:
        out["type"] = schema["type"]
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    if schema.get("nullable"):
        out["type"] = [out["type"], "null"]
    if "properties" in schema:
        out["properties"] = {name: _strict(one) for name, one in schema["properties"].items()}
    if isinstance(schema.get("items"), dict):
        out["items"] = _strict(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = _strict(schema["additionalProperties"])
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = False
    if top or schema.get("x-kubernetes-embedded-resource"):
        text = {"type": "string"}
        out.setdefault("properties", {}).update(apiVersion=text, kind=text, metadata={"$ref": META})
    for key in ("allOf", "anyOf", "oneOf"):
        if key in schema:
            out[key] = [{name: one[name] for name in IN_ALTERNATIVES if name in one} for one in schema[key]]
    return out


def _fill_in(schema: dict, thing) -> None:
    """The schema's defaults, in place."""
    if isinstance(thing, list) and "items" in schema:
        for one in thing:
            _fill_in(schema["items"], one)
    if not isinstance(thing, dict):
        return
    for name, one in schema.get("properties", {}).items():
        if name not in thing and "default" in one:
            thing[name] = copy.deepcopy(one["default"])
        if name in thing:
            _fill_in(one, thing[name])
    if isinstance(schema.get("additionalProperties"), dict):
        for value in thing.values():
            _fill_in(schema["additionalProperties"], value)


@functools.cache
def _compiled(rule: str):
    return cel.compile(rule)


def _broken_rules(schema: dict, thing, old, path: str) -> Iterator[tuple[str, str]]:
    """CEL rules that do not hold; those of a change only where there is something old."""
    for rule in schema.get("x-kubernetes-validations") or ():
        of_change = "oldSelf" in rule["rule"]
        if of_change and old is None:
            continue
        values = {"self": thing} | ({"oldSelf": old} if of_change else {})
        if _compiled(rule["rule"]).execute(values) is not True:
            yield path, rule.get("message") or f"failed rule: {rule['rule']}"
    if isinstance(thing, dict):
        before = old if isinstance(old, dict) else {}
        for name, value in thing.items():
            one = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if isinstance(one, dict):
                yield from _broken_rules(one, value, before.get(name), f"{path}.{name}".lstrip("."))
    elif isinstance(thing, list) and "items" in schema:
        for number, value in enumerate(thing):
            yield from _broken_rules(schema["items"], value, None, f"{path}[{number}]")


def crds_at_hand() -> bool:
    return Path(CRDS).is_dir()
