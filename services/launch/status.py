"""`s2t status`: what runs, what it waits for, and what the gateway says of itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from ray import serve

from s2t_shared.config import Config
from s2t_shared.errors import S2TError
from services.client import Client
from services.launch.ray_connection import existing_ray
from services.launch.running import find_addresses, find_metrics, waits
from services.launch.service_record import read_record
from services.roles import APPLICATION
from services.rpc import channels
from services.rpc.tls import ClientTLS
from services.rpc.tokens import Role

ANSWER_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class RoleStatus:
    """Replicas of one deployment. states: how many are in which state. awaits: in words, or "".
    metrics: where Prometheus reads those of each replica."""

    states: dict[str, int]
    awaits: str = ""
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServiceStatus:
    """A service. state: Serve's, "DOWN" for none. addresses: host:port of each gateway.

    description, labels: what the gateway says, by name; error: what it does not say, and why.
    """

    state: str
    message: str = ""
    addresses: tuple[str, ...] = ()
    roles: dict[str, RoleStatus] = field(default_factory=dict)
    description: dict[str, object] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    error: str = ""


def status(config: Config) -> ServiceStatus:
    """The service on the configured data folder, or in the Ray cluster that is found."""
    record = read_record(config.data_dir)
    with existing_ray(record.ray if record else "") as found:
        application = serve.status().applications.get(APPLICATION) if found else None
        if application is None:
            return ServiceStatus("DOWN")
        waiting = waits(config)
        metrics = find_metrics()
        roles = {
            name: RoleStatus(
                {str(state): count for state, count in role.replica_states.items()},
                waiting.get(name, ""),
                tuple(metrics.get(name, ())),
            )
            for name, role in application.deployments.items()
        }
        try:
            addresses = tuple(find_addresses())
        except Exception:  # noqa: BLE001 - the border to Serve: it may raise anything here
            addresses = ()
    state = str(application.status.value)
    shown = ServiceStatus(state, application.message, addresses, roles)
    if not addresses:
        return replace(shown, error="no gateway answers")
    if "Gateway" not in roles:  # selectors alone
        return shown
    return _with_answers(shown, config)


def _client(address: str, config: Config, role: Role) -> Client:
    token = channels.read_token(config.security.token_file, role)
    tls = ClientTLS.of(config.security)
    return Client(address, token, timeout_s=ANSWER_TIMEOUT_S, tls=tls)


def _with_answers(shown: ServiceStatus, config: Config) -> ServiceStatus:
    """With what the gateway says of the service, and of its labels' way into the lake."""
    try:
        with _client(shown.addresses[0], config, Role.GENERATE) as client:
            service = client.describe()
            description: dict[str, object] = {
                "slm": service.slm_digest,
                "llm": service.llm_digest or "none yet",
                "llm_reachable": service.llm_reachable,
                "live_version": service.live_version or "none",
                "canary_version": service.canary_version or "none",
                "proposers": service.proposers,
            }
            shown = replace(shown, description=description)
        with _client(shown.addresses[0], config, Role.ADMIN) as client:
            return replace(shown, labels=asdict(client.count_labels(flush=False)))
    except S2TError as error:
        return replace(shown, error=str(error))
