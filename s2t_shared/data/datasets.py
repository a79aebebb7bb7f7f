"""Data sets: which files belong to a split, and their rows one at a time.

A data set is a file, a folder of files, or a hub id. Splits are kept apart as the hub does it: by
the dataset card where it declares them, else by the names of files and folders. So a folder with a
test split beside the training split gives the training split only. An evaluation split is refused.
Knows files and rows; not what the columns mean.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from s2t_shared.data import hub
from s2t_shared.data.formats import (
    KINDS,
    Record,
    count_rows,
    is_lines,
    kind_of,
    read_rows,
    readable,
)
from s2t_shared.errors import ConfigError, EvaluationSplitError
from s2t_shared.files import sha256_file
from s2t_shared.splits import EVALUATION_SPLITS, check_split

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
SHARD_NAME = re.compile(r"(.+?)-\d{5}-of-\d{5}")  # as in train-00000-of-00002.parquet
SPLIT_WORDS = EVALUATION_SPLITS | {"train", "training", "valid", "testing"}
METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "state.json")


@dataclass(frozen=True)
class Records:
    """One split of a data set.

    source: as the user named it. files: in reading order; none for a hub id. unit: what the
    numbers of the records count, "row" or "line".
    """

    source: str
    split: str
    files: tuple[Path, ...]
    unit: str = "row"

    @classmethod
    def lines(cls, file: Path) -> Records:
        """A file of JSON lines, whatever its name."""
        return cls(str(file), "", (file,), "line")

    def read(self) -> Iterator[Record]:
        """The rows, numbered from 1 through all files.

        A row that cannot be read comes as an InvalidRequestError; the next rows follow.

        Raises:
            ConfigError: a file, or the hub, cannot be read.
        """
        if not self.files:
            yield from enumerate(hub.rows(self.source, self.split), 1)
            return
        last = 0
        for file in self.files:
            rows_before = last
            for number, content in read_rows(file, as_lines=self.unit == "line"):
                last = rows_before + number
                yield last, content

    def count(self) -> int | None:
        """How many rows there are; None where only reading everything would tell.

        Raises:
            ConfigError: a file cannot be read.
        """
        if not self.files:
            return None
        total = 0
        for file in self.files:
            rows = count_rows(file)
            if rows is None:
                return None
            total += rows
        return total

    def digests(self) -> list[str]:
        """SHA-256 of each file's content, in order; of a hub id, its commit.

        Raises:
            ConfigError: a file, or the hub, cannot be read.
        """
        if not self.files:
            return [self.source, hub.revision(self.source)]
        digests = []
        for file in self.files:
            with readable(file):
                digests.append(sha256_file(file))
        return digests


def open_records(source: str, split: str, to_evaluate: bool = False) -> Records:
    """One split of a data set: a file, a folder, or a hub id; ":config" may follow the last two.

    to_evaluate: nothing is trained on it, so that it may be an evaluation split.

    Raises:
        EvaluationSplitError: the split, a file or a folder is named like one for evaluation.
        ConfigError: there is nothing to read; or it needs a package that is missing.
    """
    path, config = _path_and_config(source)
    if not to_evaluate:
        refuse_evaluation(split)
        _refuse_evaluation_name(path)
    if path.is_dir():
        return Records(source, split, tuple(_folder_files(path, config, split)))
    if path.is_file():
        return Records(source, split, (path,), "line" if is_lines(path) else "row")
    if HUB_ID.fullmatch(source) and kind_of(path) not in KINDS:
        return Records(source, split, ())
    raise ConfigError(
        f"input {source!r} cannot be read: no such file or folder, and no hub id (org/name) either"
    )


def _path_and_config(source: str) -> tuple[Path, str]:
    path = Path(source).expanduser()
    folder, _, config = source.rpartition(":")
    if folder and not path.exists() and Path(folder).expanduser().is_dir():
        return Path(folder).expanduser(), config
    return path, ""


# -- evaluation splits ----------------------------------------------------------------------------


def refuse_evaluation(split: str) -> None:
    """Refuse a split that is named like one for evaluation.

    Hub splits have suffixes: "test_sft" is as much for evaluation as "test".

    Raises:
        EvaluationSplitError: it is.
    """
    check_split(split)
    if _is_evaluation(split):
        raise EvaluationSplitError(
            f"split {split!r} is named like an evaluation split: labels must never come from "
            "there; use training problems (split 'train')"
        )


def _is_evaluation(name: str) -> bool:
    joined = name.lower().replace("held_out", "heldout").replace("held-out", "heldout")
    words = re.findall(r"[a-z]+", joined)
    return any(word in EVALUATION_SPLITS for word in words)


def _refuse_evaluation_name(path: Path) -> None:
    """Refuse a file with an evaluation split in its name, and a folder with exactly that name.

    A file's folder counts too, because hub repositories keep splits in folders. A symbolic link
    must have a good name at both ends.
    """
    for name in (Path(os.path.abspath(path)), path.resolve()):
        if _is_evaluation_path(name):
            raise EvaluationSplitError(
                f"{str(path)!r} is named like an evaluation split: labels must never come from "
                "there; if it holds training prompts, rename it"
            )


def _is_evaluation_path(path: Path) -> bool:
    if "train" in path.name.lower():
        return False
    if path.is_dir():
        return path.name.lower() in EVALUATION_SPLITS
    if not path.is_file():
        return False
    return path.parent.name.lower() in EVALUATION_SPLITS or _is_evaluation(path.name.split(".")[0])


# -- the files of a folder ------------------------------------------------------------------------


def _folder_files(root: Path, config: str, split: str) -> list[Path]:
    splits: set[str] = set()
    if _is_saved(root):
        files = _saved_files(root, split)
    elif config or _has_card(root):
        files = _card_files(root, config, split)
    else:
        files, splits = _named_files(root, split)
    if not files:
        found = ", ".join(sorted(splits)) or "none"
        raise ConfigError(
            f"folder {str(root)!r} holds no data files of split {split!r} (splits found: {found}; "
            f"files read: {', '.join(KINDS)}); choose with --split"
        )
    return files


def _is_saved(root: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote the folder: a DatasetDict or a Dataset."""
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def _saved_files(root: Path, split: str) -> list[Path]:
    saved = hub.open_saved(root, split)
    refuse_evaluation(str(saved.split or split))
    return [Path(file["filename"]) for file in saved.cache_files]


