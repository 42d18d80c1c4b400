"""Python reads this file at its start when its folder is on the path: nothing then reaches another machine.

tests/conftest.py puts it there for the tests and for every process that they start, the notebooks' kernels
among them.
"""

import sys

LOCAL = ("", "localhost", "127.", "::1")


def refuse(event: str, arguments: tuple) -> None:
    """Audit hook: an attempt to connect to another machine, or to look one up, is an error."""
    if event == "socket.connect":
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else ""  # else the path of a local socket
    elif event == "socket.getaddrinfo":
        host = arguments[0] or ""
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in LOCAL and not host.startswith("127."):
        raise PermissionError(f"a test must not use the network: {event} {host!r}")


sys.addaudithook(refuse)
