"""Builds what a gateway runs, from the configuration. Without torch: a gateway that died is back in
the time that its imports take."""

from __future__ import annotations

from functools import partial

from s2t_shared.config import Config
from s2t_shared.labels.drain import Drain
from s2t_shared.labels.known_models import KnownModels
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.object_lake import open_lake
from s2t_shared.labels.stream import LabelStream
from s2t_shared.redis_url import RedisRole, url_of
from s2t_shared.versions.live import LiveVersions
from services.serve.admin_servicer import AdminServicer
from services.serve.gateway_server import GatewayServer
from services.serve.generation_servicer import Proposers
from services.serve.request_meter import label_store_readings


def gateway_server(config: Config, proposers: Proposers) -> GatewayServer:
    """The gateway's server, listening but not started.

    Raises:
        ConfigError: its address cannot be used.
    """
    lake = open_lake(config.lake)
    stream = _stream(config)
    drain = label_drain(config, stream, lake) if stream is not None else None
    admin = AdminServicer(
        versions=LiveVersions(config.versions),
        lake=lake,
        proposers=proposers,
        stream=stream,
        drain=drain,
    )
    server = GatewayServer(config, proposers, admin, drain)
    if stream is not None:
        server.registry.add(partial(label_store_readings, stream))
    return server


def _stream(config: Config) -> LabelStream | None:
    if not config.redis.url:
        return None
    return LabelStream(url_of(RedisRole.CONSUMER, config.redis.url, config.redis.password_dir))


def label_drain(config: Config, stream: LabelStream, lake: Lake) -> Drain:
    labels = config.labels
    return Drain(
        stream,
        lake,
        shard_rows=labels.shard_rows,
        shard_age_s=labels.shard_age_s,
        max_age_days=labels.max_age_days,
        max_gib=labels.max_gib,
        dead_letter_days=labels.dead_letter_days,
        known=KnownModels(config.known_models),
    )
