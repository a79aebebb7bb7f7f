"""The files of a LoRA adapter as PEFT writes them: their names, and what is known without torch."""

from __future__ import annotations

import json
from pathlib import Path

from s2t_shared.errors import VersionError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


def read_rank(folder: Path) -> int:
    """The rank of an adapter's files.

    Raises:
        VersionError: they cannot be read.
    """
    try:
        return int(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable_adapter(folder, error) from error


def unreadable_adapter(folder: Path, error: Exception) -> VersionError:
    return VersionError(
        f"adapter of version {folder.name!r} cannot be read ({error}); publish it again"
    )