def _front_matter(root: Path) -> str:
    """The YAML at the top of the folder's dataset card; empty without one."""
    card = root / "README.md"
    if not card.is_file():
        return ""
    with readable(card):
        text = card.read_text(encoding="utf-8")
    return text.split("---\n")[1] if text.startswith("---\n") else ""


def _has_card(root: Path) -> bool:
    """Whether a dataset card declares which files belong to which split."""
    return re.search(r"^configs\s*:", _front_matter(root), re.MULTILINE) is not None


def _refuse_addresses(root: Path) -> None:
    """Refuse a card whose files lie on the network, before `datasets` asks for them there."""
    try:
        card = yaml.safe_load(_front_matter(root))
    except yaml.YAMLError:
        return  # `datasets` says what is wrong with it
    if isinstance(card, dict) and "://" in str(card.get("configs")):
        raise ConfigError(
            f"folder {str(root)!r}: its card names a network address; download the files and name "
            "them, or give the hub id"
        )


def _card_files(root: Path, config: str, split: str) -> list[Path]:
    _refuse_addresses(root)
    files = []
    for file in hub.card_files(root, config, split):
        if _is_data(file):
            _refuse_evaluation_name(file)
            files.append(file)
    return files


def _named_files(root: Path, split: str) -> tuple[list[Path], set[str]]:
    """Files whose names tell the split, and the splits found. Without any, all files are its."""
    split_of: dict[Path, str | None] = {}
    for file in sorted(root.glob("**/*")):
        inside = file.relative_to(root)
        hidden = any(part.startswith(".") for part in inside.parts)
        if not hidden and _is_data(file):
            split_of[file] = _split_of(inside)
    splits = {name for name in split_of.values() if name}
    if not splits:
        return list(split_of), splits
    wanted = {split, "training"} if split == "train" else {split}
    return [file for file, name in split_of.items() if name in wanted], splits


def _split_of(file: Path) -> str | None:
    """The split that the name of a file, else of its folders, tells. file: relative to the root."""
    if match := SHARD_NAME.match(file.name):
        return match[1]
    for part in reversed(file.parts):
        for word in re.findall(r"[a-z]+", part.partition(".")[0].lower()):
            if word in SPLIT_WORDS:
                return str(word)
    return None


def _is_data(file: Path) -> bool:
    return kind_of(file) in KINDS and file.name not in METADATA_FILES and file.is_file()
