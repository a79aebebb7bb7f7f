"""What HTTP clients are told of what fails: statuses, OpenAI's shape, and that nothing leaks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest

from s2t_shared.decode.scripted import ScriptedSelector
from s2t_shared.errors import OverloadedError, ProposerLostError, SelectorUnavailableError
from s2t_shared.types import Answer, AnswerPiece, GenerateRequest, ServiceDescription
from tests.helpers.serving import proposer_service, scripted_slm, slow_slm, with_http

PROMPT = "a secret prompt"
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def post(url: str, path: str, body: bytes, headers: dict[str, str] = JSON) -> tuple[int, Any, Any]:
    """Status, headers and the JSON of the reply."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, json.loads(content)


def ask(url: str, path: str = CHAT, **fields: Any) -> tuple[int, Any, Any]:
    given: dict[str, Any] = {"model": "bundled"}
    if path == CHAT:
        given["messages"] = [{"role": "user", "content": PROMPT}]
    else:
        given["prompt"] = PROMPT
    return post(url, path, json.dumps({**given, **fields}).encode())


CHATS = {
    "another model": ({"model": "gpt-9"}, 404, "model", "gpt-9"),
    "unknown mode in the name": ({"model": "bundled:best"}, 404, "model", "best"),
    "two modes": ({"model": "bundled:greedy", "s2t": {"mode": "llm"}}, 400, "s2t.mode", "greedy"),
    "unknown mode": ({"s2t": {"mode": "best"}}, 400, "s2t.mode", "choose from"),
    "no messages": ({"messages": []}, 400, "messages", "at least 1"),
    "no content": ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "required"),
    "another role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", ""),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages.0.content.0.type",
        "text",
    ),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    "functions": ({"functions": [{}]}, 400, "functions", "not supported"),
    "JSON mode": ({"response_format": {"type": "json_object"}}, 400, "response_format.type", ""),
    "penalty": ({"presence_penalty": 0.5}, 400, "presence_penalty", ""),
    "unknown field": ({"temprature": 1}, 400, "temprature", "unknown"),
    "unknown setting": ({"s2t": {"bugdet": 1}}, 400, "s2t.bugdet", "unknown"),
    "several of the same": ({"n": 2}, 400, "n", "always gives the same answer"),
    "temperature": ({"temperature": -1}, 400, "temperature", "0..100"),
    "top_p": ({"top_p": 0}, 400, "top_p", "above 0"),
    "max_tokens": ({"max_tokens": 0}, 400, "max_tokens", "equal to 1"),
    "too many tokens": ({"max_completion_tokens": 10**6}, 400, "max_tokens", "1..8192"),
    "huge number": ({"max_completion_tokens": 10**30}, 400, "max_completion_tokens", ""),
    "candidates": ({"s2t": {"k": 65}}, 400, "s2t.k", "64"),
    "budget": ({"s2t": {"budget": 1.5}}, 400, "s2t.budget", "1.5"),
    "budget and threshold": ({"s2t": {"budget": 0.1, "threshold": 1}}, 400, "s2t.budget", "both"),
    "empty stop": ({"stop": ""}, 400, "stop", "empty"),
    "top_logprobs alone": ({"top_logprobs": 2}, 400, "top_logprobs", "logprobs"),
    "logprobs of the LLM": (
        {"model": "bundled:llm", "logprobs": True},
        400,
        "logprobs",
        "mode llm",
    ),
    "unknown version": ({"s2t": {"version": "v9"}}, 404, None, "v9"),
    "nothing live": ({"model": "bundled:s2t_local"}, 404, None, "no local selector is live"),
    "uncalibrated": ({"s2t": {"budget": 0.1, "trigger": "margin"}}, 400, None, "calibrated"),
    "deadline": ({"s2t": {"timeout_seconds": 1e-5, "threshold": 1}}, 504, None, "deadline"),
    "half a character": ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None, ""),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", CHATS)
