"""Client of the vmprobe service."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from vmprobe.v1 import events_pb2_grpc, guest_pb2_grpc, host_pb2_grpc, machines_pb2_grpc, probes_pb2_grpc

__all__ = ["Service", "connect", "default_socket"]


@dataclass(frozen=True)
class Service:
    """The services of the contract, one stub each."""

    machines: machines_pb2_grpc.MachinesStub
    probes: probes_pb2_grpc.ProbesStub
    events: events_pb2_grpc.EventsStub
    guest: guest_pb2_grpc.GuestStub
    host: host_pb2_grpc.HostStub


def default_socket() -> Path:
    """Where the service's socket is: VMPROBE_SOCKET, or in the user's runtime directory, or in the system's."""
    if socket := os.environ.get("VMPROBE_SOCKET"):
        return Path(socket)
    return Path(os.environ.get("XDG_RUNTIME_DIR", "/run")) / "vmprobe.sock"


@contextmanager
def connect(socket: str | os.PathLike[str] | None = None) -> Iterator[Service]:
    """Connects to the service at a socket, which is closed at the end of the block.

    Calls raise grpc.RpcError; its details() say what was wrong and what to do.
    """
    path = Path(socket) if socket is not None else default_socket()
    # Without an authority of its own gRPC sends the path, which is no valid one.
    options = [("grpc.default_authority", "localhost")]
    with grpc.insecure_channel(f"unix:{path.absolute()}", options=options) as channel:
        yield Service(
            machines_pb2_grpc.MachinesStub(channel),
            probes_pb2_grpc.ProbesStub(channel),
            events_pb2_grpc.EventsStub(channel),
            guest_pb2_grpc.GuestStub(channel),
            host_pb2_grpc.HostStub(channel),
        )
