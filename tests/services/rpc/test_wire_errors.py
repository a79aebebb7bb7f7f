"""Errors over the wire: a `google.rpc.Status` that any client reads, and our own errors back."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from s2t_shared import errors
from services.rpc import wire

MAX_STATUS_BYTES = 1024


class Aborted(Exception):
    pass


class FailedCall(grpc.RpcError):
    """What a servicer ended, as a client sees it."""

    def __init__(self, code: grpc.StatusCode, text: str, trailing: Any) -> None:
        self._failure = (code, text, trailing)

    async def abort(self, code: grpc.StatusCode, text: str, trailing: Any = ()) -> None:
        self._failure = (code, text, trailing)
        raise Aborted

    def code(self) -> grpc.StatusCode:
        return self._failure[0]

    def details(self) -> str:
        return self._failure[1]

    def trailing_metadata(self) -> Any:
        return self._failure[2]

    @property
    def status(self) -> Status:
        return Status.FromString(dict(self._failure[2])[wire.STATUS_DETAILS])


def sent(error: errors.S2TError) -> FailedCall:
    call = FailedCall(grpc.StatusCode.OK, "", ())
    with pytest.raises(Aborted):
        asyncio.run(wire.abort(call, error))
    return call


def details(call: FailedCall) -> dict[type, Any]:
    found = {}
    for kind in (ErrorInfo, BadRequest, RetryInfo):
        for packed in call.status.details:
            message = kind()
            if packed.Unpack(message):
                found[kind] = message
    assert len(found) == len(call.status.details)
    return found


@pytest.mark.parametrize("kind", wire.STATUS, ids=lambda k: k.__name__)
def test_each_error_comes_back_as_it_was(kind: type[errors.S2TError]) -> None:
    call = sent(kind("what, where, how"))
    assert (call.status.code, call.status.message) == (call.code().value[0], call.details())
    info = details(call)[ErrorInfo]
    assert (info.domain, info.reason) == ("s2t", wire.REASONS[kind])
    back = wire.error_of(call)
    assert type(back) is kind and str(back) == "what, where, how"
    assert back.retry_after_s == kind("").retry_after_s


def test_the_reasons_are_a_contract() -> None:
    """A client that was built against them must find them again."""
    assert set(wire.REASONS) == set(wire.STATUS)
    assert sorted(wire.REASONS.values()) == [
        "CONFIG",
        "DEADLINE_EXCEEDED",
        "EVALUATION_SPLIT",
        "INVALID_REQUEST",
        "MODEL_FAILED",
        "MODEL_LOAD",
        "OVERLOADED",
        "PERMISSION_DENIED",
        "PROPOSER_LOST",
        "SELECTOR_UNAVAILABLE",
        "SERVICE_UNAVAILABLE",
        "STORE",
        "TOKENIZER_MISMATCH",
        "UNAUTHENTICATED",
        "VERSION",
        "VERSION_NOT_FOUND",
    ]


def test_a_wrong_field_is_named() -> None:
    call = sent(errors.InvalidRequestError("samples=65: must be 1..64", field="samples"))
    [violation] = details(call)[BadRequest].field_violations
    assert (violation.field, violation.description) == ("samples", "samples=65: must be 1..64")
    assert wire.error_of(call).field == "samples"


@pytest.mark.parametrize("seconds", [0.0, 0.25, 90.0])
def test_when_to_try_again(seconds: float) -> None:
    call = sent(errors.OverloadedError("full", retry_after_s=seconds))
    assert details(call)[RetryInfo].retry_delay.ToMilliseconds() == 1000 * seconds
    assert wire.error_of(call).retry_after_s == seconds


def test_what_waiting_does_not_mend_has_no_delay() -> None:
    call = sent(errors.ConfigError("no Redis"))
    assert RetryInfo not in details(call) and wire.error_of(call).retry_after_s is None


@pytest.mark.parametrize("letter", ["x", "ü", "東", "\ud800"], ids=ascii)
def test_details_stay_small(letter: str) -> None:
    """12,000 characters of details once arrived as RESOURCE_EXHAUSTED: metadata has a limit."""
    error = errors.VersionNotFoundError(12_000 * letter, field=500 * letter, retry_after_s=1.0)
    call = sent(error)
    assert call.status.ByteSize() <= MAX_STATUS_BYTES
    assert len(call.details().encode()) <= 512 and call.details().endswith("...")
    assert type(wire.error_of(call)) is errors.VersionNotFoundError


@pytest.mark.parametrize(
    "secret",
    ["redis.internal:6379", "10.1.2.3:6379", "10.1.2.3", "[fe80::1]:6379", "/data/s2t/labels"],
)
def test_no_text_says_where_we_run(secret: str) -> None:
    """A Redis that was away told every client its address."""
    call = sent(errors.StoreError(f"Redis at {secret}: Error 111 connecting to {secret}."))
    assert secret not in call.details() and secret not in call.status.message
    assert "Error 111" in call.details()


def test_no_text_shows_what_runs() -> None:
    """What Ray writes into its errors: process, actor, traceback, object."""
    text = (
        "lost (pid=4711, actor_id=ab12cd) <X at 0x7f55ccbb>\nTraceback (most recent call last):\n x"
    )
    shown = sent(errors.StoreError(text)).details()
    for secret in ("4711", "ab12cd", "7f55ccbb", "most recent"):
        assert secret not in shown
    assert shown.startswith("lost (")


@pytest.mark.parametrize(
    "text",
    [
        "token_ids[12]=99999: must be 0..511",
        "temperature=-1.5: must be 0..100",
        "mode=99: unknown; known are [1, 2, 3]",
        "send metadata 'authorization: Bearer TOKEN'",
    ],
)
def test_what_is_no_place_stays(text: str) -> None:
    assert sent(errors.InvalidRequestError(text)).details() == text


def failed(code: grpc.StatusCode, *trailing: tuple[str, Any]) -> errors.S2TError:
    return wire.error_of(FailedCall(code, "text", trailing))


def test_an_older_server_and_a_proxy_are_understood() -> None:
    """Only the class in `s2t-error`, or only a status, or details that are none."""
    kind = (wire.ERROR_KIND, "VersionNotFoundError")
    assert type(failed(grpc.StatusCode.NOT_FOUND, kind)) is errors.VersionNotFoundError
    assert type(failed(grpc.StatusCode.RESOURCE_EXHAUSTED)) is errors.OverloadedError
    broken = (wire.STATUS_DETAILS, b"\xff\xff")
    assert type(failed(grpc.StatusCode.NOT_FOUND, broken, kind)) is errors.VersionNotFoundError
    lost = failed(grpc.StatusCode.UNAVAILABLE)
    assert type(lost) is errors.ServiceUnavailableError and lost.retry_after_s == 1.0
    assert "CANCELLED" in str(failed(grpc.StatusCode.CANCELLED))


def test_a_foreign_domain_names_none_of_our_errors() -> None:
    packed = AnyMessage()
    packed.Pack(ErrorInfo(domain="envoy", reason="STORE"))
    status = Status(code=8, message="text", details=[packed]).SerializeToString()
    error = failed(grpc.StatusCode.RESOURCE_EXHAUSTED, (wire.STATUS_DETAILS, status))
    assert type(error) is errors.OverloadedError
