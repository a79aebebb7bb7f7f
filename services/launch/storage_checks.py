"""What `s2t doctor` looks at on disk: room, locks, where the spool lies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from s2t_shared.config import Config
from s2t_shared.errors import ConfigError, StoreError
from s2t_shared.files import locked, temporary_name, write_atomically
from s2t_shared.labels.object_lake import ObjectLake
from services.launch.findings import Finding, fail, ok, warn

GIB = 1 << 30
LEAST_FREE_GIB = 1.0
LOCK_TIMEOUT_S = 10.0
SLOW_SYNC_S = 0.5
NETWORK = ("nfs", "cifs", "smb", "ceph", "gluster", "lustre", "beegfs", "gpfs", "afs", "9p", "fuse")
FLEETING = ("tmpfs", "ramfs")
# Holds a lock on a file until its standard input ends.
HOLDER = """
import sys
from pathlib import Path
from s2t_shared.errors import ConfigError, StoreError
from s2t_shared.files import locked
with locked(Path(sys.argv[1]), shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@dataclass(frozen=True)
class Mount:
    """The file system that a path is on. options: of the mount and of the file system."""

    kind: str
    options: frozenset[str]

    @property
    def is_network(self) -> bool:
        return self.kind.startswith(NETWORK)


def check_storage(config: Config) -> Iterator[Finding]:
    yield _data_folder(config.data_dir)
    yield _room("disk", config.data_dir, LEAST_FREE_GIB)
    if config.labels.lake is not None:
        yield _object_lake(config.labels.lake)
    yield _spool(config.spool)
    yield _room("spool disk", config.spool, config.labels.spool_mib / 1024)


# -- room -----------------------------------------------------------------------------------------


def _room(what: str, folder: Path, wanted_gib: float) -> Finding:
    """Whether there is room for `wanted_gib` where the folder is, or will be."""
    usage = shutil.disk_usage(_existing(folder))
    free_gib = usage.free / GIB
    detail = f"{free_gib:.1f} of {usage.total / GIB:.1f} GiB free for {folder}"
    if free_gib >= wanted_gib:
        return ok(what, detail)
    mend = f"free space: it may need {wanted_gib:.1f} GiB"
    return warn(what, detail, mend) if free_gib > wanted_gib / 10 else fail(what, detail, mend)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _object_lake(url: str) -> Finding:
    """Whether the lake's store can be written to as a drain writes."""
    try:
        ObjectLake(url).check()
    except (ConfigError, StoreError) as error:
        return fail("lake", str(error))
    return ok("lake", f"{url}: files are written, read, and created once")


# -- where ----------------------------------------------------------------------------------------


def mount_of(folder: Path, mounts: str = "/proc/self/mountinfo") -> Mount | None:
    """The mount that a folder is on; None where the system does not say."""
    try:
        lines = Path(mounts).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found: dict[int, Mount] = {}  # by the depth of its point; of two on one point the later one
    for line in lines:
        own, _, rest = line.partition(" - ")
        _, _, _, _, point, own_options, *_ = own.split()
        kind, _, options = rest.split(" ", 2)
        path = Path(point.encode().decode("unicode_escape"))
        if folder == path or path in folder.parents:
            found[len(path.parts)] = Mount(kind, frozenset(f"{own_options},{options}".split(",")))
    return found[max(found)] if found else None


def _spool(spool: Path) -> Finding:
    mount = mount_of(_existing(spool).resolve())
    if mount is None:
        return ok("spool", f"{spool}")
    detail = f"{spool} is on {mount.kind}"
    mend = "labels.spool_dir: a folder on a disk of each proposer's own node"
    if mount.is_network:
        return warn("spool", f"{detail}, over the network: gone when labels need it most", mend)
    if mount.kind in FLEETING:
        return warn("spool", f"{detail}, in memory: a power cut takes acknowledged labels", mend)
    return ok("spool", detail)


# -- locks ----------------------------------------------------------------------------------------


def _data_folder(folder: Path) -> Finding:
    """Whether locks of other processes count, and files are replaced durably, in the data
    folder."""
    what = "data folder"
    if not folder.is_dir():
        return ok(what, f"{folder} will be made")
    mount = mount_of(folder.resolve())
    if mount is not None and {"local_lock=all", "local_lock=flock"} & mount.options:
        return fail(
            what,
            f"{folder} is on {mount.kind} with locks that other nodes do not see",
            "mount it with local_lock=none (NFSv4 does so by itself)",
        )
    probe = temporary_name(folder / "doctor")
    try:
        probe.mkdir()
        try:
            wrong = _wrong_locks(probe / "lock")
            sync_s = _replace(probe / "file")
        finally:
            shutil.rmtree(probe, ignore_errors=True)
    except OSError as error:
        return fail(what, f"{folder}: {error.strerror or error}", "a folder this user can write")
    if wrong:
        return fail(
            what,
            f"{folder}: {wrong}",
            "a file system with flock: a local disk, NFSv4, CephFS; not an object store",
        )
    detail = f"{folder}: locks hold between processes, a file is durable in {sync_s * 1000:.0f} ms"
    if sync_s > SLOW_SYNC_S:
        return warn(what, detail, "a faster disk: every shard and version waits for it")
    return ok(what, detail)


def _wrong_locks(file: Path) -> str:
    """What is wrong with locks between two processes, or ""."""
    for held, wanted, expected in (
        ("exclusive", "shared", False),
        ("shared", "shared", True),
        ("shared", "exclusive", False),
    ):
        with _other_holds(file, held), locked(file, wanted == "shared", wait=False) as got:
            if got != expected:
                verb = "was not granted" if expected else "was granted"
                return f"{wanted} lock {verb} beside another process's {held} one"
    return ""


@contextmanager
def _other_holds(file: Path, kind: str) -> Iterator[None]:
    """Another process holds a lock.

    Raises:
        OSError: it cannot be had in time.
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(file), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        assert holder.stdout is not None
        os.set_blocking(holder.stdout.fileno(), False)
        give_up = time.monotonic() + LOCK_TIMEOUT_S
        while not holder.stdout.read():
            if holder.poll() is not None or time.monotonic() > give_up:
                raise OSError(f"a {kind} lock cannot be had")
            time.sleep(0.01)
        yield
    finally:
        holder.kill()
        holder.wait()


def _replace(file: Path) -> float:
    """Seconds that it takes to replace a file durably."""
    write_atomically(file, "old")
    started = time.monotonic()
    write_atomically(file, "new")
    assert file.read_text(encoding="utf-8") == "new", "a rename did not replace the file"
    return time.monotonic() - started
