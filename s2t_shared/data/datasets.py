"""Rows of data sets, one at a time, whatever the format: JSONL, JSON, CSV, Parquet, Arrow, a folder
of them as Hugging Face's `datasets` lays them out (read without it), or a hub id (read with it).

Splits are kept apart as the hub does: by what the dataset card declares, else by the names of files
and folders, so that a folder that holds a test split beside the training split gives the training
split only. Knows files and rows; not what the columns mean.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from s2t_shared.errors import ConfigError, EvaluationSplitError, InvalidRequestError
from s2t_shared.files import sha256_file
from s2t_shared.splits import EVALUATION_SPLITS, check_split

Record = tuple[
    int, Any
]  # a number from 1, and the columns; or an InvalidRequestError in their place

LINE_KINDS = (".jsonl", ".ndjson", ".json")
KINDS = (*LINE_KINDS, ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
BATCH_ROWS = 256
LARGEST_JSON = 1 << 30  # bytes: a .json list can only be read whole
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
SPLIT_WORDS = EVALUATION_SPLITS | {"train", "training", "valid", "testing"}


@dataclass(frozen=True)
class Records:
    """One split of a data set. files: in reading order; empty: on the hub. unit: what its numbers
    count."""

    where: str
    split: str
    files: tuple[Path, ...]
    unit: str = "row"

    @classmethod
    def lines(cls, file: Path) -> Records:
        """A file of JSON lines, whatever its name."""
        return cls(str(file), "", (file,), "line")

    def read(self) -> Iterator[Record]:
        """The rows, numbered on through all files. A row that cannot be read is an
        InvalidRequestError.

        Raises:
            ConfigError: a file, or the hub, cannot be read.
        """
        if not self.files:
            yield from enumerate(_hub_rows(self.where, self.split), 1)
            return
        number = 0
        for file in self.files:
            before = number
            with _readable(file):
                for place, content in _reader(file, self.unit)(file):
                    number = before + place
                    yield number, content

    def count(self) -> int | None:
        """Rows, or None where only reading everything would tell."""
        counts = [_count(file) for file in self.files]
        return None if None in counts or not counts else sum(cast("list[int]", counts))

    def digests(self) -> list[str]:
        """SHA-256 of the files' content in order; of the hub, the repository's revision."""
        if not self.files:
            return [self.where, _hub_revision(self.where)]
        digests = []
        for file in self.files:
            with _readable(file):
                digests.append(sha256_file(file))
        return digests


def open_records(where: str, split: str) -> Records:
    """The rows of one split of `where`: a file, a folder, or a hub id; ":config" may follow the
    last two.

    Raises: EvaluationSplitError: the split, or a single file, is named like one for evaluation.
        ConfigError: there is nothing there.
    """
    refuse_evaluation(split)
    path, config = Path(where).expanduser(), ""
    if not path.exists() and ":" in where:
        folder, _, name = where.rpartition(":")
        if Path(folder).expanduser().is_dir():
            path, config = Path(folder).expanduser(), name
    _refuse_evaluation_name(path)
    if path.is_dir():
        return Records(where, split, tuple(_folder_files(path, split, config)))
    if path.is_file():
        return Records(
            where, split, (path,), "line" if _kind(path) not in KINDS or _is_lines(path) else "row"
        )
    if HUB_ID.fullmatch(where) and _kind(path) not in KINDS:
        return Records(where, split, ())
    raise ConfigError(
        f"input {where!r} cannot be read: no such file or folder, and no hub id (org/name) either"
    )


def refuse_evaluation(split: str) -> None:
    """Raises EvaluationSplitError. Hub splits have suffixes: "test_sft" is as much for evaluation
    as "test"."""
    check_split(split)
    if _is_evaluation(split):
        raise EvaluationSplitError(
            f"split {split!r} is named like an evaluation split: labels must never come from "
            "there; use training problems (split 'train')"
        )


def _is_evaluation(split: str) -> bool:
    words = re.findall(
        r"[a-z]+", split.lower().replace("held_out", "heldout").replace("held-out", "heldout")
    )
    return split.lower() in EVALUATION_SPLITS or any(word in EVALUATION_SPLITS for word in words)


def _refuse_evaluation_name(path: Path) -> None:
    """A file with an evaluation split in its name, or a folder of that name, itself or around it,
    as hubs have them."""
    resolved = path.resolve()
    folders = [resolved.name] if path.is_dir() else [resolved.parent.name] if path.is_file() else []
    named = path.is_file() and _is_evaluation(resolved.name.partition(".")[0])
    if "train" not in resolved.name.lower() and (
        named or any(f.lower() in EVALUATION_SPLITS for f in folders)
    ):
        raise EvaluationSplitError(
            f"{str(path)!r} is named like an evaluation split: labels must never come from "
            "there; if it holds training prompts, rename it"
        )


# -- which files ----------------------------------------------------------------------------------


def _folder_files(root: Path, split: str, config: str) -> list[Path]:
    if (root / "dataset_dict.json").is_file():  # datasets.DatasetDict.save_to_disk
        splits = _read_json(root / "dataset_dict.json").get("splits", [])
        if split not in splits:
            raise ConfigError(
                f"folder {str(root)!r} has no split {split!r}, but {', '.join(splits)}; choose "
                "with --split"
            )
        root = root / split
    if (root / "state.json").is_file():  # datasets.Dataset.save_to_disk
        state = _read_json(root / "state.json")
        refuse_evaluation(str(state.get("_split") or "train"))
        files = [root / Path(str(file["filename"])).name for file in state.get("_data_files", [])]
        names: dict[Path, str | None] = {}
    else:
        declared = _declared(root, split, config)
        files = [file for pattern in declared or ["**/*"] for file in _matching(root, pattern)]
        names = {file: _split_of(file.relative_to(root)) for file in files}
        if not declared and any(names.values()):
            wanted = {split, "training"} if split == "train" else {split}
            files = [file for file in files if names[file] in wanted]
    if not files:
        known = ", ".join(sorted({name for name in names.values() if name})) or "none"
        raise ConfigError(
            f"folder {str(root)!r} holds no data files of split {split!r} (splits found: {known}; "
            f"files read: {', '.join(KINDS)}); choose with --split"
        )
    return files


def _declared(root: Path, split: str, config: str) -> list[str]:
    """The patterns that the dataset card names for this split; empty: it names none for any."""
    try:
        text = (root / "README.md").read_text(encoding="utf-8")
        card = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
        configs = {str(c["config_name"]): c for c in (card or {}).get("configs", [])}
        marked = [name for name, c in configs.items() if c.get("default") or name == "default"]
    except FileNotFoundError:
        configs, marked = {}, []
    except (
        OSError,
        UnicodeDecodeError,
        yaml.YAMLError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        raise ConfigError(
            f"the dataset card {str(root / 'README.md')!r} cannot be read "
            f"({type(error).__name__}); mend it, or name a data file instead of the folder"
        ) from error
    if not configs and not config:
        return []
    name = config or next(iter(marked or configs))
    if name not in configs or (len(configs) > 1 and not config and not marked):
        raise ConfigError(
            f"folder {str(root)!r}: name one of its configurations, as in FOLDER:NAME (there are: "
            f"{', '.join(configs) or 'none'})"
        )
    if "data_dir" in configs[name]:
        raise ConfigError(
            f"folder {str(root)!r}: its configuration {name!r} is a folder of its own; give that "
            "one"
        )
    files = configs[name].get("data_files") or []
    entries = files if isinstance(files, list) else [files]
    found = [e if isinstance(e, dict) else {"split": "train", "path": e} for e in entries]
    paths = [e.get("path", []) for e in found if e.get("split", "train") == split]
    if found and not paths:
        raise ConfigError(
            f"folder {str(root)!r}: its card names no split {split!r}, but "
            f"{', '.join(str(e.get('split')) for e in found)}; choose with --split"
        )
    return [str(p) for path in paths for p in (path if isinstance(path, list) else [path])]


def _read_json(file: Path) -> dict[str, Any]:
    with _readable(file):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content


def _split_of(relative: Path) -> str | None:
    """The split that a file's name, else its folders, tell."""
    if match := re.match(r"(.+?)-\d{5}-of-\d{5}", relative.name):
        return match[1]
    for part in reversed(relative.parts):
        words = re.findall(r"[a-z]+", part.partition(".")[0].lower())
        if found := next((word for word in words if word in SPLIT_WORDS), None):
            return found
    return None


