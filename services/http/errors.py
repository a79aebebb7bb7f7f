"""Errors in OpenAI's shape, with HTTP's statuses."""

from __future__ import annotations

import math
from typing import Any

import grpc
from starlette.responses import JSONResponse

from services.http.requests import ChatRequest, CompletionRequest, Settings
from services.rpc.wire import Refusal

# status, and OpenAI's type
STATUS: dict[grpc.StatusCode, tuple[int, str]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, "invalid_request_error"),
    grpc.StatusCode.FAILED_PRECONDITION: (400, "invalid_request_error"),
    grpc.StatusCode.UNAUTHENTICATED: (401, "authentication_error"),
    grpc.StatusCode.PERMISSION_DENIED: (403, "permission_error"),
    grpc.StatusCode.NOT_FOUND: (404, "not_found_error"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    grpc.StatusCode.UNAVAILABLE: (503, "service_unavailable_error"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, "timeout_error"),
}
OTHERS = (500, "server_error")
OPENAI_FIELDS = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
PARAMS = {  # our fields that have another name at OpenAI
    "max_new_tokens": "max_tokens",
    "sampling.temperature": "temperature",
    "sampling.top_p": "top_p",
    "sampling.top_k": "s2t.top_k",
    "messages.role": "messages",
}


def body_of(refusal: Refusal) -> dict[str, Any]:
    """The error as OpenAI writes it; `code` is our stable name of it."""
    _, kind = STATUS.get(refusal.code, OTHERS)
    return {
        "error": {
            "message": refusal.text,
            "type": kind,
            "param": param_of(refusal.field),
            "code": refusal.reason.lower(),
        }
    }


def param_of(field: str) -> str | None:
    """The field of OpenAI's request that says what our field says."""
    if not field or field in PARAMS:
        return PARAMS.get(field)
    name = field.partition(".")[0]
    is_ours = name in Settings.model_fields and name not in OPENAI_FIELDS
    return f"s2t.{field}" if is_ours else field


def response_of(refusal: Refusal) -> JSONResponse:
    """The error as a reply. What cannot succeed by being sent again says so to OpenAI's clients,
    which else retry."""
    status, _ = STATUS.get(refusal.code, OTHERS)
    headers = {}
    if refusal.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(refusal.retry_after_s))
        headers["retry-after-ms"] = str(round(1000 * refusal.retry_after_s))
    elif status >= 500:
        headers["x-should-retry"] = "false"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(body_of(refusal), status, headers)


def plain(status: int, text: str, code: str, param: str | None = None) -> JSONResponse:
    """What is refused before it is a request of ours, in the same shape."""
    error = {"message": text, "type": "invalid_request_error", "param": param, "code": code}
    return JSONResponse({"error": error}, status)
