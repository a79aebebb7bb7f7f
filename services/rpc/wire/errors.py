"""Errors <-> gRPC statuses.

A failed call carries a `google.rpc.Status` in its trailing metadata: `ErrorInfo` with our stable
name of the error, `BadRequest` with the field that is wrong, `RetryInfo` with the seconds after
which the same request may succeed. `s2t-error` names the error's class, for older clients.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from s2t_shared import errors
from services.rpc import retrying

STATUS_DETAILS = "grpc-status-details-bin"  # trailing metadata, as grpcio-status writes it
ERROR_KIND = "s2t-error"  # trailing metadata
DOMAIN = "s2t"
INTERNAL = "INTERNAL"  # the reason of what is no S2TError
MAX_TEXT_BYTES = 512
MAX_DESCRIPTION_BYTES = 200  # of a wrong field; the status has the whole text
MAX_FIELD_BYTES = 64

# Subclasses before their bases: the first match wins.
STATUS: dict[type[errors.S2TError], grpc.StatusCode] = {
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.EvaluationSplitError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.TokenizerMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ConfigError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ModelLoadError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ModelFailedError: grpc.StatusCode.UNAVAILABLE,
    errors.VersionNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.VersionError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.SelectorUnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.ProposerLostError: grpc.StatusCode.UNAVAILABLE,
    errors.ServiceUnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.StoreError: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
}

# Part of the contract: a class may get another name, its reason may not.
REASONS: dict[type[errors.S2TError], str] = {
    errors.InvalidRequestError: "INVALID_REQUEST",
    errors.EvaluationSplitError: "EVALUATION_SPLIT",
    errors.TokenizerMismatchError: "TOKENIZER_MISMATCH",
    errors.ConfigError: "CONFIG",
    errors.ModelLoadError: "MODEL_LOAD",
    errors.ModelFailedError: "MODEL_FAILED",
    errors.VersionNotFoundError: "VERSION_NOT_FOUND",
    errors.VersionError: "VERSION",
    errors.OverloadedError: "OVERLOADED",
    errors.SelectorUnavailableError: "SELECTOR_UNAVAILABLE",
    errors.ProposerLostError: "PROPOSER_LOST",
    errors.ServiceUnavailableError: "SERVICE_UNAVAILABLE",
    errors.StoreError: "STORE",
    errors.DeadlineExceededError: "DEADLINE_EXCEEDED",
    errors.UnauthenticatedError: "UNAUTHENTICATED",
    errors.PermissionDeniedError: "PERMISSION_DENIED",
}
KINDS = {reason: kind for kind, reason in REASONS.items()}

# What a text may not tell a client: where our processes and files are, and what runs there.
HIDDEN = (
    (
        re.compile(
            r"\[[\da-f]*:[\da-f:]+\](:\d+)?"  # [IPv6]:port
            r"|\b\d{1,3}(\.\d{1,3}){3}\b(:\d+)?"  # IPv4:port
            r"|\b[\w.-]+:\d{2,5}\b"  # host:port
        ),
        "[address]",
    ),
    (re.compile(r"(?<![\w/.])/[\w.@+-]+(/[\w.@+-]+)+"), "[path]"),
    (re.compile(r"Traceback \(most recent call last\).*", re.DOTALL), "[traceback]"),
    (re.compile(r"\b(pid|actor_id|node_id|worker_id)\s*[=: ]\s*\w+", re.IGNORECASE), "[process]"),
    (re.compile(r"0x[\da-f]{6,}"), "[object]"),
)


# -- to a client ----------------------------------------------------------------------------------


def status_of(error: errors.S2TError) -> grpc.StatusCode:
    """The status of an error's class or nearest base class."""
    for kind, status in STATUS.items():
        if isinstance(error, kind):
            return status
    return grpc.StatusCode.INTERNAL


def public_text(error: errors.S2TError | str) -> str:
    """The error's text as a client may read it: `HIDDEN` is left out, and at most
    `MAX_TEXT_BYTES` are kept."""
    text = str(error)
    for hidden, instead in HIDDEN:
        text = hidden.sub(instead, text)
    return _cut(text, MAX_TEXT_BYTES)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """What a client is told of a call that failed, where it did not come by gRPC. field,
    retry_after_s: as in `S2TError`."""

    code: grpc.StatusCode
    text: str
    reason: str
    field: str = ""
    retry_after_s: float | None = None


def refusal_of(error: errors.S2TError) -> Refusal:
    """The error as a client may read it: the same as `abort` tells."""
    return Refusal(
        code=status_of(error),
        text=public_text(error),
        reason=next((name for kind, name in REASONS.items() if isinstance(error, kind)), INTERNAL),
        field=error.field,
        retry_after_s=error.retry_after_s,
    )