def test_each_bad_chat_has_its_status(url: str, case: str, streamed: bool) -> None:
    """A stream that is refused has an HTTP error, not a 200 with an event. Nothing leaks."""
    fields, status, param, text = CHATS[case]
    found, headers, reply = ask(url, **fields, stream=streamed)
    error = reply["error"]
    assert (found, error["param"]) == (status, param), error
    assert text in error["message"] and headers["x-request-id"]
    for secret in ("Traceback", "/", "actor", "pydantic", PROMPT):
        assert secret not in error["message"]
    assert (headers["x-should-retry"] == "false") == (status == 504)


COMPLETIONS = {
    "no prompt": ({"prompt": []}, "prompt", "1..64"),
    "an empty prompt": ({"prompt": ["a", ""]}, "prompt", "empty"),
    "too many prompts": ({"prompt": ["a"] * 65}, "prompt", "65"),
    "another form": ({"prompt": {"a": 1}}, "prompt", ""),
    "echo of ids": ({"echo": True, "prompt": [1, 2]}, "echo", "text"),
    "no answer": ({"max_tokens": 0}, "max_tokens", "echo"),
    "best_of": ({"best_of": 3}, "best_of", ""),
    "suffix": ({"suffix": "end"}, "suffix", ""),
    "negative id": ({"prompt": [-1]}, None, ""),
}


@pytest.mark.parametrize("case", COMPLETIONS)
def test_each_bad_completion_has_its_parameter(url: str, case: str) -> None:
    fields, param, text = COMPLETIONS[case]
    status, _, reply = ask(url, "/v1/completions", **fields)
    assert status == 400 and text in reply["error"]["message"], reply
    assert param is None or reply["error"]["param"].startswith(param)


BODIES = {
    "not JSON": (b"{", JSON, 400),
    "another type": (b"{}", {"content-type": "text/plain"}, 415),
    "no type": (b"{}", {}, 415),
    "not an object": (b"[1]", JSON, 400),
    "too deep": (b"[" * 20_000, JSON, 400),
    "bad UTF-8": (b'{"model": "\xff"}', JSON, 400),
    "too large": (b" " * 5000, JSON, 413),
}


@pytest.mark.parametrize("case", BODIES)
def test_each_bad_body_has_its_status(tmp_path: Path, case: str) -> None:
    body, headers, status = BODIES[case]
    limits = {"gateway.max_message_bytes": 4096} if case == "too large" else {}
    found, _, reply = with_http(
        tmp_path, proposer_service(), lambda url: post(url, CHAT, body, headers), **limits
    )
    assert found == status and reply["error"]["message"]


def test_a_wrong_route_and_a_wrong_method(url: str) -> None:
    assert post(url, "/v1/embeddings", b"{}")[0] == 404
    status, headers, reply = post(url, "/v1/models", b"{}")
    assert status == 405 and "POST" in reply["error"]["message"] and headers["x-request-id"]


def test_mode_llm_without_an_llm_is_unavailable(tmp_path: Path) -> None:
    service = proposer_service(scripted_slm(), ScriptedSelector(available=False))
    status, headers, reply = with_http(tmp_path, service, lambda url: ask(url, model="bundled:llm"))
    assert status == 503 and headers["retry-after"] == "1"
    assert reply["error"]["code"] == "selector_unavailable"


def test_a_clients_quota_counts_its_http_requests(tmp_path: Path) -> None:
    """The second of one client is refused with the time to come again, and the first goes on."""
    one, another = "one-" + 16 * "x", "another-" + 16 * "x"
    file = tmp_path / "tokens"
    file.write_text(f"generate: {one}\ngenerate: {another}\n", encoding="utf-8")

    def work(url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=one, max_retries=0) as client:
            given: Any = {"model": "bundled:greedy", "messages": [{"role": "user", "content": "a"}]}
            stream = client.chat.completions.create(**given, stream=True)
            next(iter(stream))
            with pytest.raises(openai.RateLimitError, match="at once") as refused:
                client.chat.completions.create(**given)
            assert refused.value.response.headers["retry-after"] == "1"
            with client.with_options(api_key=another) as other:
                assert next(iter(other.chat.completions.create(**given, stream=True))).choices
            stream.close()

    settings = {"gateway.max_requests_per_client": 1, "security.token_file": str(file)}
    with_http(tmp_path, proposer_service(slow_slm()), work, **settings)


