"""Who a server without keys answers: this machine alone."""

from urllib.parse import urlsplit


def is_loopback(host: bytes) -> bool:
    """Whether a request's Host header names this machine as itself. Any other name may be that of a web page which has it
    point here."""
    try:
        return urlsplit(f"//{host.decode('latin-1')}").hostname in ("localhost", "127.0.0.1", "::1")
    except ValueError:
        return False
