"""OpenTelemetry traces through real loopback gRPC: client, gateway, proposer, selector, labels."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from s2t_shared.config import SecurityConfig, SelectorConfig, TracesConfig
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.decode.llm_selector import PendingQuery, always
from s2t_shared.errors import ConfigError
from s2t_shared.requests import new_request
from s2t_shared.types import LabelOptions, PositionScores, ScoreQuery, ScoreReply
from services.client import Client
from services.rpc import tracing
from services.serve.engine_thread import EngineThread
from services.serve.label_recorder import LabelRecorder
from services.serve.proposer_service import ProposerService
from services.serve.remote_selector import RemoteSelector
from services.serve.selector_server import SelectorServer
from services.serve.selector_thread import SelectorThread
from services.serve.traced_selector import traced
from tests.helpers.serving import (
    CALIBRATION,
    FixedVersions,
    gateway_config,
    gateway_server,
    http_gateway,
    proposer_service,
    scripted_slm,
)

PROMPT = "canary-7f3a"


@pytest.fixture
def spans() -> Iterator[Callable[[], Sequence[ReadableSpan]]]:
    """Traces are on in this process; gives the spans that have ended."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    yield exporter.get_finished_spans
    tracing.use(None)


class WillingLLM:
    """Answers all waiting queries in one forward; likes the SLM's first candidate best."""

    def __init__(self, tokenizer_digest: str, eos_ids: frozenset[int]) -> None:
        self.info = LLMInfo("llm", tokenizer_digest, eos_ids, 500)
        self._pending: list[PendingQuery] = []

    def check(self, query: ScoreQuery) -> None:
        pass

    def add(self, query: ScoreQuery, is_wanted: Callable[[], bool] = always) -> PendingQuery:
        self._pending.append(PendingQuery(query, is_wanted))
        return self._pending[-1]

    @property
    def idle(self) -> bool:
        return not self._pending

    def step(self) -> list[tuple[PendingQuery, ScoreReply]]:
        answered, self._pending = self._pending, []
        return [(pending, _reply(pending.query)) for pending in answered]


def _reply(query: ScoreQuery) -> ScoreReply:
    scores = [
        PositionScores(tuple(-1.0 - n for n in range(len(ids))), 7) for ids in query.candidate_ids
    ]
    return ScoreReply(tuple(scores), "llm")


class WillingWriter:
    """A label writer whose Redis confirms at once."""

    writes_to_redis = True

    def write(self, rollouts: Sequence[Any]) -> Future[None]:
        stored: Future[None] = Future()
        stored.set_result(None)
        return stored

    def close(self) -> None:
        pass


async def whole_service() -> tuple[ProposerService, SelectorServer, RemoteSelector]:
    """A proposer whose LLM is behind a server of its own."""
    slm = scripted_slm()
    tokenizer = slm.tokenizer
    llm = WillingLLM(tokenizer.digest, slm.info.eos_ids)
    server = SelectorServer(
        SelectorThread(llm),  # type: ignore[arg-type]
        SecurityConfig(),
        SelectorConfig(),
        quiet_s=0.0,
    )
    await server.start()

    async def addresses() -> list[str]:
        return [f"127.0.0.1:{server.port}"]

    nobody = LLMInfo("", "", slm.info.eos_ids, 500)
    remote = RemoteSelector(addresses, SecurityConfig(), tokenizer.digest, nobody)
    await remote.wait_until_reachable(10)
    service = ProposerService(
        engine=EngineThread(Engine(slm, traced(remote)), tokenizer),
        tokenizer=tokenizer,
        selector=remote,
        versions=FixedVersions(),
        labels=LabelRecorder(WillingWriter()),  # type: ignore[arg-type]
        calibration=lambda: CALIBRATION,
    )
    return service, server, remote


def ask(address: str) -> None:
    """As a program does that traces itself."""
    provider = TracerProvider()
    with trace.use_span(provider.get_tracer("program").start_span("program")) as own:
        with Client(address, timeout_s=20) as client:
            labels = LabelOptions(store=True)
            pieces = list(client.stream(PROMPT, mode="s2t", threshold=0.3, labels=labels))
            assert pieces[-1].answer.usage.triggers == 2
    global _program
    _program = own.get_span_context()


_program: Any = None


def named(found: Sequence[ReadableSpan], name: str) -> list[ReadableSpan]:
    return [span for span in found if span.name == name]


def parents(found: Sequence[ReadableSpan], name: str) -> set[str]:
    """Names of what spans of this name are below."""
    names = {span.context.span_id: span.name for span in found}
    names[_program.span_id] = "program"
    return {names[span.parent.span_id] for span in named(found, name)}


def test_one_request_is_one_tree(
    tmp_path: Path, spans: Callable[[], Sequence[ReadableSpan]]
) -> None:
    """Any hop that drops or restarts the trace leaves a second root."""

    async def main() -> None:
        service, server, remote = await whole_service()
        try:
            async with gateway_server(gateway_config(tmp_path), service) as gateway:
                await asyncio.to_thread(ask, f"127.0.0.1:{gateway.port}")
        finally:
            service.close()
            await remote.close()
            await server.stop()

    asyncio.run(main())
    trace_id = _program.trace_id
    found = [span for span in spans() if span.context.trace_id == trace_id]
    above = {
        "s2t.v1.GenerationService/StreamGenerate": "program",
        "proposer.generate": "s2t.v1.GenerationService/StreamGenerate",
        "queue": "proposer.generate",
        "prefill": "proposer.generate",
        "decode": "proposer.generate",
        "selector.score": "proposer.generate",
        "s2t.v1.SelectionService/Score": "selector.score",
        "llm.forward": "s2t.v1.SelectionService/Score",
        "labels.append": "proposer.generate",
    }
    assert {span.name: parents(found, span.name) for span in found} == {
        name: {parent} for name, parent in above.items()
    }
    assert len(named(found, "selector.score")) == len(named(found, "llm.forward")) == 2
    [generate] = named(found, "proposer.generate")
    for phase in ("queue", "prefill", "decode"):
        [part] = named(found, phase)
        assert generate.start_time - 2e6 <= part.start_time <= part.end_time
        assert part.end_time <= generate.end_time + 2e6
    said = json.dumps([json.loads(span.to_json()) for span in spans()])
    assert PROMPT not in said and "three" not in said
    assert '"s2t.triggers": 2' in said and '"s2t.place": "redis"' in said


