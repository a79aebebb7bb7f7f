"""What is known of one call from outside: its id, and what its line in the access log says.

The server that takes a call begins its record; whoever learns something of the call notes it there.
Prompts, answers and tokens are never noted.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from s2t_shared.types import Answer, AnswerPiece
from services.rpc import logs, tracing

access = logging.getLogger(logs.ACCESS)
REQUEST_ID = "x-request-id"  # in HTTP headers and gRPC metadata
MAX_ID_LENGTH = 128
SANE_ID = re.compile(r"[\x21-\x7e]{1,128}")
NOT_IN_AN_ID = re.compile(r"[^\x21-\x7e]")


@dataclass(kw_only=True)
class CallRecord:
    """One call.

    method: as its transport names it. client: a digest of the token it came with, "" for none.
    prompt_tokens, completion_tokens, triggers, degraded_steps: of all its answers.
    """

    method: str = ""
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    level: int = logging.DEBUG
    mode: str = ""
    client: str = ""
    error: str = ""
    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    triggers: int = 0
    degraded_steps: int = 0
    first_token_s: float | None = None
    span: tracing.Span = tracing.NOTHING
    _began: float = field(default_factory=time.monotonic)

    @property
    def age_s(self) -> float:
        """Seconds since the call came."""
        return time.monotonic() - self._began

    def sees(self, piece: AnswerPiece) -> None:
        """Note what a part of an answer shows of it."""
        if self.first_token_s is None and (piece.text or piece.steps or piece.answer):
            self.first_token_s = self.age_s
        if piece.answer is not None:
            self.has(piece.answer)

    def has(self, answer: Answer) -> None:
        """Note a whole answer."""
        usage = answer.usage
        self.answers += 1
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        self.triggers += usage.triggers
        self.degraded_steps += usage.degraded_steps

    def end(self, status: str) -> None:
        """The call is over: write its line, and end its span."""
        fields = self._line(status)
        self.span.set(fields)
        is_good = status == "OK" or status[0] in "123"
        self.span.end(self.error or ("" if is_good else status))
        if access.isEnabledFor(self.level):
            access.log(self.level, "%s %s", self.method, status, extra={"fields": fields})

    def _line(self, status: str) -> dict[str, str | int | float]:
        line: dict[str, str | int | float] = {
            "request_id": self.request_id,
            "method": self.method,
            "status": status,
            "duration_s": round(self.age_s, 4),
        }
        for name in ("mode", "client", "error"):
            if getattr(self, name):
                line[name] = getattr(self, name)
        if self.first_token_s is not None:
            line["first_token_s"] = round(self.first_token_s, 4)
        if self.answers:
            for name in ("prompt_tokens", "completion_tokens", "triggers", "degraded_steps"):
                line[name] = getattr(self, name)
        return line


_current: ContextVar[CallRecord | None] = ContextVar("call", default=None)


def sane_id(headers: Mapping[str, Any]) -> str:
    """The id in a call's headers or metadata; "" where there is none, or something else."""
    given = headers.get(REQUEST_ID, "")
    return given if isinstance(given, str) and SANE_ID.fullmatch(given) else ""


def begin(
    method: str, given_id: str, level: int, trace: tracing.Headers | None = None
) -> CallRecord:
    """The record of a call that has come, for the running task and those it starts.

    given_id: how its caller names it; "": it has a new id. level: of its line in the log.
    trace: what it belongs to; None: it is not traced.
    """
    record = CallRecord(method=method, level=level)
    if trace is not None:
        record.span = tracing.start(method.lstrip("/"), trace, "server")
    if given_id:
        record.request_id = NOT_IN_AN_ID.sub("?", given_id[:MAX_ID_LENGTH])
    _current.set(record)
    logs.about(record.request_id)
    return record


def current() -> CallRecord:
    """The record of the call that the running task answers; outside of any, one that nobody
    reads."""
    return _current.get() or CallRecord()
