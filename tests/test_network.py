"""No test and no notebook uses the network: see tests/no_network/sitecustomize.py."""

import socket
import subprocess
import sys

import pytest

ELSEWHERE = "192.0.2.1"  # an address that is kept for documentation
CONNECT = f"import socket; socket.create_connection(({ELSEWHERE!r}, 80), timeout=1)"


def test_this_process_and_those_it_starts_cannot_reach_another_machine():
    with pytest.raises(PermissionError, match="must not use the network"):
        socket.create_connection((ELSEWHERE, 80), timeout=1)
    with pytest.raises(PermissionError, match="must not use the network"):
        socket.getaddrinfo("example.org", 80)
    started = subprocess.run([sys.executable, "-c", CONNECT], capture_output=True, text=True)
    assert "must not use the network" in started.stderr


def test_this_machine_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
