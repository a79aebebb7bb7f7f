"""Prompts from the rows of data sets: by column, template, chat and id.

Everything streams: one line or one batch of a table is in memory, and 16 bytes of every id. `read`
gives training prompts and refuses an evaluation split. `read_problems` gives prompts to evaluate,
of any split; `read_prompts` gives requests to answer, of any file. Knows rows; no tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s2t_shared.data.datasets import Records, open_records, refuse_evaluation
from s2t_shared.data.templates import prompt_group
from s2t_shared.errors import ConfigError, EvaluationSplitError, InvalidRequestError
from s2t_shared.types import Message, Prompt

Row = tuple[dict[str, Any], Prompt | InvalidRequestError]

COLUMNS = ("prompt", "messages", "token_ids")
# What public data sets call a prompt.
COMMON_COLUMNS = ("question", "problem", "instruction", "input", "text")
ID_DIGEST_BYTES = 16
# {{name}} or {name}. A name starts with no digit, so that {0} is no column.
PLACEHOLDER = re.compile(r"\{(?P<literal>\{\w+\})\}|\{(?P<column>[^\W\d]\w*)\}")


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """Where prompts are, and how a row becomes one.

    source: a file, a folder (of data files, of `save_to_disk`, or a copy of a hub repository), or a
    hub id "org/name"; ":config" may follow the last two.
    split: which part of it. What is harvested records it.
    id_column: default "id" where there is one, else the row's number ("row-17").
    group_column: problems with the same value there are held out together. Default: `prompt_group`.
    prompt_column: default the first of prompt, messages, token_ids, else one of `COMMON_COLUMNS`.
    template: text with {column} in it. {{column}} stands for a literal {column}, every other brace
    for itself, and a written-out \\n for a line break, because shells pass it so.
    chat: the text becomes a user message. system: a system message before it (implies chat).
    """

    source: str
    split: str = "train"
    id_column: str | None = None
    group_column: str | None = None
    prompt_column: str | None = None
    template: str | None = None
    system: str | None = None
    chat: bool = False


def read(source: PromptSource, say: Callable[[str], None] = lambda line: None) -> Iterator[Row]:
    """The rows of a source with their prompts, in a fixed order.

    A row has "id", a string, unless the id is what is wrong with it, and with a prompt "group", a
    string. A broken row comes with its error, which names the row; the next rows follow.
    say: called with each choice of a default.

    Raises:
        EvaluationSplitError: the split is for evaluation.
        ConfigError: the source is missing or cannot be read: at once, or while reading where it
            is damaged further on.
    """
    if source.template is not None and source.prompt_column is not None:
        raise ConfigError(
            "--template and --prompt-column: give one of them; {column} in a template names columns"
        )
    records = open_records(source.source, source.split)
    builder = _PromptBuilder(source, say)

    def prompt(content: dict[str, Any]) -> Prompt:
        if isinstance(content.get("split"), str):
            refuse_evaluation(content["split"])
        return builder.prompt(content)

    ids = _Ids(records.unit, source.id_column)
    return _grouped(_rows(records, ids, prompt), source.group_column)


def read_problems(
    source: PromptSource, say: Callable[[str], None] = lambda line: None
) -> Iterator[Row]:
    """As `read`, of any split: nothing is trained on these prompts.

    Raises:
        ConfigError: as `read`.
    """
    records = open_records(source.source, source.split, to_evaluate=True)
    ids = _Ids(records.unit, source.id_column)
    return _grouped(_rows(records, ids, _PromptBuilder(source, say).prompt), source.group_column)


def read_prompts(file: Path) -> Iterator[Row]:
    """Requests in a JSONL file: {"id", and exactly one of "prompt" | "messages" | "token_ids"}.

    Requests are taken as they are. A broken line comes with its error, which names the line.

    Raises:
        ConfigError: while reading: the file cannot be read.
    """
    records = Records.lines(file)
    return _rows(records, _Ids(records.unit, required=True), _literal_prompt)


def fingerprint(source: PromptSource) -> str:
    """64 hex digits: the same for the same content and options, wherever the files lie.

    Raises:
        EvaluationSplitError: the split is for evaluation.
        ConfigError: the source is missing or cannot be read.
    """
    options = asdict(source)
    del options["source"]
    content = open_records(source.source, source.split).digests()
    return hashlib.sha256(json.dumps([options, content], sort_keys=True).encode()).hexdigest()


def count(source: PromptSource) -> int | None:
    """How many rows there are, broken ones included; None where only reading everything would tell.

    Raises:
        EvaluationSplitError: the split is for evaluation.
        ConfigError: the source is missing or cannot be read.
    """
    return open_records(source.source, source.split).count()


def _rows(
    records: Records, ids: _Ids, to_prompt: Callable[[dict[str, Any]], Prompt]
) -> Iterator[Row]:
    for number, content in records.read():
        row: dict[str, Any] = {records.unit: number}
        try:
            if isinstance(content, InvalidRequestError):
                raise content
            if not isinstance(content, dict):
                raise InvalidRequestError("not a JSON object")
            row |= content
            row["id"] = ids.identify(number, content)
            prompt = to_prompt(content)
        except (InvalidRequestError, EvaluationSplitError) as error:
            yield row, InvalidRequestError(f"{records.unit} {number}: {error}")
        else:
            yield row, prompt


def _grouped(rows: Iterator[Row], column: str | None) -> Iterator[Row]:
    """The rows with the "group" of each prompt."""
    for row, prompt in rows:
        if isinstance(prompt, InvalidRequestError):
            yield row, prompt
        elif column is None:
            yield row | {"group": prompt_group(prompt)}, prompt
        elif row.get(column) in (None, ""):
            yield row, InvalidRequestError(f"row {row['id']!r}: {_no_column(column, row)}")
        else:
            yield row | {"group": str(row[column])}, prompt


# -- ids ------------------------------------------------------------------------------------------


class _Ids:
    """Gives each row its id, and remembers a digest of it, so that none is used twice."""

    def __init__(self, unit: str, column: str | None = None, required: bool = False) -> None:
        """column: None is "id". required: a row without one is broken; else its number serves."""
        self._unit = unit
        self._column = column
        self._required = required
        self._first: dict[bytes, int] = {}  # digest of an id -> number of the row that has it

    def identify(self, number: int, content: dict[str, Any]) -> str:
        column = self._column or "id"
        if self._column is not None and column not in content:
            raise InvalidRequestError(_no_column(column, content))
        value = content.get(column)
        if value is None and self._column is None and not self._required:
            value = f"row-{number}"
        if value is None:
            raise InvalidRequestError(f'"{column}" is missing; give a string')
        if not isinstance(value, (str, int)):
            raise InvalidRequestError(f'"{column}" must be a string or a whole number')
        text = _check_text(column, str(value))
        digest = hashlib.blake2b(text.encode(), digest_size=ID_DIGEST_BYTES).digest()
        first = self._first.setdefault(digest, number)
        if first != number:
            raise InvalidRequestError(
                f'"{column}" {text!r} was used before, in {self._unit} {first}'
            )
        return text


# -- from a row to a prompt -----------------------------------------------------------------------


def _literal_prompt(content: dict[str, Any]) -> Prompt:
    """The prompt of a request."""
    given = [key for key in COLUMNS if content.get(key) is not None]
    if len(given) != 1:
        raise InvalidRequestError(
            f'give exactly one of "prompt", "messages", "token_ids" (found {given or "none"})'
        )
    return _parse(given[0], content[given[0]])


class _PromptBuilder:
    """Makes a prompt of a row, as a source's options say.

    It remembers the common column that the first row had, so that prompts are never a mixture.
    """

    def __init__(self, source: PromptSource, say: Callable[[str], None]) -> None:
        self._source = source
        self._say = say
        self._common_column: str | None = None
        self._said_cut = False

    def prompt(self, content: dict[str, Any]) -> Prompt:
        if self._source.template is not None:
            return self._in_chat(Prompt(text=_fill(self._source.template, content)))
        column = self._column(content)
        return self._in_chat(self._without_answer(_parse(column, content[column])))

    def _column(self, content: dict[str, Any]) -> str:
        wanted = self._source.prompt_column
        if wanted is None:
            for key in COLUMNS:
                if content.get(key) is not None:
                    return key
            if self._common_column is None:
                self._common_column = self._choose_common_column(content)
            wanted = self._common_column
        if wanted not in content:
            raise InvalidRequestError(_no_column(wanted, content))
        return wanted

    def _choose_common_column(self, content: dict[str, Any]) -> str:
        for key in COMMON_COLUMNS:
            if content.get(key) is not None:
                self._say(
                    f"prompts are taken from the column {key!r}; --prompt-column chooses another"
                )
                return key
        raise InvalidRequestError(
            f"no prompt: none of {', '.join(COLUMNS + COMMON_COLUMNS)} is there, but "
            f"{_names(content)}; choose with --prompt-column or --template"
        )

    def _without_answer(self, prompt: Prompt) -> Prompt:
        """The prompt without the assistant's turns at its end.

        Data sets for fine-tuning have them, and a rollout must not see them.
        """
        messages = list(prompt.messages)
        while messages and messages[-1].role == "assistant":
            messages.pop()
        if len(messages) == len(prompt.messages):
            return prompt
        if not messages:
            raise InvalidRequestError("the messages hold an assistant's turns only")
        if not self._said_cut:
            self._say("messages end with an assistant's turn; it is left out of the prompts")
            self._said_cut = True
        return Prompt(messages=tuple(messages))

    def _in_chat(self, prompt: Prompt) -> Prompt:
        system = self._source.system
        if not self._source.chat and system is None:
            return prompt
        if prompt.token_ids:
            raise InvalidRequestError(
                "--chat and --system need text or messages; token ids are taken as they are"
            )
        messages = prompt.messages or (Message("user", prompt.text or ""),)
        if system is not None and messages[0].role != "system":
            messages = (Message("system", system), *messages)
        return Prompt(messages=messages)


def _parse(key: str, value: Any) -> Prompt:
    """A column's value. Columns with other names may hold text, messages or token ids."""
    if key == "messages":
        return _parse_messages(key, value)
    if key == "token_ids":
        return _parse_token_ids(value)
    if isinstance(value, str) and value:
        return Prompt(text=_check_text(key, value))
    if not isinstance(value, list):
        raise InvalidRequestError(f'"{key}" must be a non-empty string')
    _check_list(key, value)
    if isinstance(value[0], dict):
        return _parse_messages(key, value)
    if not _are_whole_numbers(value):
        raise InvalidRequestError(
            f'"{key}" must be a non-empty string, or a list of messages or of token ids'
        )
    return Prompt(token_ids=tuple(value))