async def abort(context: Any, error: errors.S2TError) -> None:
    """End a call with the error's status, text and details."""
    reason = next((name for kind, name in REASONS.items() if isinstance(error, kind)), INTERNAL)
    await abort_with(
        context,
        status_of(error),
        str(error),
        reason,
        field=error.field,
        retry_after_s=error.retry_after_s,
        more=((ERROR_KIND, type(error).__name__),),
    )


async def abort_with(
    context: Any,
    code: grpc.StatusCode,
    text: str,
    reason: str,
    *,
    field: str = "",
    retry_after_s: float | None = None,
    more: tuple[tuple[str, str], ...] = (),
) -> None:
    """End a call with a status and its details: the only way to end one with a text.

    more: trailing metadata beside them. What was set before is sent too.
    """
    text = public_text(text)
    details: list[Any] = [ErrorInfo(reason=reason, domain=DOMAIN)]
    if field:
        violation = BadRequest.FieldViolation(
            field=_cut(field, MAX_FIELD_BYTES), description=_cut(text, MAX_DESCRIPTION_BYTES)
        )
        details.append(BadRequest(field_violations=[violation]))
    if retry_after_s is not None:
        details.append(RetryInfo(retry_delay=_duration(retry_after_s)))
    status = Status(code=code.value[0], message=text, details=[_packed(d) for d in details])
    repeats = _pushback(reason, retry_after_s) if code is grpc.StatusCode.UNAVAILABLE else ()
    details_bin = (STATUS_DETAILS, status.SerializeToString())
    before = tuple(context.trailing_metadata() or ())
    await context.abort(code, text, (details_bin, *repeats, *more, *before))


def _pushback(reason: str, retry_after_s: float | None) -> tuple[tuple[str, str], ...]:
    """A client's gRPC repeats what the service itself could not do. Whether to ask again for what
    the LLM or Redis could not do, its user decides."""
    is_ours = reason in (REASONS[errors.ServiceUnavailableError], REASONS[errors.ProposerLostError])
    return retrying.pushback(retry_after_s if is_ours else None)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMilliseconds(max(0, round(1000 * seconds)))
    return duration


def _packed(detail: Any) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed


def _cut(text: str, size: int) -> str:
    """The text, or as much of its beginning as fits into `size` bytes."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= size:
        return encoded.decode()
    return encoded[: size - 3].decode(errors="ignore") + "..."


# -- from a server --------------------------------------------------------------------------------


def error_of(error: grpc.RpcError) -> errors.S2TError:
    """The error that the server raised, from the failure of a call."""
    code = error.code()
    text = error.details() or "no details"
    trailing = dict(error.trailing_metadata() or ())
    details = _read_details(trailing.get(STATUS_DETAILS))
    kind = _named_kind(details, trailing.get(ERROR_KIND))
    if kind is None and code is grpc.StatusCode.UNAVAILABLE:
        kind = errors.ServiceUnavailableError
        text = f"the service cannot be reached or is not ready ({text})"
    if kind is None and code is grpc.StatusCode.CANCELLED:
        kind = errors.ServiceUnavailableError  # not by the caller: who cancels gets no error
        text = f"the service has dropped the call (CANCELLED: {text})"
    if kind is None:
        kind = next((known for known, status in STATUS.items() if status is code), None)
    if kind is None:
        return errors.S2TError(f"{code.name}: {text}")
    violations = details.bad_request.field_violations
    return kind(
        text,
        field=violations[0].field if violations else "",
        retry_after_s=details.retry_after_s,
    )


def is_connection_lost(error: grpc.RpcError) -> bool:
    """Whether a call failed on its way: no server of ours has said so."""
    trailing = dict(error.trailing_metadata() or ())
    return error.code() is grpc.StatusCode.UNAVAILABLE and STATUS_DETAILS not in trailing


class _Details:
    """The details of a failed call that we know."""

    def __init__(self, messages: list[AnyMessage]) -> None:
        self.info = ErrorInfo()
        self.bad_request = BadRequest()
        self._retry = RetryInfo()
        for message in messages:
            for known in (self.info, self.bad_request, self._retry):
                message.Unpack(known)  # does nothing to a message of another type

    @property
    def retry_after_s(self) -> float | None:
        if not self._retry.HasField("retry_delay"):
            return None
        return float(self._retry.retry_delay.ToMilliseconds()) / 1000


def _read_details(sent: Any) -> _Details:
    """Details that cannot be read, as a proxy may write them, count as none."""
    try:
        return _Details(list(Status.FromString(sent).details if sent else ()))
    except (DecodeError, TypeError):
        return _Details([])


def _named_kind(details: _Details, class_name: Any) -> type[errors.S2TError] | None:
    if details.info.domain == DOMAIN and details.info.reason in KINDS:
        return KINDS[details.info.reason]
    return next((kind for kind in STATUS if kind.__name__ == class_name), None)