class Broken:
    """Proposers that fail, behind the first piece where there is one."""

    def __init__(self, error: Exception, text: str = "") -> None:
        self.error = error
        self.text = text

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[AnswerPiece, None]:
        if self.text:
            yield AnswerPiece(self.text)
            await asyncio.sleep(0)
        raise self.error

    async def answer(self, request: GenerateRequest) -> Answer:
        raise self.error

    async def describe(self) -> ServiceDescription:
        return ServiceDescription(
            slm_digest="", tokenizer_digest="", template_digest="", llm_digest="", max_length=1
        )

    async def count_dropped_labels(self) -> int:
        return 0


FAILURES = {
    "overload": (OverloadedError("no room", retry_after_s=2.4), 429, "overloaded", "3"),
    "selector": (SelectorUnavailableError("no LLM"), 503, "selector_unavailable", "1"),
    "a lost proposer": (ProposerLostError("it was lost"), 503, "proposer_lost", "1"),
    "a bug": (ZeroDivisionError("/home/secret"), 500, "internal", None),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", FAILURES)
def test_each_failure_has_its_status(tmp_path: Path, case: str, streamed: bool) -> None:
    error, status, code, wait = FAILURES[case]
    found, headers, reply = with_http(
        tmp_path, Broken(error), lambda url: ask(url, stream=streamed)
    )
    assert (found, reply["error"]["code"], headers["retry-after"]) == (status, code, wait)
    assert "secret" not in json.dumps(reply)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
def test_a_bug_is_logged_without_its_text(
    tmp_path: Path, streamed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of a library may quote the prompt; where it came from must be in the log."""
    broken = Broken(ZeroDivisionError(f"cannot divide {PROMPT}"))
    status, _, _ = with_http(tmp_path, broken, lambda url: ask(url, stream=streamed))
    assert status == 500 and PROMPT not in caplog.text
    assert "unexpected ZeroDivisionError" in caplog.text and "raise self.error" in caplog.text


def test_a_client_does_not_choose_its_host(tmp_path: Path) -> None:
    """A header named another one, with a quota of its own, whatever proxies the server believes."""

    def work(url: str) -> None:
        given = json.dumps({"model": "bundled:greedy", "prompt": "a", "stream": True}).encode()
        held = HTTPConnection(url.removeprefix("http://"), timeout=30)
        held.request("POST", "/v1/completions", given, {**JSON, "x-forwarded-for": "10.0.0.1"})
        held.getresponse().read(10)
        headers = {"x-forwarded-for": "10.0.0.2", "forwarded": "for=10.0.0.2"}
        status, _, reply = post(url, "/v1/completions", given, {**JSON, **headers})
        assert status == 429 and "at once" in reply["error"]["message"]
        held.close()

    limit = {"gateway.max_requests_per_client": 1}
    with_http(tmp_path, proposer_service(slow_slm()), work, **limit)


def test_a_stream_that_breaks_says_so(tmp_path: Path) -> None:
    """The status was sent: the last event is the error, and no end is pretended."""

    def work(url: str) -> str:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="a", max_retries=0) as client:
            given: Any = {"model": "bundled", "messages": [{"role": "user", "content": "a"}]}
            text = ""
            with pytest.raises(openai.APIError, match="no LLM"):
                for chunk in client.chat.completions.create(**given, stream=True):
                    text += chunk.choices[0].delta.content or ""
            return text

    broken = Broken(SelectorUnavailableError("no LLM"), "some text")
    assert with_http(tmp_path, broken, work) == "some text"
