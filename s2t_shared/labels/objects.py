"""Shards in object storage: `s3://`, `gs://`, `az://`, `hf://`, through fsspec. A `Place`.

There is no rename and no lock there. A file is there as a whole or not at all by itself; a manifest
is created only if nobody else has created it (If-None-Match). Shards that replace others get the
manifest `rewrites/<number>.json`, with the next number after those that the rewriter had seen: of
two that rewrite at the same time one is refused, and begins again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from s2t_shared.files import sha256_file
from s2t_shared.labels.places import file_system

REWRITES, REMOVED = "rewrites", "removed"


class Objects:
    """Files below a URL."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._files, self._root = file_system(url)
        self._manifests: dict[str, bytes] = {}  # they never change: by path
        self._rewritten: dict[str, str] = {}  # path of the manifest by shard
        self._next = 0  # number of the next rewriting

    def __reduce__(self) -> tuple[type[Objects], tuple[str]]:
        return Objects, (self._url,)  # another process asks the store itself

    def path(self, name: str) -> str:
        return f"{self._root}/{name}"

    # -- a place ----------------------------------------------------------------------------------

    def names(self, suffix: str) -> list[str]:
        found = {path.rpartition("/")[2] for path in self.listed("")}
        names = {name[: -len(suffix)] for name in found if name.endswith(suffix)}
        if suffix == ".json":
            removed = {path.rpartition("/")[2] for path in self.listed(REMOVED)}
            names |= self._read_rewrites().keys() - removed
        return sorted(name for name in names if name.startswith("shard-"))

    def _read_rewrites(self) -> dict[str, str]:
        for path in self.listed(REWRITES):
            if path not in self._rewritten.values():
                name = json.loads(self.cached(path))["name"]
                self._rewritten[name] = path
        return self._rewritten

    def size(self, name: str) -> int:
        return int(self._files.info(self.path(name), refresh=True)["size"])

    def read(self, name: str) -> bytes:
        if name.endswith(".json"):
            shard = name.removesuffix(".json")
            return self.cached(self._rewritten.get(shard, self.path(name)))
        return bytes(self._files.cat_file(self.path(name)))

    def cached(self, path: str) -> bytes:
        """A file that never changes, by its path."""
        if path not in self._manifests:
            self._manifests[path] = bytes(self._files.cat_file(path))
        return self._manifests[path]

    def source(self, name: str, whole: bool) -> Any:
        """whole: in one request; otherwise what is read is asked for piece by piece."""
        if whole:
            return pa.BufferReader(self._files.cat_file(self.path(name)))
        return self._files.open(self.path(name), "rb", cache_type="readahead")

    def sha256(self, name: str) -> str:
        with tempfile.TemporaryDirectory(prefix="s2t-") as folder:
            copy = Path(folder, name)
            self._files.get_file(self.path(name), str(copy))
            return sha256_file(copy)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="s2t-") as folder:
            local = Path(folder, name)
            yield local
            self._files.put_file(str(local), self.path(name))

    def create(self, name: str, content: bytes) -> None:
        self._files.pipe_file(self.path(name), content, mode="create")

    def replace(self, name: str, content: bytes) -> None:
        self.create(f"{REWRITES}/{self._next:08}.json", content)
        self._next += 1

    def remove(self, name: str) -> None:
        shard = name.removesuffix(".json")
        if name.endswith(".json") and shard in self._rewritten:
            self._files.pipe_file(self.path(f"{REMOVED}/{shard}"), b"")
            return
        with suppress(FileNotFoundError):
            self._files.rm_file(self.path(name))

    # -- more -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A rewriting begins: what others commit from now on refuses it."""
        numbers = [
            int(path.rpartition("/")[2].removesuffix(".json")) for path in self.listed(REWRITES)
        ]
        self._next = max(numbers, default=-1) + 1

    def listed(self, folder: str) -> list[str]:
        """Paths of the files in a folder."""
        try:
            found = self._files.ls(self.path(folder).rstrip("/"), detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(found)

    def modified(self, name: str) -> float:
        """When a file was written, Unix seconds."""
        return float(self._files.modified(self.path(name)).timestamp())

    def fetch(self, name: str) -> bytes:
        """The content of a file that may change."""
        return bytes(self._files.cat_file(self.path(name)))

    def put(self, name: str, content: bytes) -> None:
        """Write a small file, whether it is there or not."""
        self._files.pipe_file(self.path(name), content)

    def move(self, name: str, target: str) -> None:
        """Copy a file, then remove it."""
        self._files.copy(self.path(name), self.path(target))
        self.remove(name)
