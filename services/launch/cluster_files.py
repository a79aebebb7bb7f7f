"""The files of `cluster/`, which come with the package: settings and manifests to start from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from s2t_shared.errors import ConfigError

# A link to the repository's `cluster/`; in a wheel, the files themselves.
CLUSTER_FILES = Path(__file__).parent / "cluster"
PRIVATE = {"secrets", "secrets-authority"}  # what `certificates.sh` makes in a checkout


def write_cluster_files(folder: Path) -> Iterator[Path]:
    """Copy the files to `folder`; yields each file that is written. Those there are kept.

    Raises:
        ConfigError: the folder cannot be written.
    """
    for source in sorted(CLUSTER_FILES.rglob("*")):
        name = source.relative_to(CLUSTER_FILES)
        target = folder / name
        if source.is_dir() or target.exists() or not PRIVATE.isdisjoint(name.parts):
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        except OSError as error:
            raise ConfigError(
                f"cannot write {target}: {error.strerror}; give another folder"
            ) from error
        yield target
