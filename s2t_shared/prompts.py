"""Prompts from files and data sets: JSONL, JSON, CSV, Parquet, Arrow, a Hugging Face dataset's folder or hub id.

    PromptSource --where--> files of its split --records--> (number, columns) --columns, template, chat--> Prompt
                        \\-> rows of the hub -/

Everything streams: one line or one batch of a table is in memory, and 16 bytes of every id. Training prompts only: an
evaluation split is refused (`read_prompts`, for answering rather than learning, takes any). Knows files; no tokenizer.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from s2t_shared.errors import ConfigError, EvaluationSplitError, InvalidRequestError
from s2t_shared.files import sha256_file
from s2t_shared.labels import EVALUATION_SPLITS, check_split
from s2t_shared.types import Message, Prompt

Row = tuple[dict[str, Any], Prompt | InvalidRequestError]
Record = tuple[int, Any]  # its number from 1, and its columns; or an InvalidRequestError in their place

COLUMNS = ("prompt", "messages", "token_ids")
COMMON_COLUMNS = ("question", "problem", "instruction", "input", "text")  # what public data sets call a prompt
TABLE_KINDS = (".parquet", ".arrow", ".csv", ".tsv")
LINE_KINDS = (".jsonl", ".ndjson", ".json")
COMPRESSED = (".gz", ".zst")
BATCH_ROWS = 256
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
SPLIT_WORDS = EVALUATION_SPLITS | {"train", "training", "valid", "testing"}


@dataclass(frozen=True)
class PromptSource:
    """Where prompts are, and how a row becomes one.

    source: a file, a folder (of data files, of `save_to_disk`, or a copy of a hub repository), or a hub id
    "org/name"; ":config" may follow the last two. split: which part of it; what is harvested records it.
    id_column: default "id" where there is one, else the row's number ("row-17").
    prompt_column: default the first of prompt, messages, token_ids, else a common name (`COMMON_COLUMNS`).
    template: text with {column} in it; {{column}} and every other brace stay as they are, a written-out \\n is a line
    break, as shells pass it. chat: the text becomes a user message. system: a system message before it (implies chat).
    """

    source: str
    split: str = "train"
    id_column: str | None = None
    prompt_column: str | None = None
    template: str | None = None
    system: str | None = None
    chat: bool = False


def read(source: PromptSource, say: Callable[[str], None] = lambda line: None) -> Iterator[Row]:
    """The rows of `source` with their prompts, in a fixed order. A row always has "id", a string, unless that is what
    is wrong with it. A broken row yields its error, which names its place. `say` hears what was chosen by itself.

    Raises:
        EvaluationSplitError: the split is for evaluation. ConfigError: the source is not there or cannot be read (at
        once or, where it is damaged further on, while reading).
    """
    _refuse_evaluation(source.split)
    if source.template is not None and source.prompt_column is not None:
        raise ConfigError("--template and --prompt-column: give one of them; {column} in a template names columns")
    files = _locate(source)
    return _rows(_hub_records(source) if files is None else _records(files), _Builder(source, say),
                 "line" if files and len(files) == 1 and _kind(files[0]) in LINE_KINDS else "row")


def read_prompts(file: Path) -> Iterator[Row]:
    """Requests in a JSONL file: {"id", and exactly one of "prompt" | "messages" | "token_ids"}, taken as they are.

    A broken line yields its error, which names the line's number; an unreadable file raises ConfigError.
    """
    return _rows(_read_file(file, _lines), _Builder(None, lambda line: None), "line")


def fingerprint(source: PromptSource) -> str:
    """64 hex digits: the same for the same content and options, wherever the files lie.

    Raises:
        ConfigError: the source is not there or cannot be read.
    """
    options = {key: value for key, value in asdict(source).items() if key != "source"}
    files = _locate(source)
    content = [source.source, _hub_revision(source)] if files is None else [sha256_file(file) for file in files]
    return hashlib.sha256(json.dumps([options, content], sort_keys=True).encode()).hexdigest()


def count(source: PromptSource) -> int | None:
    """How many rows there are, broken ones included; None where only reading everything would tell.

    Raises:
        ConfigError: the source is not there or cannot be read.
    """
    total = 0
    for file in _locate(source) or [None]:
        kind = _kind(file) if file else ""
        if file is None or kind not in (".parquet", ".arrow", *LINE_KINDS):
            return None
        with _readable(file):
            if kind == ".parquet":
                total += pq.read_metadata(file).num_rows
            elif kind == ".arrow":
                total += sum(batch.num_rows for batch in _arrow_batches(file))
            else:
                with _open(file) as stream:
                    if kind == ".json" and stream.read(1) == b"[":
                        return None
                with _open(file) as stream:
                    total += sum(1 for line in stream if line.strip())
    return total


# -- a row becomes a prompt ---------------------------------------------------------------------------------------


def _rows(records: Iterable[Record], builder: _Builder, unit: str) -> Iterator[Row]:
    for number, content in records:
        row: dict[str, Any] = {"line" if unit == "line" else "row": number}
        try:
            if isinstance(content, InvalidRequestError):
                raise content
            if not isinstance(content, dict):
                raise InvalidRequestError("not a JSON object")
            row |= content
            row["id"] = builder.identify(number, unit, row, content)
            yield row, builder.prompt(content)
        except (InvalidRequestError, EvaluationSplitError) as error:
            yield row, InvalidRequestError(f"{unit} {number}: {error}")


class _Builder:
    """Turns rows into prompts as the options say (none: as requests). Remembers ids, and the column it took."""

    def __init__(self, source: PromptSource | None, say: Callable[[str], None]) -> None:
        self._strict = source is None
        self._source, self._say = source or PromptSource(""), say
        self._seen: dict[bytes, int] = {}
        self._taken: str | None = None
        self._cut = False

    def identify(self, number: int, unit: str, row: dict[str, Any], content: dict[str, Any]) -> str:
        column = self._source.id_column
        if column is not None and column not in content:
            raise InvalidRequestError(_no_column(column, content))
        value = row.get(column or "id")
        if value is None and column is None and not self._strict:
            value = f"row-{number}"
        if not isinstance(value, (str, int)):
            raise InvalidRequestError(f'"{column or "id"}" is missing; give a string')
        text = _text(column or "id", str(value))
        row["id"] = text
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        first = self._seen.setdefault(digest, number)
        if first != number:
            raise InvalidRequestError(f'"{column or "id"}" {text!r} was used before, in {unit} {first}')
        return text

    def prompt(self, content: dict[str, Any]) -> Prompt:
        if self._strict:
            given = [key for key in COLUMNS if content.get(key) is not None]
            if len(given) != 1:
                raise InvalidRequestError(
                    f'give exactly one of "prompt", "messages", "token_ids" (found {given or "none"})')
            return _parse(given[0], content[given[0]])
        if isinstance(content.get("split"), str):
            _refuse_evaluation(content["split"])
        if self._source.template is not None:
            return self._in_chat(Prompt(text=_fill(self._source.template, content)))
        column = self._column(content)
        return self._in_chat(self._question(_parse(column, content[column])))

    def _column(self, content: dict[str, Any]) -> str:
        wanted = self._source.prompt_column
        if wanted is None:
            given = [key for key in COLUMNS if content.get(key) is not None]
            if given:
                return given[0]
            if self._taken is None:
                self._taken = next((key for key in COMMON_COLUMNS if content.get(key) is not None), None)
                if self._taken is None:
                    raise InvalidRequestError(f"no prompt: none of {', '.join(COLUMNS + COMMON_COLUMNS)} is there, but "
                                              f"{_names(content)}; choose with --prompt-column or --template")
                self._say(f"prompts are taken from the column {self._taken!r}; --prompt-column chooses another")
            wanted = self._taken
        if wanted not in content:
            raise InvalidRequestError(_no_column(wanted, content))
        return wanted

    def _question(self, prompt: Prompt) -> Prompt:
        """Without the answer at the end: sets made for fine-tuning have one, and a rollout must not see it."""
        messages = list(prompt.messages)
        while messages and messages[-1].role == "assistant":
            messages.pop()
        if len(messages) == len(prompt.messages):
            return prompt
        if not messages:
            raise InvalidRequestError("the messages hold an assistant's turns only")
        if not self._cut:
            self._say("messages end with an assistant's turn; it is left out of the prompts")
            self._cut = True
        return Prompt(messages=tuple(messages))

    def _in_chat(self, prompt: Prompt) -> Prompt:
        system = self._source.system
        if not self._source.chat and system is None:
            return prompt
        if prompt.token_ids:
            raise InvalidRequestError("--chat and --system need text or messages; token ids are taken as they are")
        messages = prompt.messages or (Message("user", prompt.text or ""),)
        if system is not None and messages[0].role != "system":
            messages = (Message("system", system), *messages)
        return Prompt(messages=messages)


def _parse(key: str, value: Any) -> Prompt:
    if key not in ("messages", "token_ids") and not isinstance(value, list):
        if not isinstance(value, str) or not value:
            raise InvalidRequestError(f'"{key}" must be a non-empty string')
        return Prompt(text=_text(key, value))
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(f'"{key}" must be a non-empty list')
    if key == "token_ids" or (key != "messages" and not isinstance(value[0], dict)):
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
            raise InvalidRequestError(f'"{key}" must hold whole numbers' if key == "token_ids" else
                                      f'"{key}" must be a non-empty string, or a list of messages or of token ids')
        return Prompt(token_ids=tuple(value))
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
               for m in value):
        raise InvalidRequestError(f'"{key}" must hold objects with "role" and "content", both strings')
    return Prompt(messages=tuple(Message(_text(key, m["role"]), _text(key, m["content"])) for m in value))


def _fill(template: str, content: dict[str, Any]) -> str:
    def value(match: re.Match[str]) -> str:
        if match["literal"]:
            return match["literal"]
        name = match["column"]
        if name not in content:
            raise InvalidRequestError(f"--template: {_no_column(name, content)}")
        if not isinstance(content[name], (str, int, float)):
            raise InvalidRequestError(f"--template: the column {name!r} holds no text here")
        return str(content[name])

    # One pass: braces inside the values are never read.
    filled = re.sub(r"\{(?P<literal>\{\w+\})\}|\{(?P<column>[^\W\d]\w*)\}", value, template.replace("\\n", "\n"))
    if not filled.strip():
        raise InvalidRequestError("--template: the prompt is empty")
    return _text("--template", filled)


def _text(key: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(f'"{key}" is not Unicode text: half of a surrogate pair') from None
    return value


def _no_column(name: str, content: dict[str, Any]) -> str:
    return f"there is no column {name!r}, but {_names(content)}"


def _names(content: dict[str, Any]) -> str:
    return ", ".join(map(repr, list(content)[:20])) or "none at all"


# -- where the rows are -------------------------------------------------------------------------------------------


def _refuse_evaluation(split: str) -> None:
    """Hub splits have suffixes: "test_sft" is one to evaluate on as much as "test"."""
    check_split(split)
    if (words := re.findall(r"[a-z]+", split.lower())) and words[0] in EVALUATION_SPLITS:
        check_split(words[0])


def _locate(source: PromptSource) -> list[Path] | None:
    """The data files of the split, in reading order; None: on the hub."""
    path, config = Path(source.source).expanduser(), ""
    if not path.exists() and ":" in source.source:
        folder, _, name = source.source.rpartition(":")
        if Path(folder).expanduser().is_dir():
            path, config = Path(folder).expanduser(), name
    if path.is_dir():
        return _folder_files(path, source.split, config)
    if path.is_file():
        if (name := _split_of(Path(path.name))) in EVALUATION_SPLITS:
            raise EvaluationSplitError(f"{path.name!r} is named like the evaluation split {name!r}: labels must never "
                                       "come from there; if it holds training prompts, rename it")
        return [path]
    if HUB_ID.fullmatch(source.source) and _kind(path) not in (*LINE_KINDS, *TABLE_KINDS):
        return None
    raise ConfigError(f"input {source.source!r} cannot be read: there is no such file or folder, and it is no hub id "
                      "(org/name)")


def _folder_files(root: Path, split: str, config: str) -> list[Path]:
    if (root / "dataset_dict.json").is_file():  # datasets.DatasetDict.save_to_disk
        splits = _read_json(root / "dataset_dict.json").get("splits", [])
        if split not in splits:
            raise ConfigError(f"folder {str(root)!r} has no split {split!r}, but {', '.join(splits)}; choose with "
                              "--split")
        root = root / split
    if (root / "state.json").is_file():  # datasets.Dataset.save_to_disk
        state = _read_json(root / "state.json")
        _refuse_evaluation(str(state.get("_split") or "train"))
        return [root / str(file["filename"]) for file in state.get("_data_files", [])]
    files = {file: _split_of(file.relative_to(root)) for pattern in _declared(root, split, config) or ["**/*"]
             for file in sorted(root.glob(pattern)) if _is_data(file, root)}
    if any(files.values()):
        wanted = {split, "training"} if split == "train" else {split}
        chosen = [file for file, name in files.items() if name in wanted]
    else:
        chosen = list(files)
    if not chosen:
        known = ", ".join(sorted({name for name in files.values() if name})) or "none"
        raise ConfigError(f"folder {str(root)!r} holds no data files of split {split!r} (splits found: {known}); wanted "
                          f"are {', '.join(LINE_KINDS + TABLE_KINDS)}; choose the split with --split")
    return chosen


def _declared(root: Path, split: str, config: str) -> list[str]:
    """The patterns that a dataset card names for this split; none: its names decide."""
    try:
        text = (root / "README.md").read_text(encoding="utf-8")
        card = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
        configs = {str(c["config_name"]): c for c in (card or {}).get("configs", [])}
    except FileNotFoundError:
        configs = {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"the dataset card {str(root / 'README.md')!r} cannot be read: {type(error).__name__}; mend "
                          "it, or name the data file itself") from error
    if not configs and not config:
        return []
    name = config or next((n for n, c in configs.items() if c.get("default")), "default")
    if not config and len(configs) == 1:
        name = next(iter(configs))
    if name not in configs:
        raise ConfigError(f"folder {str(root)!r}: choose a configuration, as in {root.name}:{next(iter(configs), '')} "
                          f"(there are: {', '.join(configs) or 'none'})")
    files = configs[name].get("data_files", [])
    entries = files if isinstance(files, list) else [files]
    found = [e if isinstance(e, dict) else {"split": "train", "path": e} for e in entries]
    paths = [e.get("path", []) for e in found if e.get("split", "train") == split]
    if found and not paths:
        raise ConfigError(f"folder {str(root)!r}: its card names no split {split!r}, but "
                          f"{', '.join(str(e.get('split')) for e in found)}; choose with --split")
    return [str(p) for path in paths for p in (path if isinstance(path, list) else [path])]


def _split_of(relative: Path) -> str | None:
    """The split that a file's name, else its folders, tell."""
    if match := re.match(r"(.+?)-\d{5}-of-\d{5}", relative.name):
        return match[1]
    words = [w for part in relative.parts for w in re.findall(r"[a-z]+", part.partition(".")[0].lower())]
    return next((w for w in reversed(words) if w in SPLIT_WORDS), None)


def _is_data(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.is_file() and not hidden and _kind(file) in (*LINE_KINDS, *TABLE_KINDS) and file.name not in (
        "dataset_info.json", "dataset_infos.json", "state.json")


def _kind(file: Path) -> str:
    """The suffix that says the format, without the one of the compression."""
    return Path(file.stem).suffix.lower() if file.suffix.lower() in COMPRESSED else file.suffix.lower()
