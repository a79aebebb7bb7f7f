"""Published versions of the local selector on disk: written once, checked before every use.

    versions/
      v0001-prefix-base-3f2a9c1d/
        adapter_config.json  adapter_model.safetensors    PEFT's files
        bins.safetensors     float32 [bins, hidden]: deltas of reserved head rows; not for prefix
        README.md            the model card; beside it what training adds (curve, plot)
        manifest.json        names and hashes every other file

A version is filled under a temporary name, synced and renamed, so a reader sees it complete or not
at all. One lock serialises writers and ends with its holder; the next writer deletes what a dead
one left. Put the folder on storage that all proposers see. Knows files and manifests; not which
version is live. Imports torch only where weights are read or written: a gateway has none.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from s2t_shared.errors import VersionError, VersionNotFoundError
from s2t_shared.files import (
    locked,
    private_folder,
    publish_folder,
    sha256_file,
    sync,
    temporary_name,
)
from s2t_shared.versions.manifest import (
    CARD,
    DATA_SUFFIXES,
    MANIFEST,
    Manifest,
    read_manifest,
    verify_files,
    verify_weights,
)
from s2t_shared.versions.model_card import model_card

if TYPE_CHECKING:
    from s2t_shared.model.local_selector import LocalSelector
    from s2t_shared.model.runtime import ModelRuntime
    from s2t_shared.versions.weights import SLM

LEFTOVERS = ".publishing*"
NAME = re.compile(r"v(\d{4,})-.+")
MAX_LISTED = 10  # versions that a message names


class Registry:
    """The versions under one folder, which is created when it is needed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def publish(
        self, selector: LocalSelector, manifest: Manifest, extra: Mapping[str, bytes] | None = None
    ) -> Manifest:
        """Write a local selector as a new version. Returns its complete manifest.

        manifest: `version`, `files` and `created_at` are filled in here. extra: content of further
        files by name, such as a plot.

        A job publishes once. If `manifest.job` has a version, nothing is written and that version's
        manifest is returned.
        """
        from s2t_shared.versions.weights import write_weights

        with writer_lock(self.root, LEFTOVERS):
            earlier = self.find_job(manifest.job) if manifest.job else None
            if earlier is not None:
                return earlier
            staging = temporary_name(self.root / "publishing")
            staging.mkdir()
            try:
                write_weights(selector, manifest.base_model, staging)
                _write_extra(extra or {}, staging)
                published = self._complete(manifest, staging)
                text = published.model_dump_json(indent=2)
                (staging / MANIFEST).write_text(text, encoding="utf-8")
                publish_folder(staging, self.root / published.version)
                return published
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    def _complete(self, manifest: Manifest, staging: Path) -> Manifest:
        """The manifest with the version's name and files. Writes the model card to `staging`."""
        files = {path.name: sha256_file(path) for path in sorted(staging.iterdir())}
        digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
        number = 1 + max((_number(name) for name in self.names()), default=0)
        kind, reads = manifest.kind.value, manifest.reads.value
        # A figure that could not be computed was not measured, and NaN is not JSON.
        metrics = {name: x for name, x in manifest.metrics.items() if math.isfinite(x)}
        named = manifest.model_copy(
            update={
                "version": f"v{number:04d}-{kind}-{reads}-{digest}",
                "metrics": metrics,
                "created_at": time.time(),
            }
        )
        (staging / CARD).write_text(model_card(named), encoding="utf-8")
        files[CARD] = sha256_file(staging / CARD)
        return named.model_copy(update={"files": files})

    # -- reading ----------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Complete versions, oldest first."""
        if not self.root.is_dir():
            return []
        found = []
        for path in self.root.iterdir():
            if NAME.fullmatch(path.name) and (path / MANIFEST).is_file():
                found.append(path.name)
        return sorted(found, key=lambda name: (_number(name), name))

    def folder(self, version: str) -> Path:
        """The folder of a version's files.

        Raises:
            VersionNotFoundError: there is no such version.
        """
        names = self.names()
        if version not in names:
            raise VersionNotFoundError(
                f"no version {version!r} in the registry; {_listed(names)}", field="version"
            )
        return self.root / version

    def manifest(self, version: str) -> Manifest:
        """A version's manifest.

        Raises:
            VersionNotFoundError: there is no such version.
            VersionError: its manifest is broken.
        """
        return read_manifest(self.folder(version))

    def manifests(self) -> tuple[list[Manifest], dict[str, str]]:
        """Readable manifests, oldest first; and why each of the others cannot be read."""
        readable = []
        broken = {}
        for name in self.names():
            try:
                readable.append(read_manifest(self.root / name))
            except VersionError as error:
                broken[name] = str(error)
        return readable, broken

    def find_job(self, job: str) -> Manifest | None:
        """The version that a training job has published, or None. Skips unreadable versions."""
        assert job
        readable, _ = self.manifests()
        return next((manifest for manifest in readable if manifest.job == job), None)

    def load(self, version: str, slm: SLM, tokenizer_digest: str) -> LocalSelector:
        """Read and check a version for this SLM.

        Raises:
            VersionNotFoundError: there is no such version.
            VersionError: it is damaged, or made for another SLM or tokenizer.
        """
        from s2t_shared.versions.weights import load_version

        return load_version(self.folder(version), slm, tokenizer_digest)

    def verify(
        self, version: str, runtime: ModelRuntime | None = None, tokenizer_digest: str = ""
    ) -> Manifest:
        """Check a version's manifest, files and weights. Returns the manifest.

        runtime, tokenizer_digest: an SLM that the version must fit, too.

        Raises:
            VersionNotFoundError: there is no such version.
            VersionError: the first thing that is wrong.
        """
        folder = self.folder(version)
        manifest = read_manifest(folder)
        if manifest.version != version:
            raise VersionError(
                f"version {version!r}: its manifest names {manifest.version!r}; publish it again"
            )
        verify_files(folder, manifest)
        verify_weights(folder, manifest)
        _ = manifest.calibration  # raises when the thresholds are broken
        if runtime is not None:
            from s2t_shared.versions.weights import load_version

            load_version(folder, runtime, tokenizer_digest)
        return manifest


@contextmanager
def writer_lock(root: Path, leftovers: str) -> Iterator[None]:
    """Lock a versions folder for one writer, on all hosts that share it. Creates the folder.

    leftovers: glob pattern of the writer's temporary names. What matches was left by a dead writer
    and is deleted.
    """
    if not root.is_dir():
        private_folder(root)
        sync(root.parent)
    with locked(root / ".lock"):
        for path in root.glob(leftovers):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        yield


def _write_extra(extra: Mapping[str, bytes], folder: Path) -> None:
    for name, content in extra.items():
        path = folder / name
        assert path.name == name and path.suffix in DATA_SUFFIXES, name
        assert name not in (MANIFEST, CARD) and not path.exists(), name
        path.write_bytes(content)


def _listed(names: list[str]) -> str:
    """What there is instead: the newest versions of so many."""
    newest = ", ".join(names[-MAX_LISTED:])
    if len(names) <= MAX_LISTED:
        return f"there are: {newest or 'none'}"
    return f"there are {len(names)}, the newest: {newest}"


def _number(name: str) -> int:
    match = NAME.fullmatch(name)
    assert match is not None
    return int(match.group(1))
