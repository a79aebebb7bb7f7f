"""OpenAI's own client, sync and async, against a real gateway over a scripted pair."""

from __future__ import annotations

import asyncio
import itertools
import math
from pathlib import Path
from typing import Any

import openai
import pytest

from s2t_shared.decode.scripted import ScriptedSelector
from s2t_shared.types import Mode
from tests.helpers.serving import (
    LLM_TEXT,
    SLM_TEXT,
    FixedVersions,
    local_selector,
    proposer_service,
    scripted_slm,
    with_http,
)

MESSAGES: Any = [{"role": "user", "content": "a prompt"}]
ALWAYS_UNSURE = {"threshold": 0.3}


def client(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, **options)


def chat(url: str, s2t: dict[str, Any] | None = None, **fields: Any) -> Any:
    """One call of chat.completions."""
    given: Any = {"model": "bundled", "messages": MESSAGES, **fields}
    with client(url) as opened:
        settings = ALWAYS_UNSURE if s2t is None else s2t
        return opened.chat.completions.create(**given, extra_body={"s2t": settings})


def test_models_are_the_model_and_its_modes(tmp_path: Path) -> None:
    def work(url: str) -> None:
        with client(url) as opened:
            names = [model.id for model in opened.models.list()]
            assert names == ["mini", *(f"mini:{mode.value}" for mode in Mode)]
            assert opened.models.retrieve("mini:s2t_local").id == "mini:s2t_local"
            with pytest.raises(openai.NotFoundError, match="gpt-9"):
                opened.models.retrieve("gpt-9")

    with_http(tmp_path, proposer_service(), work, **{"gateway.served_model_name": "mini"})


def test_a_chat_answer(tmp_path: Path) -> None:
    reply = with_http(tmp_path, proposer_service(), chat)
    [choice] = reply.choices
    assert choice.message.role == "assistant" and choice.message.content == LLM_TEXT
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (2, 9, 11)
    assert choice.s2t["mode"] == "s2t" and choice.s2t["usage"]["flips"] == 2


@pytest.mark.parametrize("way", ["name", "field"])
def test_the_mode_comes_with_the_name_or_the_field(tmp_path: Path, way: str) -> None:
    """A name that is read as no mode would answer in the deployment's."""
    versions = FixedVersions(live=local_selector("v1"))

    def work(url: str) -> Any:
        if way == "name":
            return chat(url, model="bundled:s2t_local")
        return chat(url, {"mode": "s2t_local", "threshold": 0.3})

    [choice] = with_http(tmp_path, proposer_service(versions=versions), work).choices
    assert choice.s2t["mode"] == "s2t_local"
    assert choice.s2t["versions"]["local_selector"] == "v1"
    assert choice.s2t["usage"]["llm_forwards"] == 0


def test_a_stream_is_the_answer_in_pieces(tmp_path: Path) -> None:
    """One role, texts that join to the answer, one end, and the usage of the whole."""

    def work(url: str) -> list[Any]:
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        with client(url) as opened:
            given: Any = {"model": "bundled", "messages": MESSAGES, **options}
            return list(opened.chat.completions.create(**given, extra_body={"s2t": ALWAYS_UNSURE}))

    *chunks, last = with_http(tmp_path, proposer_service(), work)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == LLM_TEXT
    assert [delta.role for delta in deltas if delta.role] == ["assistant"] == [deltas[0].role]
    ends = [chunk.choices[0].finish_reason for chunk in chunks]
    assert ends[-1] == "stop" and not any(ends[:-1])
    assert last.choices == [] and last.usage.total_tokens == 11
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert not any(hasattr(chunk, "s2t") for chunk in chunks[:-1])


def test_chunks_say_where_the_answer_diverged(tmp_path: Path) -> None:
    """Each divergence once, at its place in the text, with what both models thought."""

    def work(url: str) -> list[Any]:
        with client(url) as opened:
            given: Any = {"model": "bundled", "messages": MESSAGES, "stream": True}
            steps = {"s2t": {**ALWAYS_UNSURE, "steps": True}}
            return list(opened.chat.completions.create(**given, extra_body=steps))

    chunks = with_http(tmp_path, proposer_service(), work)
    found = [divergence for chunk in chunks for divergence in chunk.s2t["divergences"]]
    assert [d["index"] for d in found] == [4, 6]
    for d in found:
        assert LLM_TEXT[d["offset"] :].startswith(d["text"]) and d["text"] == " other"
        assert d["chosen_by"] == "llm" and d["flipped"]
        slms, llms = d["alternatives"]
        assert slms["slm"] == llms["slm"] == pytest.approx(math.log(0.5))
        assert llms["text"] == " other" and llms["llm"] > slms["llm"]
    assert sum(chunk.s2t["tokens"] for chunk in chunks) == 9


def test_logprobs_of_a_chat(tmp_path: Path) -> None:
    reply = with_http(
        tmp_path, proposer_service(), lambda url: chat(url, logprobs=True, top_logprobs=1)
    )
    content = reply.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == LLM_TEXT
    assert [round(entry.logprob, 2) for entry in content] == [0, 0, 0, 0, -0.69, 0, -0.69, 0]
    assert all(len(entry.top_logprobs) == 1 for entry in content)
    assert content[4].top_logprobs[0].token == " five"
    assert bytes(content[4].bytes) == b" other"