def _matching(root: Path, pattern: str) -> list[Path]:
    try:
        return sorted(file for file in root.glob(pattern) if _is_data(file, root))
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"folder {str(root)!r}: its card names files by {pattern!r}, which is no pattern "
            "inside it; mend the card, or name a data file instead of the folder"
        ) from error


def _is_data(file: Path, root: Path) -> bool:
    hidden = any(
        part.startswith(".") for part in file.relative_to(root).parts
    )  # or above the root: ".."
    about = file.name in ("dataset_info.json", "dataset_infos.json", "state.json")
    return _kind(file) in KINDS and file.is_file() and not hidden and not about


def _kind(file: Path) -> str:
    """The suffix that says the format, without the one of the compression."""
    return Path(file.stem if file.suffix.lower() in COMPRESSED else file.name).suffix.lower()


# -- their rows -----------------------------------------------------------------------------------


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """The border to everything that reads files."""
    try:
        yield
    except (
        OSError,
        EOFError,
        zlib.error,
        csv.Error,
        pa.ArrowException,
        ValueError,
        ArithmeticError,
        RecursionError,
    ) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).partition(
            "\n"
        )[0]
        raise ConfigError(f"input {str(file)!r} cannot be read: {reason}") from error


def _reader(file: Path, unit: str) -> Callable[[Path], Iterator[Record]]:
    kind = _kind(file)
    if unit == "line" or kind in LINE_KINDS:
        return _lines if unit == "line" or _is_lines(file) else _list
    return {".parquet": _parquet, ".arrow": _arrow, ".csv": _csv, ".tsv": _csv}[kind]


