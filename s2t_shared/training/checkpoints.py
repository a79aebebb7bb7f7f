"""Training checkpoints: tensors and a few plain values, each in a folder of its own.

    folder/step-00000150/  tensors.safetensors  state.json    complete or absent

Nothing is ever unpickled. The last two are kept: if the disk damages the newest, the one before
still resumes. Knows files, not training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from s2t_shared.errors import StoreError
from s2t_shared.files import new_folder, sha256_file

TENSORS = "tensors.safetensors"
STATE = "state.json"
KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """state: what JSON can express."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Write the checkpoint of `step` durably, then remove old ones. One writer at a time.

    Raises:
        StoreError: the folder cannot be written.
    """
    try:
        for unfinished in folder.glob(".step-*"):  # of writers that died
            shutil.rmtree(unfinished, ignore_errors=True)
        # A folder of that name is unreadable: a readable one would have been resumed from.
        with new_folder(folder / f"step-{step:08d}", replace=True) as draft:
            on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
            save_file(
                {name: tensor.contiguous() for name, tensor in on_cpu.items()}, draft / TENSORS
            )
            content = {"step": step, "sha256": sha256_file(draft / TENSORS), "state": dict(state)}
            (draft / STATE).write_text(json.dumps(content), encoding="utf-8")
        for old in _present(folder)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise StoreError(
            f"the training folder {folder.name!r} cannot be written: {error.strerror or error}; "
            "free or grant space there"
        ) from error


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest sound checkpoint, or None."""
    for path in reversed(_present(folder)):
        try:
            content = json.loads((path / STATE).read_text(encoding="utf-8"))
            if content["sha256"] == sha256_file(path / TENSORS):
                return Checkpoint(int(content["step"]), load_file(path / TENSORS), content["state"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            continue  # damaged: the one before it is only older
    return None


def _present(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))
