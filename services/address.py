"""Where a server is, as `--server` and Client take it. Imports nothing: the command's help shows the default."""

import re

DEFAULT_PORT = 9000
DEFAULT_ADDRESS = f"127.0.0.1:{DEFAULT_PORT}"

_HOST = r"(?:\[[^\]\s]+\]|[^\s:/,\[\]]+)"  # an IPv6 address stands in brackets
_PLAIN = re.compile(rf"{_HOST}:\d+")
_TLS = re.compile(rf"https://({_HOST})(:\d+)?/?")
_RESOLVED = re.compile(r"(?:dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):\S+")  # gRPC's own names, several hosts at once


def target_of(address: str) -> tuple[str, bool]:
    """What gRPC calls it, and whether it is reached by TLS. Raises ValueError for what would be reached nowhere."""
    if tls := _TLS.fullmatch(address):
        return tls[1] + (tls[2] or ":443"), True
    if not (_PLAIN.fullmatch(address) or _RESOLVED.fullmatch(address)):
        raise ValueError(f"address={address!r}: write HOST:PORT, or https://HOST for TLS")
    return address, False
