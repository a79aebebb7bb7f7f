"""Errors <-> gRPC statuses. The trailing metadata names the error's class for our own clients."""

from __future__ import annotations

from typing import Any

import grpc

from s2t_shared import errors

ERROR_KIND = "s2t-error"  # trailing metadata

# Subclasses before their bases: the first match wins.
STATUS: dict[type[errors.S2TError], grpc.StatusCode] = {
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.EvaluationSplitError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.TokenizerMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ConfigError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ModelLoadError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.VersionNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.VersionError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.SelectorUnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.StoreError: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
}


def status_of(error: errors.S2TError) -> grpc.StatusCode:
    """The status of an error's class or nearest base class."""
    for kind, status in STATUS.items():
        if isinstance(error, kind):
            return status
    return grpc.StatusCode.INTERNAL


async def abort(context: Any, error: errors.S2TError) -> None:
    """End a call with the error's status and text. The trailing metadata names its class."""
    await context.abort(status_of(error), str(error), ((ERROR_KIND, type(error).__name__),))


def error_of(error: grpc.RpcError) -> errors.S2TError:
    """The error that the server raised, from the failure of a call."""
    code = error.code()
    details = error.details() or "no details"
    names = {kind.__name__: kind for kind in STATUS}
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KIND and value in names:
            return names[value](details)
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.SelectorUnavailableError(
            f"the service cannot be reached or is not ready ({details})"
        )
    for kind, status in STATUS.items():
        if status is code:
            return kind(details)
    return errors.S2TError(f"{code.name}: {details}")
