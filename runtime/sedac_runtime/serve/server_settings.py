"""What the server allows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """api_key: what requests to /v1 must present; None for no key. request_timeout: seconds from
    the arrival of a request to its last token. max_body: bytes. max_connections: at once."""

    api_key: str | None = None
    request_timeout: float = 600.0
    max_body: int = 4 * 2**20
    max_connections: int = 4096
