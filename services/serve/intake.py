"""What a gateway does with a client's message before a proposer gets it, whatever it came by: the
client's quota, the limits, the deployment's defaults. Knows the wire and the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from s2t_shared.config import Config
from s2t_shared.errors import DeadlineExceededError
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.requests import check_request
from s2t_shared.types import GenerateRequest
from services.rpc import call_record, wire
from services.serve.client_quota import ClientQuota, digest_of
from services.serve.request_limits import RequestLimits


class Intake:
    """One for a gateway, so that a client's requests count together on all its transports.

    refused: called with each error that a client is told.
    """

    def __init__(
        self, config: Config, refused: Callable[[Exception], None] = lambda error: None
    ) -> None:
        self.refused = refused
        self._defaults = config.defaults
        self._limits = RequestLimits(config.gateway)
        self.quota = ClientQuota(
            config.gateway.max_requests_per_client,
            tokens_are_checked=config.security.token_file is not None,
        )

    def read(
        self,
        message: pb.StreamGenerateRequest | pb.GenerateRequest,
        client: str,
        time_left_s: float | None = None,
    ) -> GenerateRequest:
        """The request of `client`, checked and complete.

        time_left_s: seconds that it still waits, where its call says so.

        Raises:
            InvalidRequestError: a field is wrong, too long or too large.
            DeadlineExceededError: it waits no longer.
        """
        call = call_record.current()
        call.client = digest_of(client)
        if time_left_s is not None and time_left_s <= 0:
            raise DeadlineExceededError("the call's deadline had passed when it arrived")
        self._limits.check(message)
        request = wire.read_request(message, self._defaults, time_left_s)
        check_request(request)
        call.mode = request.options.policy.mode.value
        return replace(
            request,
            client=client,
            request_id=message.request_id or call.request_id,
            trace=call.span.headers,
        )
