"""Published local selectors on disk: written aside, synced, renamed, checked before every use.

    versions/
      v0001-prefix-base-3f2a9c1d/
        adapter_config.json  adapter_model.safetensors    PEFT's files
        bins.safetensors                                  [16, hidden] deltas of the reserved rows, unless kind prefix
        manifest.json                                     written last; names and hashes every other file
      LIVE                                                which version is live, and the ones before it

Put the folder on storage that all proposers see. Knows files and manifests; not who serves them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from s2t_shared.errors import VersionError, VersionNotFoundError
from s2t_shared.files import sha256_file, sync_folder, write_atomically
from s2t_shared.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.lora import load_adapter, save_adapter
from s2t_shared.policy import Calibration
from s2t_shared.runtime import ModelRuntime

MANIFEST = "manifest.json"
LIVE = "LIVE"
BINS = "bins.safetensors"
SCHEMA_VERSION = 1


class Manifest(BaseModel):
    """What a version is, what it fits, and what was measured of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    version: str
    kind: SelectorKind
    reads: Reading
    temperature: float
    fusion: float = 0.0
    base_model: str
    slm_digest: str
    llm_digest: str
    tokenizer_digest: str
    reserved_ids: tuple[int, ...]
    bins: int
    thresholds: dict[str, dict[str, float]]
    metrics: dict[str, float]
    snapshot: str
    training: dict[str, float | int | str]
    created_at: float
    files: dict[str, str]

    @property
    def calibration(self) -> Calibration:
        """Thresholds per trigger and budget. Raises VersionError: not a calibration."""
        try:
            return Calibration.from_json(json.dumps(self.thresholds))
        except ValueError as error:
            raise VersionError(f"version {self.version!r}: thresholds are broken ({error})") from error


class Registry:
    """The versions under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def publish(self, selector: LocalSelector, manifest: Manifest) -> Manifest:
        """Write `selector` as a new version; `manifest.version` and `.files` are filled in here.

        Nobody ever sees a part of a version: the folder appears by one rename, after everything is synced.
        """
        assert selector.adapter is not None
        self.root.mkdir(parents=True, exist_ok=True)
        aside = self.root / f".publishing-{uuid.uuid4().hex}"
        aside.mkdir()
        try:
            save_adapter(selector.adapter, aside, manifest.base_model)
            if selector.bin_deltas is not None:
                save_file({"deltas": selector.bin_deltas.detach().float().cpu().contiguous()}, aside / BINS)
            files = {path.name: sha256_file(path) for path in sorted(aside.iterdir())}
            digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
            with self._lock():
                number = 1 + max((int(name[1:5]) for name in self.names()), default=0)
                name = f"v{number:04d}-{manifest.kind.value}-{manifest.reads.value}-{digest}"
                done = manifest.model_copy(update={"version": name, "files": files, "created_at": time.time()})
                for path in aside.iterdir():
                    with path.open("rb+") as stream:
                        os.fsync(stream.fileno())
                write_atomically(aside / MANIFEST, done.model_dump_json(indent=2))
                aside.rename(self.root / name)
                sync_folder(self.root)
            return done
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def names(self) -> list[str]:
        """Complete versions, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if re.fullmatch(r"v\d{4}-.+", p.name)
                      and (p / MANIFEST).is_file())

    def manifest(self, version: str) -> Manifest:
        """Raises VersionNotFoundError, or VersionError for a broken manifest."""
        if version not in self.names():
            raise VersionNotFoundError(f"no version {version!r} in the registry; there are: "
                                       f"{', '.join(self.names()) or 'none'}")
        return read_manifest(self.root / version)

    def load(self, version: str, runtime: ModelRuntime, tokenizer_digest: str) -> LocalSelector:
        """Read and check a version for this SLM. Raises VersionNotFoundError or VersionError."""
        self.manifest(version)
        return load_version(self.root / version, runtime, tokenizer_digest)

    # -- the live pointer -------------------------------------------------------------------------------------------

    def live(self) -> str | None:
        """The live version, or None."""
        return history[-1] if (history := self.history()) else None

    def history(self) -> list[str]:
        """Versions that were live, the present one last.

        Raises:
            VersionError: the pointer file is damaged.
        """
        try:
            content = json.loads((self.root / LIVE).read_text(encoding="utf-8"))
            return [str(name) for name in content["history"]]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise VersionError(f"the registry's {LIVE} file is damaged ({type(error).__name__}); promote a version "
                               "again (s2t versions promote VERSION)") from error

    def promote(self, version: str) -> None:
        """Make `version` live. Raises VersionNotFoundError or VersionError."""
        manifest = self.manifest(version)
        verify_files(self.root / version, manifest)
        with self._lock():
            try:
                history = self.history()
            except VersionError:
                history = []
            if not history or history[-1] != version:
                write_atomically(self.root / LIVE, json.dumps({"history": [*history, version][-100:]}))

    def rollback(self) -> str | None:
        """Make the version before the live one live again; returns it (None: no version is live any more).

        Raises:
            VersionError: nothing is live.
        """
        with self._lock():
            history = self.history()
            if not history:
                raise VersionError("nothing to roll back: no version is live")
            write_atomically(self.root / LIVE, json.dumps({"history": history[:-1]}))
            return history[-2] if len(history) > 1 else None

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One writer at a time, on this and other hosts that share the folder; released when the process dies."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as stream:
            flock(stream, LOCK_EX)
            yield


