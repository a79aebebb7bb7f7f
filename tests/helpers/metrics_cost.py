"""What metrics cost: the same streams by gRPC from a service that counts and from one that does
not, in turns.

    python -m tests.helpers.metrics_cost [--batch 16] [--tokens 64] [--rounds 60]

Both services are in one process, without Ray, each with a gateway and the bundled pair, which
decodes so fast that counting weighs as much as it ever can; the client is another process. The one
that counts has endpoints, and they are read every second while it answers: fifteen times as often
as Prometheus does by default.
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
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from pathlib import Path

from s2t_shared.config import MetricsConfig, SecurityConfig
from services.metrics.endpoint import MetricsEndpoint
from services.serve.gateway_server import GatewayServer
from services.serve.proposer_service import ProposerService
from tests.helpers.http_load import bundled_service, by_grpc, gathered
from tests.helpers.serving import gateway_config, gateway_server

SIDES = ("off", "on")
SCRAPE_S = 1.0


def serve(commands: Connection) -> None:
    """Run both services. Each side's name that comes is the one to be scraped or not, and is
    answered with the CPU seconds so far; None ends."""
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
                commands.send(time.process_time())

    asyncio.run(main())
    for service in services.values():
        service.close()


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
    given = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs,), daemon=True)
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
