"""What Hugging Face's `datasets` reads for us: hub ids, dataset cards, saved data sets.

The package is optional: `pip install 's2t[hub]'`. Whatever it raises becomes a ConfigError.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s2t_shared.errors import ConfigError

HUB_HINT = (
    "check the name, its configuration and split, and the network, or download it and give the "
    "folder"
)
CARD_HINT = "mend its dataset card (README.md), or name a data file instead of the folder"
SAVED_HINT = "save it anew with save_to_disk, or name its .arrow files one by one"


def rows(hub_id: str, split: str) -> Iterator[dict[str, Any]]:
    """Stream one split of the data set "org/name" or "org/name:config".

    Raises:
        ConfigError: the package is missing, or the hub cannot be read.
    """
    datasets = _package(f"the hub id {hub_id!r}")
    name, _, config = hub_id.partition(":")
    with _translated(f"the hub's {hub_id!r}", HUB_HINT):
        yield from datasets.load_dataset(name, config or None, split=split, streaming=True)


def revision(hub_id: str) -> str:
    """The commit that the data set's main branch is at.

    Raises:
        ConfigError: the package is missing, or the hub cannot be read.
    """
    _package(f"the hub id {hub_id!r}")
    from huggingface_hub import HfApi

    with _translated(f"the hub's {hub_id!r}", HUB_HINT):
        return str(HfApi().dataset_info(hub_id.partition(":")[0]).sha)


def card_files(folder: Path, config: str, split: str) -> list[Path]:
    """The files that the folder's dataset card names for a split, in reading order.

    config: one of the card's configurations; "" is the card's default.

    Raises:
        ConfigError: the package is missing, the card cannot be read, has no such configuration or
            split, or names a file outside the folder.
    """
    datasets = _package(f"the dataset card of {str(folder)!r}")
    named = f"folder {str(folder)!r}"
    with _translated(named, CARD_HINT):
        configs = datasets.get_dataset_config_names(str(folder))
        name = config or datasets.get_dataset_default_config_name(str(folder))
    if name not in configs:
        raise ConfigError(
            f"{named}: name one of its configurations, as in FOLDER:NAME (there are: "
            f"{', '.join(configs)})"
        )
    with _translated(named, CARD_HINT):
        files = datasets.load_dataset_builder(str(folder), name).config.data_files
    if split not in files:
        raise ConfigError(
            f"{named}: its card names no split {split!r}, but {', '.join(map(str, files))}; choose "
            "with --split"
        )
    # Symbolic links are not followed: a download of a hub repository is made of them.
    root = folder.resolve()
    found = [Path(os.path.abspath(file)) for file in files[split]]
    for file in found:
        if not file.is_relative_to(root):
            raise ConfigError(f"{named}: its card names {str(file)!r}, outside of it; {CARD_HINT}")
    return found


def open_saved(folder: Path, split: str) -> Any:
    """The `datasets.Dataset` that `save_to_disk` wrote; `split` picks it from a DatasetDict.

    Raises:
        ConfigError: the package is missing, the folder cannot be read or has no such split.
    """
    datasets = _package(f"the data set that was saved to {str(folder)!r}")
    with _translated(f"folder {str(folder)!r}", SAVED_HINT):
        saved = datasets.load_from_disk(str(folder))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise ConfigError(
            f"folder {str(folder)!r} has no split {split!r}, but {', '.join(saved)}; choose with "
            "--split"
        )
    return saved[split]


def _package(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{what} needs the package datasets: pip install 's2t[hub]'; or give data files"
        ) from error
    return datasets


@contextmanager
def _translated(what: str, hint: str) -> Iterator[None]:
    """The border to packages that raise what they like."""
    try:
        yield
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        raise ConfigError(f"{what} cannot be read: {text.splitlines()[0]}; {hint}") from error