def read_manifest(folder: Path) -> Manifest:
    """Raises VersionError: missing, not JSON, or not of this schema."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise VersionNotFoundError(f"{folder.name!r} has no {MANIFEST}: not a published version") from error
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise VersionError(f"version {folder.name!r}: {MANIFEST} is broken ({reason}); publish it again") from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise VersionError(f"version {folder.name!r} has schema {manifest.schema_version}, this program reads "
                           f"{SCHEMA_VERSION}; train it again")
    return manifest


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Raises VersionError: a file is missing or its hash differs from the manifest's."""
    for name, expected in manifest.files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise VersionError(f"version {folder.name!r}: file {name!r} is missing; publish it again")
        if sha256_file(path) != expected:
            raise VersionError(f"version {folder.name!r}: {name} does not match its hash in the manifest; it is "
                               "damaged or was changed: publish it again")


def load_version(folder: Path, runtime: ModelRuntime, tokenizer_digest: str) -> LocalSelector:
    """Read and check the version in `folder` for this SLM.

    Raises:
        VersionNotFoundError: no manifest there.
        VersionError: damaged, or made for another SLM or tokenizer.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    for what, theirs, ours in (("SLM", manifest.slm_digest, runtime.digest),
                               ("tokenizer", manifest.tokenizer_digest, tokenizer_digest)):
        if theirs != ours:
            raise VersionError(f"version {folder.name!r} was trained for another {what} (digest {theirs}, "
                               f"this one is {ours}); choose a version of this {what}")
    adapter = load_adapter(folder, runtime.model).to(runtime.device, torch.float32)
    deltas = None
    if BINS in manifest.files:
        try:
            deltas = load_file(folder / BINS)["deltas"].to(runtime.device)
        except (OSError, KeyError, SafetensorError) as error:
            raise VersionError(f"version {folder.name!r}: {BINS} cannot be read; publish it again") from error
        expected = (manifest.bins, runtime.head.weight.shape[1])
        if tuple(deltas.shape) != expected or not torch.isfinite(deltas).all():
            raise VersionError(f"version {folder.name!r}: {BINS} must be finite and of shape {expected}, it has shape "
                               f"{tuple(deltas.shape)}")
    return LocalSelector(manifest.version, manifest.kind, manifest.reads, manifest.reserved_ids, adapter, deltas,
                         manifest.temperature, manifest.fusion, manifest.calibration)