def test_completions_of_several_prompts(tmp_path: Path) -> None:
    """Texts and ids; n of each, in order, each drawn on its own; a prompt counts once."""

    def work(url: str) -> Any:
        with client(url) as opened:
            return opened.completions.create(
                model="bundled:sample", prompt=[[5, 6, 7], [8]], n=2, max_tokens=3, logprobs=1
            )

    reply = with_http(tmp_path, proposer_service(), work)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in reply.choices} == {"length"}
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (4, 12)
    logprobs = reply.choices[3].logprobs
    assert logprobs.tokens == [" one", " two", " three"] and logprobs.text_offset == [0, 4, 8]
    assert logprobs.top_logprobs[1] == {" two": 0.0}


def test_streamed_completions_of_several_choices(tmp_path: Path) -> None:
    def work(url: str) -> list[Any]:
        with client(url) as opened:
            stream = opened.completions.create(
                model="bundled:sample", prompt=["a", "b"], n=2, stream=True
            )
            return list(stream)

    texts = dict.fromkeys(range(4), "")
    for chunk in with_http(tmp_path, proposer_service(), work):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert set(texts.values()) == {SLM_TEXT}


def test_echo_and_stop(tmp_path: Path) -> None:
    def work(url: str) -> Any:
        with client(url) as opened:
            return opened.completions.create(
                model="bundled:greedy", prompt="a prompt:", echo=True, stop=[" four"]
            )

    [choice] = with_http(tmp_path, proposer_service(), work).choices
    assert choice.text == "a prompt: one two three" and choice.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_but_the_prompt(tmp_path: Path, stream: bool) -> None:
    """`max_tokens` 0 with `echo`, as programs score texts that know OpenAI's first models."""

    def work(url: str) -> list[Any]:
        with client(url) as opened:
            reply = opened.completions.create(
                model="bundled:greedy",
                prompt="one of two",
                echo=True,
                logprobs=1,
                max_tokens=0,
                stream=stream,
            )
            return list(reply) if stream else [reply]

    replies = with_http(tmp_path, proposer_service(), work)
    choices = [choice for reply in replies for choice in reply.choices]
    assert "".join(choice.text for choice in choices).strip() == "one of two"
    assert sum(len(choice.logprobs.tokens) for choice in choices) == 3
    assert choices[-1].finish_reason == "length"
    assert stream or replies[0].usage.completion_tokens == 0


@pytest.mark.parametrize("prompt", ["one of two", ["one of two", "four five"]])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_tells_the_prompts_tokens(
    tmp_path: Path, prompt: Any, stream: bool
) -> None:
    """As clients count that compare log-likelihoods: a place for each token of the prompt, and for
    each of the answer, also for one without text."""

    def work(url: str) -> list[Any]:
        with client(url) as opened:
            reply = opened.completions.create(
                model="bundled:greedy",
                prompt=prompt,
                echo=True,
                logprobs=2,
                max_tokens=1,
                stream=stream,
            )
            return list(reply) if stream else [reply]

    lengths = [3] if isinstance(prompt, str) else [3, 2]
    texts = dict.fromkeys(range(len(lengths)), "")
    tokens: dict[int, list[str]] = {i: [] for i in texts}
    values: dict[int, list[float | None]] = {i: [] for i in texts}
    offsets: dict[int, list[int]] = {i: [] for i in texts}
    for reply in with_http(tmp_path, proposer_service(), work):
        for choice in reply.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            values[choice.index] += choice.logprobs.token_logprobs
            offsets[choice.index] += choice.logprobs.text_offset
    for index, length in enumerate(lengths):
        assert len(tokens[index]) == len(values[index]) == length + 1
        first, *rest = values[index]
        assert first is None and rest[: length - 1] == [pytest.approx(-math.log(2))] * (length - 1)
        assert texts[index] == "".join(tokens[index])
        starts = [0, *itertools.accumulate(map(len, tokens[index][:-1]))]
        assert offsets[index] == starts


def test_content_in_parts_and_what_a_client_sends_back(tmp_path: Path) -> None:
    """The client's own message objects have keys beside role and content; they are empty."""

    def work(url: str) -> Any:
        first = chat(url)
        parts: Any = [{"type": "text", "text": "and "}, {"type": "text", "text": "now?"}]
        messages: Any = [
            {"role": "developer", "content": "be short"},
            *MESSAGES,
            first.choices[0].message,
            {"role": "user", "content": parts},
        ]
        return chat(url, messages=messages)

    reply = with_http(tmp_path, proposer_service(), work)
    assert reply.usage.prompt_tokens == 2 + 2 + 8 + 2


def test_a_lost_llm_degrades_the_answer(tmp_path: Path) -> None:
    service = proposer_service(scripted_slm(), ScriptedSelector(available=False))
    [choice] = with_http(tmp_path, service, chat).choices
    assert choice.message.content == SLM_TEXT and choice.s2t["usage"]["degraded_steps"] == 2


def test_the_async_client(tmp_path: Path) -> None:
    """Whole and streamed, many at once."""

    async def ask(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as opened:
            given: Any = {"model": "bundled", "messages": MESSAGES}
            extra: Any = {"extra_body": {"s2t": ALWAYS_UNSURE}}

            async def whole() -> str:
                reply = await opened.chat.completions.create(**given, **extra)
                return reply.choices[0].message.content or ""

            async def streamed() -> str:
                chunks = await opened.chat.completions.create(**given, **extra, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in chunks])

            return await asyncio.gather(*(ask() for ask in (whole, streamed) for _ in range(8)))

    texts = with_http(tmp_path, proposer_service(), lambda url: asyncio.run(ask(url)))
    assert texts == [LLM_TEXT] * 16
