"""Renders an overlay of `cluster/k8s`, as far as these files need kustomize: resources, components,
JSON patches, a config map from files, and a namespace. `kubectl kustomize`, where there is one, is
asked for the same in `test_kubernetes.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
KNOWN = {
    *("apiVersion", "kind", "namespace", "resources", "components"),
    *("configMapGenerator", "generatorOptions", "patches"),
}


def render(folder: Path) -> list[Manifest]:
    """The objects of the kustomization in `folder`."""
    text = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    unknown = text.keys() - KNOWN
    assert not unknown, f"{folder}: this renderer knows no {unknown}"
    objects: list[Manifest] = []
    for entry in [*text.get("resources", []), *text.get("components", [])]:
        source = folder / entry
        objects += render(source) if source.is_dir() else _documents(source)
    options = dict(text.get("generatorOptions", {}))
    labels = options.pop("labels", {})
    if text.get("configMapGenerator"):
        assert options == {"disableNameSuffixHash": True}
    for generated in text.get("configMapGenerator", []):
        data = {name: (folder / name).read_text(encoding="utf-8") for name in generated["files"]}
        metadata: Manifest = {"name": generated["name"]}
        if labels:
            metadata["labels"] = dict(labels)
        objects.append(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
        )
    for patch in text.get("patches", []):
        _patch(objects, patch["target"], _documents(folder / patch["path"])[0])
    if namespace := text.get("namespace"):
        for found in objects:
            found["metadata"]["namespace"] = namespace
    return objects


def _documents(file: Path) -> list[Any]:
    documents = yaml.safe_load_all(file.read_text(encoding="utf-8"))
    return [copy.deepcopy(document) for document in documents]  # anchors become copies


def _patch(objects: list[Manifest], target: dict[str, str], operations: list[Any]) -> None:
    matching = [
        found
        for found in objects
        if found["kind"] == target["kind"]
        and target.get("name", found["metadata"]["name"]) == found["metadata"]["name"]
    ]
    assert matching, f"a patch for {target} that nothing matches"
    for found in matching:
        unshared = yaml.safe_load(_without_anchors(found))
        found.clear()
        found.update(unshared)
        for operation in operations:
            _apply(found, operation)


def _without_anchors(value: Manifest) -> str:
    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(value, Dumper=Plain)


def _apply(found: Any, operation: dict[str, Any]) -> None:
    """One operation of RFC 6902."""
    *path, last = operation["path"].strip("/").split("/")
    for part in path:
        found = found[int(part)] if isinstance(found, list) else found[part]
    key: Any = int(last) if isinstance(found, list) else last
    kind = operation["op"]
    if kind == "test":
        assert found[key] == operation["value"], operation
    elif kind == "remove":
        del found[key]
    elif kind == "replace":
        found[key]  # there is something to replace
        found[key] = operation["value"]
    else:
        assert kind == "add" and isinstance(found, dict), operation
        found[key] = operation["value"]