def _parse_token_ids(value: Any) -> Prompt:
    _check_list("token_ids", value)
    if not _are_whole_numbers(value):
        raise InvalidRequestError('"token_ids" must hold whole numbers')
    return Prompt(token_ids=tuple(value))


def _parse_messages(key: str, value: Any) -> Prompt:
    _check_list(key, value)
    messages = []
    for entry in value:
        role = entry.get("role") if isinstance(entry, dict) else None
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise InvalidRequestError(
                f'"{key}" must hold objects with "role" and "content", both strings'
            )
        messages.append(Message(_check_text(key, role), _check_text(key, content)))
    return Prompt(messages=tuple(messages))


def _check_list(key: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(f'"{key}" must be a non-empty list')


def _are_whole_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


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
    filled = PLACEHOLDER.sub(value, template.replace("\\n", "\n"))
    if not filled.strip():
        raise InvalidRequestError("--template: the prompt is empty")
    return _check_text("--template", filled)


def _check_text(key: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(
            f'"{key}" is not Unicode text: half of a surrogate pair'
        ) from None
    return value


def _no_column(name: str, content: dict[str, Any]) -> str:
    return f"there is no column {name!r}, but {_names(content)}"


def _names(content: dict[str, Any]) -> str:
    return ", ".join(map(repr, list(content)[:20])) or "none at all"
