"""Manifests: schemas that are read, and differences between two versions."""

from __future__ import annotations

import hashlib
import json

from s2t_shared.model.local_selector import Scoring
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.versions.manifest import changes
from s2t_shared.versions.registry import Registry
from tests.helpers.versions import publish


def test_manifests_of_the_first_schema_still_load(
    registry: Registry, runtime: ModelRuntime
) -> None:
    folder = registry.folder(publish(registry, runtime))
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name in ("job", "scoring", "standardise", "always_on", "schema_version"):
        del content[name]
    content["files"] = {
        name: digest for name, digest in content["files"].items() if name != "README.md"
    }
    (folder / "manifest.json").write_text(
        json.dumps(content | {"schema_version": 1}), encoding="utf-8"
    )
    assert registry.load(folder.name, runtime, "tok").adapter is not None
    assert registry.manifest(folder.name).scoring is Scoring.EXPECTED


def test_no_difference_between_a_version_and_itself(
    registry: Registry, runtime: ModelRuntime
) -> None:
    manifest = registry.manifest(publish(registry, runtime))
    assert changes(manifest, manifest) == []
    assert hashlib.sha256(b"").hexdigest() not in manifest.files.values()
