"""Log lines of a service's processes: text or JSON, each with its role and the request that it is
about. Ray Serve's own logger is left as it is."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from s2t_shared.errors import ConfigError

if TYPE_CHECKING:
    from s2t_shared.config import LogConfig

OURS = ("services", "s2t_shared")  # loggers
ACCESS = "services.access"
FILE_BYTES = 64 << 20  # then another is begun
OLD_FILES = 4
_request_id: ContextVar[str] = ContextVar("request_id", default="")


def about(request_id: str) -> None:
    """Lines that the running task logs from now on are about this request."""
    _request_id.set(request_id)


def begin(settings: LogConfig, role: str) -> None:
    """Write what this process logs as the settings say, until it ends.

    Raises:
        ConfigError: `log.folder` cannot be written.
    """
    try:
        handler = _handler(settings, role)
    except OSError as error:
        raise ConfigError(
            f"log.folder={settings.folder} cannot be written: {error.strerror}; choose another, or "
            "leave it out: then lines go to standard error"
        ) from error
    handler.setFormatter((JsonLines if settings.format == "json" else TextLines)(role))
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(settings.level.upper())
    logging.getLogger(ACCESS).setLevel(logging.NOTSET if settings.access else logging.WARNING)


def _handler(settings: LogConfig, role: str) -> logging.Handler:
    if settings.folder is None:
        # Not `sys.stderr`: in a replica, Serve wraps each of its lines in one of its own.
        return logging.StreamHandler(sys.__stderr__)
    settings.folder.mkdir(parents=True, exist_ok=True)
    file = settings.folder / f"{role}-{os.uname().nodename}-{os.getpid()}.log"
    return logging.handlers.RotatingFileHandler(
        file, maxBytes=FILE_BYTES, backupCount=OLD_FILES, encoding="utf-8"
    )


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a line says beside its message: the request, and what was logged with it."""
    request_id = _request_id.get()
    about_request = {"request_id": request_id} if request_id else {}
    return {**about_request, **getattr(record, "fields", {})}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, role, request_id where there is one,
    and the fields that were logged with it."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "role": self._role,
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """The same for people."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname} {self._role} {record.name}: "
        line += record.getMessage() + fields
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line
