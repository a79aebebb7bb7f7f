"""Prompts from files and data sets: which column, template, chat and id make a row of `records` a
prompt.

Everything streams: one line or one batch of a table is in memory, and 16 bytes of every id.
Training prompts only: an evaluation split is refused (`read_prompts`, for answering rather than
learning, takes any). Knows rows; no tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s2t_shared.data.datasets import Record, Records, open_records, refuse_evaluation
from s2t_shared.errors import ConfigError, EvaluationSplitError, InvalidRequestError
from s2t_shared.types import Message, Prompt

Row = tuple[dict[str, Any], Prompt | InvalidRequestError]

COLUMNS = ("prompt", "messages", "token_ids")
COMMON_COLUMNS = (
    "question",
    "problem",
    "instruction",
    "input",
    "text",
)  # what public data sets call a prompt


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """Where prompts are, and how a row becomes one.

    source: a file, a folder (of data files, of `save_to_disk`, or a copy of a hub repository), or a
    hub id "org/name"; ":config" may follow the last two. split: which part of it; what is harvested
    records it. id_column: default "id" where there is one, else the row's number ("row-17").
    prompt_column: default the first of prompt, messages, token_ids, else a common name
    (`COMMON_COLUMNS`). template: text with {column} in it; {{column}} stands for a literal
    {column}, every other brace for itself, and a written-out \\n for a line break, as shells pass
    it. chat: the text becomes a user message. system: a system message before it (implies chat).
    """

    source: str
    split: str = "train"
    id_column: str | None = None
    prompt_column: str | None = None
    template: str | None = None
    system: str | None = None
    chat: bool = False


def read(source: PromptSource, say: Callable[[str], None] = lambda line: None) -> Iterator[Row]:
    """The rows of `source` with their prompts, in a fixed order. A row has "id", a string, unless
    that is what is wrong with it. A broken row yields its error, which names its place. `say` hears
    what was chosen by itself.

    Raises: EvaluationSplitError: the split is for evaluation. ConfigError: the source is not there
        or cannot be read (at once or, where it is damaged further on, while reading).
    """
    if source.template is not None and source.prompt_column is not None:
        raise ConfigError(
            "--template and --prompt-column: give one of them; {column} in a template names columns"
        )
    records = open_records(source.source, source.split)
    return _rows(records.read(), _Builder(source, records.unit, say))


def read_prompts(file: Path) -> Iterator[Row]:
    """Requests in a JSONL file: {"id", and exactly one of "prompt" | "messages" | "token_ids"},
    taken as they are.

    A broken line yields its error, which names the line's number; an unreadable file raises
    ConfigError.
    """
    return _rows(Records.lines(file).read(), _Builder(None, "line", lambda line: None))


def fingerprint(source: PromptSource) -> str:
    """64 hex digits: the same for the same content and options, wherever the files lie.

    Raises:
        ConfigError: the source is not there or cannot be read.
    """
    options = {key: value for key, value in asdict(source).items() if key != "source"}
    content = open_records(source.source, source.split).digests()
    return hashlib.sha256(json.dumps([options, content], sort_keys=True).encode()).hexdigest()


def count(source: PromptSource) -> int | None:
    """How many rows there are, broken ones included; None where only reading everything would tell.

    Raises:
        ConfigError: the source is not there or cannot be read.
    """
    return open_records(source.source, source.split).count()


def _rows(records: Iterable[Record], builder: _Builder) -> Iterator[Row]:
    for number, content in records:
        row: dict[str, Any] = {builder.unit: number}
        try:
            if isinstance(content, InvalidRequestError):
                raise content
            if not isinstance(content, dict):
                raise InvalidRequestError("not a JSON object")
            row |= content
            row["id"] = builder.identify(number, content)
            yield row, builder.prompt(content)
        except (InvalidRequestError, EvaluationSplitError) as error:
            yield row, InvalidRequestError(f"{builder.unit} {number}: {error}")


class _Builder:
    """Turns rows into prompts as the options say (none: as requests). Remembers ids, and the column
    it took."""

    def __init__(self, source: PromptSource | None, unit: str, say: Callable[[str], None]) -> None:
        self._strict = source is None
        self._source, self.unit, self._say = source or PromptSource(source=""), unit, say
        self._seen: dict[bytes, int] = {}
        self._taken: str | None = None
        self._cut = False

    def identify(self, number: int, content: dict[str, Any]) -> str:
        column = self._source.id_column or "id"
        if self._source.id_column is not None and column not in content:
            raise InvalidRequestError(_no_column(column, content))
        value = content.get(column)
        if value is None and self._source.id_column is None and not self._strict:
            value = f"row-{number}"
        if not isinstance(value, (str, int)):
            raise InvalidRequestError(
                f'"{column}" is missing; give a string'
                if value is None
                else f'"{column}" must be a string or a whole number'
            )
        text = _text(column, str(value))
        first = self._seen.setdefault(
            hashlib.blake2b(text.encode(), digest_size=16).digest(), number
        )
        if first != number:
            raise InvalidRequestError(
                f'"{column}" {text!r} was used before, in {self.unit} {first}'
            )
        return text

    def prompt(self, content: dict[str, Any]) -> Prompt:
        if self._strict:
            given = [key for key in COLUMNS if content.get(key) is not None]
            if len(given) != 1:
                raise InvalidRequestError(
                    'give exactly one of "prompt", "messages", "token_ids" (found '
                    f"{given or 'none'})"
                )
            return _parse(given[0], content[given[0]])
        if isinstance(content.get("split"), str):
            refuse_evaluation(content["split"])
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
                self._taken = next(
                    (key for key in COMMON_COLUMNS if content.get(key) is not None), None
                )
                if self._taken is None:
                    raise InvalidRequestError(
                        f"no prompt: none of {', '.join(COLUMNS + COMMON_COLUMNS)} is there, but "
                        f"{_names(content)}; choose with --prompt-column or --template"
                    )
                self._say(
                    f"prompts are taken from the column {self._taken!r}; --prompt-column chooses "
                    "another"
                )
            wanted = self._taken
        if wanted not in content:
            raise InvalidRequestError(_no_column(wanted, content))
        return wanted

    def _question(self, prompt: Prompt) -> Prompt:
        """Without the answer at the end: sets made for fine-tuning have one, and a rollout must not
        see it."""
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
            raise InvalidRequestError(
                "--chat and --system need text or messages; token ids are taken as they are"
            )
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
            raise InvalidRequestError(
                f'"{key}" must hold whole numbers'
                if key == "token_ids"
                else f'"{key}" must be a non-empty string, or a list of messages or of token ids'
            )
        return Prompt(token_ids=tuple(value))
    if not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    ):
        raise InvalidRequestError(
            f'"{key}" must hold objects with "role" and "content", both strings'
        )
    return Prompt(
        messages=tuple(Message(_text(key, m["role"]), _text(key, m["content"])) for m in value)
    )


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
    filled = re.sub(
        r"\{(?P<literal>\{\w+\})\}|\{(?P<column>[^\W\d]\w*)\}", value, template.replace("\\n", "\n")
    )
    if not filled.strip():
        raise InvalidRequestError("--template: the prompt is empty")
    return _text("--template", filled)


def _text(key: str, value: str) -> str:
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
