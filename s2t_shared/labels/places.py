"""Where shards lie: a folder. One file at a time, each there as a whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import fsspec

from s2t_shared.errors import ConfigError
from s2t_shared.files import new_file, new_folder, sha256_file


class Place(Protocol):
    """A folder of files that never change. Every method raises OSError."""

    def names(self, suffix: str) -> list[str]:
        """Names of the shards' files that end so, without the end, in order."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def read(self, name: str) -> bytes:
        """The content of a small file."""

    def source(self, name: str, whole: bool) -> Any:
        """What `pyarrow.parquet` opens. whole: all of it will be read."""

    def sha256(self, name: str) -> str:
        """Hex digest of a file's content."""

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """A path to write to; its content is the file, durably, when the block ends."""

    def create(self, name: str, content: bytes) -> None:
        """Write a small file, durably.

        Raises:
            FileExistsError: somebody was faster.
        """

    def replace(self, name: str, content: bytes) -> None:
        """As `create`, of the manifest of a shard that replaces others.

        Raises:
            FileExistsError: somebody else replaced shards meanwhile.
        """

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""


class Folder:
    """A folder on a file system: a `Place`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self, suffix: str) -> list[str]:
        return sorted(path.name[: -len(suffix)] for path in self.path.glob(f"shard-*{suffix}"))

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def source(self, name: str, whole: bool) -> Any:
        return str(self.path / name)

    def sha256(self, name: str) -> str:
        return sha256_file(self.path / name)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with new_file(self.path / name) as temporary:
            yield temporary

    def create(self, name: str, content: bytes) -> None:
        with new_file(self.path / name) as temporary:
            temporary.write_bytes(content)

    def replace(self, name: str, content: bytes) -> None:
        self.create(name, content)  # under the lake's lock nobody else replaces

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)


@contextmanager
def new_folder_at(target: Path | str) -> Iterator[Path]:
    """A folder to fill, which becomes `target`: a folder or a URL. There, `README.md` comes last.

    Raises:
        ConfigError: it exists and is not empty.
    """
    if not is_url(target):
        path = Path(target).absolute()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise _not_empty(target)
        with new_folder(path) as folder:
            yield folder
        return
    files, root = file_system(str(target))
    if files.exists(root) and files.ls(root, detail=False, refresh=True):
        raise _not_empty(target)
    with folder_at(target) as folder:
        yield folder


@contextmanager
def folder_at(target: Path | str) -> Iterator[Path]:
    """A folder whose files come to `target`: itself, or one that is sent to a URL."""
    if not is_url(target):
        yield Path(target)
        return
    files, root = file_system(str(target))
    with tempfile.TemporaryDirectory(prefix="s2t-") as temporary:
        folder = Path(temporary)
        yield folder
        for file in sorted(folder.rglob("*"), key=lambda file: (file.parent == folder, file.name)):
            if file.is_file():
                files.put_file(str(file), f"{root}/{file.relative_to(folder).as_posix()}")


def _not_empty(target: Path | str) -> ConfigError:
    return ConfigError(
        f"{str(target)!r} exists and is not an empty folder; give another name, or remove it"
    )


def is_url(where: Path | str) -> bool:
    """Whether it is in object storage."""
    return isinstance(where, str) and "://" in where


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path on it.

    Raises:
        ConfigError: there is none for its scheme.
    """
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url.rstrip("/"))
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{url!r} cannot be used: {error}; install the fsspec file system of its scheme "
            "(s3fs, gcsfs, adlfs, huggingface_hub)"
        ) from error
    return found
