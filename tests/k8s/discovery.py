"""What kubectl asks a server before anything else: which kinds there are, their schemas, and tables of objects."""

import copy
import re

from tests.k8s.store import cell

VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
Kinds = dict[tuple[str, str], dict]  # by (API version, plural): kind, namespaced, columns; of a CRD its version too


def table(columns: list[dict], version: int, things: list[dict]) -> dict:
    shown = [one for one in columns if one["type"] != "date"]
    heads = [{"name": "Name", "type": "string", "format": "name", "description": "", "priority": 0}]
    heads += [{"name": one["name"], "type": one["type"], "format": "", "description": "",
               "priority": one.get("priority", 0)} for one in shown]  # fmt: skip
    rows = [
        {
            "cells": [thing["metadata"]["name"], *(cell(thing, one["jsonPath"]) for one in shown)],
            "object": {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
                       "metadata": thing["metadata"]},
        }
        for thing in things
    ]  # fmt: skip
    return {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "columnDefinitions": heads, "rows": rows,
            "metadata": {"resourceVersion": str(version)}}  # fmt: skip


def document(kinds: Kinds, path: str) -> dict | None:
    """What kubectl asks before anything else."""
    apis = sorted({api for api, _ in kinds})
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
    if path == "/apis":
        groups: dict[str, list[dict]] = {}
        for api in apis:
            group, _, version = api.partition("/")
            if version:
                groups.setdefault(group, []).append({"groupVersion": api, "version": version})
        listed = [{"name": name, "versions": found, "preferredVersion": max(found, key=_age)}
                  for name, found in groups.items()]  # fmt: skip
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    if path == "/openapi/v3":
        return {"paths": {_base(api)[1:]: {"serverRelativeURL": f"/openapi/v3{_base(api)}"} for api in apis}}
    for api in apis:
        if path == _base(api):
            listed = [{"name": plural, "singularName": kind["kind"].lower(), "namespaced": kind["namespaced"],
                       "kind": kind["kind"], "verbs": VERBS}
                      for (one, plural), kind in kinds.items() if one == api]  # fmt: skip
            return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api, "resources": listed}
        if path == f"/openapi/v3{_base(api)}":
            return _openapi(kinds, api)
    return None


def _openapi(kinds: Kinds, api: str) -> dict:
    schemas_, paths = {}, {}
    for (one, plural), kind in kinds.items():
        if one != api:
            continue
        group, _, version = api.rpartition("/")
        name, which = f"{api}.{kind['kind']}".replace("/", "."), {"group": group, "version": version,
                                                                   "kind": kind["kind"]}  # fmt: skip
        schema = kind["crd"]["schema"]["openAPIV3Schema"] if "crd" in kind else {"type": "object"}
        schemas_[name] = copy.deepcopy(schema) | {"x-kubernetes-group-version-kind": [which]}
        parts = [{"name": part, "in": "query", "schema": {"type": "string"}}
                 for part in ("dryRun", "fieldManager", "fieldValidation")]  # fmt: skip
        body = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}
        base = f"{_base(api)}{'/namespaces/{namespace}' if kind['namespaced'] else ''}/{plural}"

        def of(action: str, which=which, parts=parts, body=body) -> dict:
            return {"x-kubernetes-action": action, "x-kubernetes-group-version-kind": which, "parameters": parts,
                    "responses": {"200": {"description": "OK"} | body}}  # fmt: skip

        paths[base] = {"post": of("post"), "get": of("list")}
        paths[base + "/{name}"] = {"get": of("get"), "patch": of("patch"), "put": of("put")}
    return {"openapi": "3.0.0", "info": {"title": "tests", "version": "v1"}, "paths": paths,
            "components": {"schemas": schemas_}}  # fmt: skip


def _base(api: str) -> str:
    return f"/apis/{api}" if "/" in api else f"/api/{api}"


def _age(version: dict) -> tuple:
    """Sorts v1alpha1 < v1beta1 < v1beta2 < v1."""
    number, stage, rest = re.fullmatch(r"v(\d+)(alpha|beta)?(\d*)", version["version"]).groups()
    return int(number), {"alpha": 0, "beta": 1, None: 2}[stage], int(rest or 0)