def test_http_continues_its_callers_trace(
    tmp_path: Path, spans: Callable[[], Sequence[ReadableSpan]]
) -> None:
    """A page's or a proxy's trace ended at our door."""
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {
        "content-type": "application/json",
        "traceparent": f"00-{trace_id}-00f067aa0ba902b7-01",
        "tracestate": "vendor=1",
    }
    body = {"model": "bundled:greedy", "prompt": PROMPT, "max_tokens": 4}
    with http_gateway(tmp_path, proposer_service()) as url:
        asked = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
        urllib.request.urlopen(asked, timeout=20).read()
    [call] = named(spans(), "POST /v1/completions")
    [generate] = named(spans(), "proposer.generate")
    assert f"{call.context.trace_id:032x}" == f"{generate.context.trace_id:032x}" == trace_id
    assert generate.context.trace_state["vendor"] == "1"
    assert call.attributes is not None and call.attributes["s2t.status"] == "200"


def test_what_belongs_to_no_request_begins_no_trace(
    spans: Callable[[], Sequence[ReadableSpan]],
) -> None:
    """A calibration filled the collector with a thousand traces of one query."""

    async def main() -> None:
        service, server, remote = await whole_service()
        query = ScoreQuery(token_ids=(1,), positions=(0,), candidate_ids=((4,),))
        [reply] = traced(remote).submit([query])
        await asyncio.wrap_future(reply)
        service.close()
        await remote.close()
        await server.stop()

    asyncio.run(main())
    assert spans() == ()


def test_a_forward_for_several_queries_links_them(
    spans: Callable[[], Sequence[ReadableSpan]],
) -> None:
    """A batch belongs to all its queries, and has one parent only."""
    llm = WillingLLM("tok", frozenset())
    calls = [tracing.start("call") for _ in range(3)]
    thread = SelectorThread(llm)  # type: ignore[arg-type]
    queued = [_queued(span) for span in calls]
    for one in queued:
        thread._add(one)
    thread._turn()
    thread.shutdown()
    [forward] = named(spans(), "llm.forward")
    assert len(forward.links) == 2
    assert forward.attributes is not None and forward.attributes["s2t.queries"] == 3


def _queued(span: tracing.Span) -> Any:
    from services.serve.selector_thread import QueuedQuery

    loop = asyncio.new_event_loop()
    query = ScoreQuery(token_ids=(1,), positions=(0,), candidate_ids=((4,),))
    queued = QueuedQuery(query, loop.create_future(), loop, None, span)
    loop.close()
    return queued


def test_a_failed_answer_is_a_failed_span(spans: Callable[[], Sequence[ReadableSpan]]) -> None:
    """Errors looked like answers."""
    service = proposer_service()

    async def main() -> None:
        request = new_request(PROMPT, "s2t_local", threshold=0.3, request_id="x")
        with pytest.raises(Exception, match="no local selector"):
            await service.answer(replace(request))

    try:
        asyncio.run(main())
    finally:
        service.close()
    [generate] = named(spans(), "proposer.generate")
    assert not generate.status.is_ok
    assert generate.status.description == "VersionNotFoundError"


def test_settings_and_environment_decide_where_spans_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler or a service's name from the environment was overridden."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    made: list[Any] = []
    monkeypatch.setattr(tracing, "use", made.append)
    endpoint = "http://127.0.0.1:1"
    tracing.begin(TracesConfig(enabled=True, endpoint=endpoint), "gateway")
    tracing.begin(TracesConfig(enabled=True, endpoint=endpoint, sample_ratio=0.25), "gateway")
    tracing.begin(TracesConfig(endpoint=endpoint), "gateway")
    env, settings = made
    assert env.resource.attributes["service.name"] == "ours"
    assert env.resource.attributes["s2t.role"] == "gateway"
    assert "AlwaysOff" in env.sampler.get_description()
    assert "0.25" in settings.sampler.get_description()
    for provider in made:
        provider.shutdown()


def test_traces_without_their_packages_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An import error of ours told an operator nothing."""
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match="pip install 's2t"):
        tracing.begin(TracesConfig(enabled=True), "gateway")


def test_nothing_is_imported_while_traces_are_off(tmp_path: Path) -> None:
    """Off must cost nothing. (Redis's own client imports the packages of metrics.)"""
    script = f"""
import sys
from pathlib import Path
from services.client import Client
from tests.helpers.serving import proposer_service, with_gateway
def work(address):
    with Client(address, timeout_s=20) as client:
        return client.generate("x", mode="s2t", threshold=0.3).text
assert with_gateway(Path({str(tmp_path)!r}), proposer_service(), work)
ours = ("opentelemetry.exporter", "opentelemetry.sdk.trace", "opentelemetry.trace.propagation.t")
assert not [name for name in sys.modules if name.startswith(ours)]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
