"""What metrics and traces cost: the same streams by gRPC from a service that counts and from one
that does not, in turns.

    python -m tests.helpers.metrics_cost [--batch 16] [--tokens 64] [--rounds 60] [--traces]

Both services are in one process, without Ray, each with a gateway and the bundled pair, which
decodes so fast that counting weighs as much as it ever can; the client is another process. The one
that counts has endpoints, and they are read every second while it answers: fifteen times as often
as Prometheus does by default. With --traces every request of that one is sampled, and its spans are
sent to a collector, which throws them away in the client's process.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc

from s2t_shared.config import MetricsConfig, SecurityConfig
from services.metrics.endpoint import MetricsEndpoint
from services.rpc import tracing
from services.serve.gateway_server import GatewayServer
from services.serve.proposer_service import ProposerService
from tests.helpers.http_load import bundled_service, by_grpc, gathered
from tests.helpers.serving import gateway_config, gateway_server

SIDES = ("off", "on")
SCRAPE_S = 1.0


def serve(commands: Connection, collector: str) -> None:
    """Run both services. Each side's name that comes is the one to be scraped or not, and is
    answered with the CPU seconds so far; None ends.

    collector: where the spans go of the side that is on; "": it has none.
    """
    provider = provider_of(collector) if collector else None
    services = {side: bundled_service(counts=side == "on") for side in SIDES}

    async def main() -> None:
        async with AsyncExitStack() as stack:
            gateways: dict[str, GatewayServer] = {}
            for side, service in services.items():
                config = gateway_config(Path(tempfile.mkdtemp()))
                gateways[side] = await stack.enter_async_context(gateway_server(config, service))
            scraped = _start_scraping(gateways["on"], services["on"])
            commands.send({side: f"127.0.0.1:{g.port}" for side, g in gateways.items()})
            while (side := await asyncio.to_thread(commands.recv)) is not None:
                (scraped.set if side == "on" else scraped.clear)()
                tracing.use(provider if side == "on" else None)
                commands.send(time.process_time())

    asyncio.run(main())
    for service in services.values():
        service.close()


def provider_of(collector: str) -> Any:
    """As `tracing.begin` makes it."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider()
    exporter = OTLPSpanExporter(endpoint=f"http://{collector}", insecure=True)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


@contextmanager
def collecting() -> Iterator[Collected]:
    """An OTLP collector that throws away what comes."""
    collected = Collected()
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers([collected])
    collected.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collected
    finally:
        server.stop(None)


class Collected(grpc.GenericRpcHandler):  # type: ignore[misc]
    """bytes: of the spans that came."""

    address = ""
    bytes = 0

    def service(self, details: Any) -> Any:
        def export(message: bytes, context: Any) -> bytes:
            self.bytes += len(message)
            return b""

        return grpc.unary_unary_rpc_method_handler(export)


def _start_scraping(gateway: GatewayServer, service: ProposerService) -> threading.Event:
    """Reads both endpoints every second, while the event is set."""
    registries = (gateway.registry, service.registry)
    any_port = MetricsConfig(port=0)
    urls = [MetricsEndpoint(registry, any_port, SecurityConfig()).url for registry in registries]
    scraped = threading.Event()

    def scrape() -> None:
        while scraped.wait():
            for url in urls:
                urllib.request.urlopen(url).read()
            time.sleep(SCRAPE_S)

    threading.Thread(target=scrape, daemon=True).start()
    return scraped


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--traces", action="store_true")
    given = parser.parse_args()
    with collecting() as collected:
        measure(given, collected.address if given.traces else "")
        print(f"bytes of spans: {collected.bytes}")


def measure(given: argparse.Namespace, collector: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs, collector), daemon=True)
    process.start()
    addresses: dict[str, str] = ours.recv()

    def cpu(side: str) -> float:
        ours.send(side)
        return float(ours.recv())

    def turn(side: str) -> tuple[float, float]:
        """Seconds, and CPU seconds of the service, for one batch."""
        before, started = cpu(side), time.perf_counter()
        asyncio.run(gathered(given.batch, lambda i: by_grpc(addresses[side], i, given.tokens)))
        return time.perf_counter() - started, cpu(side) - before

    turns: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for number in range(-4, given.rounds):  # the first ones warm up
        for side in SIDES if number % 2 else reversed(SIDES):
            found = turn(side)
            if number >= 0:
                turns[side].append(found)
    pairs = list(zip(turns["off"], turns["on"], strict=True))
    for name, which in (("tokens per second", 0), ("tokens per CPU second of the service", 1)):
        ratios = [off[which] / on[which] for off, on in pairs]
        low, median, high = statistics.quantiles(ratios, n=4)
        print(f"{name}, on / off: {median:.3f} (quartiles {low:.3f} - {high:.3f})")
    ours.send(None)
    process.join()


if __name__ == "__main__":
    main()
