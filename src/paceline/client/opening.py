"""Opening a session on a server: offers, the server's choice, and the client's end of the channel."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from paceline.client.calls import ServerCalls
from paceline.config.placement import PoolConfig, TransportConfig
from paceline.errors import HandshakeError, PacelineError, ServerLostError, TransportError
from paceline.schema.features import FeatureSpec
from paceline.schema.protocol import (
    PROTOCOL_VERSION,
    ServerInfo,
    SessionReply,
    SessionRequest,
    SpecMessage,
    TransportName,
)
from paceline.transport.base import RemoteReceiver
from paceline.transport.buffers import HostBuffers
from paceline.transport.negotiation import Prepare, TransportRefused, client_offers, host_facts
from paceline.transport.receiving import ClientSide, ReceiverOffer, receiver_offers

_LONGEST_LABEL = 128
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class OpenSession:
    """An open session, and the client's end of its channel."""

    reply: SessionReply
    receiver: RemoteReceiver


class SessionOpener:
    """Opens sessions on one server, one after the other."""

    def __init__(
        self,
        calls: ServerCalls,
        transport: TransportConfig,
        pool: PoolConfig,
        device: torch.device,
        label: str,
        buffers: HostBuffers,
    ) -> None:
        """`device` is the trainer's; `label` says who asks; `buffers` are host memory for rows."""
        self._calls = calls
        self._transport = transport
        self._pool = pool
        self._device = device
        self._label = label[:_LONGEST_LABEL]
        self._buffers = buffers

    def open(self, server: ServerInfo, specs: Mapping[str, FeatureSpec], group: str | None = None) -> OpenSession:
        """A new session, of `group` if there is one, with the best transport that works.

        Raises:
            HandshakeError: another target is served there now, or no transport works.
            PacelineError: what the server says instead.
        """
        failed: dict[TransportName, str] = {}
        while True:
            try:
                return self._try(server, specs, group, failed)
            except _CannotOpenError as error:
                if self._transport.kind != "auto":
                    raise error.reason from None
                failed[error.transport] = str(error.reason)

    def _try(
        self,
        server: ServerInfo,
        specs: Mapping[str, FeatureSpec],
        group: str | None,
        failed: Mapping[TransportName, str],
    ) -> OpenSession:
        """A new session; what `failed` before is not offered again."""
        client = host_facts(self._device)
        side = ClientSide(self._transport, self._device, self._buffers, client, server.host, self._calls.url)
        offers = receiver_offers(side)
        try:
            prepare = {name: _prepare(offer, failed.get(name)) for name, offer in offers.items()}
            offered = client_offers(self._transport.kind, client, server, prepare)
            reply = self._calls.open_session(
                SessionRequest(
                    protocol=PROTOCOL_VERSION,
                    specs={name: SpecMessage.of(spec) for name, spec in specs.items()},
                    target=server.target,
                    client=client,
                    offers=offered.offers,
                    lease_s=self._pool.lease_s,
                    label=self._label,
                    group=group,
                )
            )
            receiver = self._open_receiver(offers, reply, {offer.name for offer in offered.offers})
        finally:
            for offer in offers.values():
                offer.withdraw()
        offered.report(self._calls.url, reply)
        return OpenSession(reply, receiver)

    def _open_receiver(
        self, offers: Mapping[TransportName, ReceiverOffer], reply: SessionReply, offered: set[TransportName]
    ) -> RemoteReceiver:
        if reply.transport not in offered:
            raise HandshakeError(
                f"{self._calls.url} chose transport {reply.transport!r}, {sorted(offered)} were offered"
            )
        try:
            return offers[reply.transport].open(reply.parameters, lambda call: self._calls.store(reply, call))
        except BaseException as error:
            try:
                self._calls.end(reply)
            except PacelineError as failure:
                _logger.info(
                    "%s was not told that a session is over, its lease will end it: %s", self._calls.url, failure
                )
            if isinstance(error, TransportError | TransportRefused) and not isinstance(error, ServerLostError):
                raise _CannotOpenError(reply.transport, error) from error
            raise


class _CannotOpenError(Exception):
    """A server took an offer, and yet the channel could not be made."""

    def __init__(self, transport: TransportName, reason: PacelineError) -> None:
        super().__init__(transport, reason)
        self.transport: TransportName = transport
        self.reason = reason


def _prepare(offer: ReceiverOffer, failure: str | None) -> Prepare:
    """What makes the parameters of an offer that has not failed before."""

    def refuse() -> Mapping[str, str]:
        raise TransportRefused(failure or "")

    return offer.prepare if failure is None else refuse
