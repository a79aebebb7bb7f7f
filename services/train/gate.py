"""The gate: whether a new version replaces what serves.

The verdict is made in a Ray task, where `gate_job` loads the models; here is what asks for it and
acts on it.
"""

from __future__ import annotations

from typing import Any

import ray

from s2t_shared.config import Config
from s2t_shared.errors import S2TError
from s2t_shared.versions.gate import Verdict, objection
from s2t_shared.versions.live import NOTHING_LIVE, LiveVersions

MAX_RETRIES = 3


def judge_on_ray(config: Config, version: str) -> Verdict:
    """`gate_job.judge_version` in a Ray task, which gets the resources of a training worker.

    Raises:
        S2TError: as `gate_job.judge_version`.
    """
    task = ray.remote(
        num_cpus=config.training.cpus_per_worker,
        num_gpus=config.training.gpus_per_worker,
        max_retries=MAX_RETRIES,
    )
    reference = task(_judge).remote(config.model_dump(mode="json"), version)
    verdict: Verdict | S2TError = ray.get(reference)
    if isinstance(verdict, S2TError):
        raise verdict
    return verdict


def _judge(config: dict[str, Any], version: str) -> Verdict | S2TError:
    """In the task. Our errors are returned, as Ray would wrap a raised one in one of its own."""
    import torch

    from services.train.gate_job import judge_version

    resolved = Config.model_validate(config)
    torch.set_num_threads(resolved.slm.threads)
    try:
        return judge_version(resolved, version)
    except S2TError as error:
        return error


def enact(
    versions: LiveVersions, version: str, verdict: Verdict, promote: bool = True
) -> tuple[bool, str]:
    """Make `version` live if the gate opened and no operator objects.

    Returns whether it is live, and why, or why not.

    Raises:
        VersionError: the version is not sound, or the registry's pointer cannot be read.
    """
    found = "; ".join(verdict.reasons)
    if not verdict.passed:
        return False, f"not promoted: {found}"
    if not promote:
        return False, found
    # A promotion replaces a damaged pointer file.
    state = versions.state(if_damaged=NOTHING_LIVE)
    objected = objection(state, versions.events(version), version)
    if objected:
        return False, f"not promoted: {objected}; {found}"
    versions.promote(version)
    return True, found
