"""Which training job is to be done: its identity, its note on disk, and finding it again.

A job's id is a hash of everything that decides its outcome. So the same command after a crash finds
its checkpoints, or the version it has published, and goes on from there.

    data_dir/training/<id>/  job.json       there until the job is gated
                             step-*/        checkpoints
                             .lock          held by the process that writes the folder
                             tensorboard/
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from s2t_shared.config import Config
from s2t_shared.errors import S2TError
from s2t_shared.files import locked, private_folder, write_atomically
from s2t_shared.labels.object_lake import open_lake
from s2t_shared.model.folders import model_digest, resolve_model
from s2t_shared.training.checkpoints import load_checkpoint
from s2t_shared.versions.live import LiveVersions
from s2t_shared.versions.registry import Registry

NOTE = "job.json"
LOCK = ".lock"


@dataclass(frozen=True)
class Job:
    """What decides a training run's outcome. init: the version it starts from, "" for none."""

    id: str
    snapshot: str
    init: str

    def folder(self, config: Config) -> Path:
        """Where its checkpoints and reports are."""
        return _jobs_folder(config) / self.id


def _jobs_folder(config: Config) -> Path:
    return config.data_dir / "training"


def job_of(config: Config, snapshot: str, slm_digest: str) -> Job:
    """The job that these settings make of a snapshot.

    Raises:
        VersionError: `training.init_from` names a version that is not there.
    """
    versions = LiveVersions(config.versions)
    init = config.training.init_from
    if init == "live":
        init = versions.live() or ""
    elif init:
        versions.registry.folder(init)
    decisive = [
        snapshot,
        config.training.of_weights(),
        slm_digest,
        init,
        config.slm.dtype,
        config.training.workers,
        config.training.sharding,
    ]
    digest = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
    return Job(digest[:16], snapshot, init)


def open_job(config: Config, say: Callable[[str], None]) -> Job:
    """The job to do now, noted on disk.

    One that a killed process left comes first, though labels came since; else that of the labels
    there are now.
    """
    job = unfinished_job(config)
    if job is not None:
        checkpoint = load_checkpoint(job.folder(config))
        after = f" after {checkpoint.step} steps" if checkpoint else ""
        say(
            f"job {job.id} was interrupted{after}; it goes on (labels that came since are for the "
            "next one)"
        )
        return job
    snapshot = open_lake(config.lake).freeze().id
    job = job_of(config, snapshot, model_digest(resolve_model(config.slm.model)))
    private_folder(job.folder(config))
    write_atomically(job.folder(config) / NOTE, json.dumps(asdict(job)))
    return job


def unfinished_job(config: Config) -> Job | None:
    """The latest job of these settings that has a checkpoint or a version but was not gated."""
    notes = sorted(_jobs_folder(config).glob(f"*/{NOTE}"), key=_modified, reverse=True)
    digest = model_digest(resolve_model(config.slm.model)) if notes else ""
    for note in notes:
        # Its snapshot or the version it starts from may be gone.
        with suppress(OSError, ValueError, TypeError, S2TError):
            job = Job(**json.loads(note.read_text(encoding="utf-8")))
            published = Registry(config.versions).find_job(job.id)
            if published is None and load_checkpoint(job.folder(config)) is None:
                continue
            snapshot = open_lake(config.lake).snapshot(job.snapshot)
            if job_of(config, snapshot.id, digest) == job:
                return job
    return None


def close_job(config: Config, job: Job) -> None:
    """Remove the job's note and checkpoints, and the checkpoints of older jobs.

    The version holds the outcome; TensorBoard events stay.
    """
    closed = job.folder(config)
    closed_at = _modified(closed / NOTE)
    for folder in {closed, *closed.parent.glob("*/")}:
        if not (folder / LOCK).exists():
            continue  # not a job's folder
        with suppress(OSError), locked(folder / LOCK, wait=False) as held:
            is_past = _modified(folder / NOTE) <= closed_at
            if held and is_past:  # not held: the job runs
                _remove_checkpoints(folder)
    forget_job(config, job)


def forget_job(config: Config, job: Job) -> None:
    """Remove the job's note, so that the next command does not go on with it."""
    (job.folder(config) / NOTE).unlink(missing_ok=True)


def _modified(path: Path) -> float:
    """Unix seconds; 0 where there is no such file."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("step-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
