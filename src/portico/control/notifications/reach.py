"""Which addresses of customers are called, as the settings have it."""

from __future__ import annotations

import ipaddress
import ssl

from portico.errors import Problem
from portico.kit.outbound import Client, Limits
from portico.settings import ApiSettings


def limits_of(settings: ApiSettings) -> Limits:
    """What calls to customers' addresses may take; raises ``config.invalid``."""
    try:
        allow = tuple(ipaddress.ip_network(text, strict=False) for text in settings.outbound_allow)
    except ValueError as err:
        raise Problem("config.invalid", f"setting outbound_allow: {err}", key="outbound_allow") from None
    return Limits(
        timeout_seconds=settings.outbound_timeout_seconds,
        ports=settings.outbound_ports,
        http=settings.outbound_http,
        allow=allow,
    )


def client_of(settings: ApiSettings) -> Client:
    """The client for them; raises ``config.invalid``."""
    try:
        context = ssl.create_default_context(cafile=settings.outbound_ca_file)
    except (OSError, ssl.SSLError) as err:
        raise Problem("config.invalid", f"setting outbound_ca_file: {err}", key="outbound_ca_file") from None
    return Client(limits_of(settings), context=context)