def _open(file: Path) -> IO[bytes]:
    if file.suffix.lower() == ".gz":
        return cast("IO[bytes]", gzip.open(file, "rb"))
    if file.suffix.lower() == ".zst":
        return io.BufferedReader(pa.input_stream(file, compression="zstd"))
    return file.open("rb")


def _is_lines(file: Path) -> bool:
    """Whether a JSON file holds one object a line rather than one list."""
    if _kind(file) != ".json":
        return _kind(file) in LINE_KINDS
    with _readable(file), _open(file) as stream:
        return not stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _lines(file: Path) -> Iterator[Record]:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                try:
                    yield number, json.loads(text)
                except (ValueError, RecursionError) as error:
                    yield number, InvalidRequestError(f"not JSON ({error})")


def _list(file: Path) -> Iterator[Record]:
    with _open(file) as stream:
        content = stream.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise ValueError(
            "a JSON list can only be read whole, and this one is too large; make it JSON lines"
        )
    yield from enumerate(json.loads(content), 1)


def _csv(file: Path) -> Iterator[Record]:
    with _open(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        rows = csv.DictReader(text, delimiter="\t" if _kind(file) == ".tsv" else ",")
        for number, row in enumerate(rows, 1):
            yield (
                number,
                InvalidRequestError("more values than the header has names")
                if None in row
                else row,
            )


def _parquet(file: Path) -> Iterator[Record]:
    with pq.ParquetFile(
        file, pre_buffer=False, buffer_size=1 << 20
    ) as table:  # else the whole file waits in memory
        yield from _rows_of(table.iter_batches(BATCH_ROWS))


def _arrow(file: Path) -> Iterator[Record]:
    with pa.memory_map(str(file)) as stream:
        yield from _rows_of(_arrow_batches(stream))


def _arrow_batches(stream: Any) -> Iterator[Any]:
    try:
        yield from pa.ipc.open_stream(stream)
    except pa.ArrowInvalid:  # the other of Arrow's two layouts
        stream.seek(0)
        reader = pa.ipc.open_file(stream)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))


def _rows_of(batches: Iterator[Any]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for row in batch.slice(start, BATCH_ROWS).to_pylist():
                number += 1
                yield number, row


def _count(file: Path) -> int | None:
    with _readable(file):
        if _kind(file) == ".parquet":
            return int(pq.read_metadata(file).num_rows)
        if _kind(file) == ".arrow":
            with pa.memory_map(str(file)) as stream:
                return sum(batch.num_rows for batch in _arrow_batches(stream))
        if _kind(file) in KINDS and not _is_lines(file):
            return None
        with _open(file) as lines:
            return sum(1 for line in lines if line.strip())


# -- the hub --------------------------------------------------------------------------------------


def _hub_rows(where: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"the hub id {where!r} needs the package datasets: pip install 's2t[hub]'; or give a "
            "file or folder"
        ) from error
    name, _, config = where.partition(":")
    with _reachable(where):
        yield from datasets.load_dataset(name, config or None, split=split, streaming=True)


def _hub_revision(where: str) -> str:
    from huggingface_hub import HfApi

    with _reachable(where):
        return str(HfApi().dataset_info(where.partition(":")[0]).sha)


@contextmanager
def _reachable(where: str) -> Iterator[None]:
    """The border to the hub, whose packages raise what they like."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"the hub's {where!r} cannot be read: {reason}; check the name, its configuration and "
            "split, and the network, or download it and give the folder"
        ) from error
