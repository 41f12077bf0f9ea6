"""Client of the vmprobe service."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from vmprobe.v1 import events_pb2_grpc, guest_pb2_grpc, host_pb2_grpc, machines_pb2_grpc, probes_pb2_grpc

__all__ = ["Service", "connect", "default_service"]


@dataclass(frozen=True)
class Service:
    """The services of the contract, one stub each."""

    machines: machines_pb2_grpc.MachinesStub
    probes: probes_pb2_grpc.ProbesStub
    events: events_pb2_grpc.EventsStub
    guest: guest_pb2_grpc.GuestStub
    host: host_pb2_grpc.HostStub


def default_service() -> str:
    """Where the service is: VMPROBE_SERVICE, or VMPROBE_SOCKET, or in the user's runtime directory, or in the system's."""
    if service := os.environ.get("VMPROBE_SERVICE") or os.environ.get("VMPROBE_SOCKET"):
        return service
    return str(Path(os.environ.get("XDG_RUNTIME_DIR", "/run")) / "vmprobe.sock")


def _read(path: str | os.PathLike[str] | None, variable: str) -> bytes:
    path = path or os.environ.get(variable)
    if not path:
        raise ValueError(f"https takes a certificate, its key and a CA; {variable} is not set either")
    return Path(path).read_bytes()


@contextmanager
def connect(
    service: str | os.PathLike[str] | None = None,
    *,
    certificate: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
    ca: str | os.PathLike[str] | None = None,
) -> Iterator[Service]:
    """Connects to the service at a Unix socket or https://HOST:PORT; the connection is closed at the end of the block.

    https takes the files (PEM) of this client's certificate and its key, and of the CA that has signed the service's; without
    them what VMPROBE_TLS_CERT, VMPROBE_TLS_KEY and VMPROBE_TLS_CA name.

    Calls raise grpc.RpcError; its details() say what was wrong and what to do.
    """
    place = os.fspath(service) if service is not None else default_service()
    if place.startswith("https://"):
        credentials = grpc.ssl_channel_credentials(
            root_certificates=_read(ca, "VMPROBE_TLS_CA"),
            private_key=_read(key, "VMPROBE_TLS_KEY"),
            certificate_chain=_read(certificate, "VMPROBE_TLS_CERT"),
        )
        channel = grpc.secure_channel(place.removeprefix("https://").rstrip("/"), credentials)
    elif "://" in place:
        raise ValueError(f"{place}: give the path of a Unix socket, or https://HOST:PORT")
    else:
        # Without an authority of its own gRPC sends the path, which is no valid one.
        options = [("grpc.default_authority", "localhost")]
        channel = grpc.insecure_channel(f"unix:{Path(place).absolute()}", options=options)
    with channel:
        yield Service(
            machines_pb2_grpc.MachinesStub(channel),
            probes_pb2_grpc.ProbesStub(channel),
            events_pb2_grpc.EventsStub(channel),
            guest_pb2_grpc.GuestStub(channel),
            host_pb2_grpc.HostStub(channel),
        )
