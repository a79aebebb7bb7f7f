"""The gateway's servers: gRPC (generation, administration, health, reflection) and HTTP beside it;
and the label drain.

Knows gRPC; no Ray. Serve's own gRPC proxy would not do: it has no TLS, no authentication, no
grpc.health.v1, and turns a dead replica into INTERNAL.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from s2t_shared.config import Config
from s2t_shared.labels.drain import Drain
from s2t_shared.pb.v1 import admin_pb2_grpc, generation_pb2_grpc
from services.http.server import HttpServer
from services.metrics.registry import Reading, Registry
from services.metrics.table import Role
from services.rpc import channels
from services.rpc.tokens import Tokens
from services.serve.admin_servicer import AdminServicer
from services.serve.gateway_health import ADMIN, GENERATION, GatewayHealth
from services.serve.generation_servicer import GenerationServicer, Proposers
from services.serve.http_door import HttpDoor
from services.serve.intake import Intake
from services.serve.recorded_proposers import RecordedProposers
from services.serve.request_meter import MeteredProposers, RequestMeter
from services.serve.resuming_proposers import ResumingProposers


class GatewayServer:
    """Servers on the configured host and ports. Created, started and stopped on one loop."""

    def __init__(
        self, config: Config, proposers: Proposers, admin: AdminServicer, drain: Drain | None = None
    ) -> None:
        """Listen, but answer nothing yet.

        Raises:
            ConfigError: the port is taken, or a security file cannot be used.
        """
        self.registry = Registry(Role.GATEWAY)
        self.registry.add(self._readings)
        self._is_draining = False
        meter = RequestMeter(self.registry)
        resuming = ResumingProposers(proposers, config.gateway.max_resumes)
        self._resuming = resuming
        proposers = RecordedProposers(MeteredProposers(resuming, meter))
        self._proposers = proposers
        self._drain = drain
        self._health = GatewayHealth(proposers)
        self._gateway = gateway = config.gateway
        server = channels.new_server(
            config.security,
            gateway.max_message_bytes,
            channels.ConnectionLimits(
                max_streams=gateway.max_concurrent_streams,
                max_idle_s=gateway.max_connection_idle_s,
                max_age_s=gateway.max_connection_age_s,
                max_age_grace_s=gateway.max_connection_age_grace_s,
            ),
            on_refusal=meter.refused,
        )
        intake = Intake(config, meter.refused)
        generation = GenerationServicer(config, proposers, intake)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
        self._health.add_to(server)
        reflected = (GENERATION, ADMIN, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(reflected, server)
        self.port = channels.bind(
            server, gateway.host, gateway.port, config.security, "gateway.port"
        )
        self._server = server
        self._http: HttpServer | None = None
        if gateway.http:
            token_file = config.security.token_file
            tokens = Tokens(token_file) if token_file is not None else None
            door = HttpDoor(intake, proposers, admin, tokens, self._health)
            self._http = HttpServer(config, door)

    @property
    def url(self) -> str:
        """Where HTTP is served, "" for nowhere."""
        return self._http.url if self._http is not None else ""

    def _readings(self) -> Iterator[Reading]:
        yield Reading("s2t_ready", self._health.serves)
        yield Reading("s2t_draining", self._is_draining)
        yield Reading("s2t_handovers_total", self._resuming.handovers)

    async def start(self) -> None:
        """Answer calls, as soon as a proposer answers us."""
        if self._drain is not None:
            self._drain.start()
        await self._proposers.describe()
        await self._server.start()
        if self._http is not None:
            await self._http.start()
        await self._health.start()

    async def stop(self, grace_s: float | None = None) -> None:
        """Say NOT_SERVING, and after a lag send clients elsewhere (GOAWAY); let calls under way
        finish, at most for `grace_s` seconds; write labels.

        grace_s: None for the configured lag and grace; else there is no lag.
        """
        self._is_draining = True
        await self._health.stop()
        if self._http is not None:
            self._http.end_readiness()
        if grace_s is None:
            await asyncio.sleep(self._gateway.drain_lag_s)
            grace_s = self._gateway.drain_grace_s
        await self._health.end_watches()
        stopping = [self._server.stop(grace_s)]
        if self._http is not None:
            stopping.append(self._http.stop(grace_s))
        await asyncio.gather(*stopping)
        if self._drain is not None:
            self._drain.stop()
