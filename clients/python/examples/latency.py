"""Plots how long calls of a guest's function take.

    python latency.py                           # tick of the built-in guest
    python latency.py IMAGE FUNCTION [CALLS]
"""

from __future__ import annotations

import os
import sys
from collections import Counter

import vmprobe
from vmprobe.v1.events_pb2 import StreamEventsRequest
from vmprobe.v1.machines_pb2 import (
    CreateMachineRequest,
    DeleteMachineRequest,
    MachineSpec,
    StartMachineRequest,
)
from vmprobe.v1.probes_pb2 import AddProbesRequest


def durations(service: vmprobe.Service, image: str, function: str, calls: int) -> list[int]:
    """The first calls of a function in a machine of its own, nanoseconds each."""
    spec = MachineSpec(image=image)
    machine = service.machines.CreateMachine(CreateMachineRequest(spec=spec)).name
    try:
        service.probes.AddProbes(AddProbesRequest(machine=machine, specs=[f"{function}%return"]))
        request = StreamEventsRequest(machine=machine, from_sequence=0, without_registers=True)
        stream = service.events.StreamEvents(request)
        service.machines.StartMachine(StartMachineRequest(name=machine))
        found: list[int] = []
        for response in stream:
            found.extend(event.duration_ns for event in response.events)
            if len(found) >= calls:
                break
        return found[:calls]
    finally:
        service.machines.DeleteMachine(DeleteMachineRequest(name=machine))


def plot(durations: list[int], width: int = 50) -> None:
    """A bar for each power of two of nanoseconds."""
    buckets = Counter(duration.bit_length() for duration in durations)
    most = max(buckets.values())
    for bucket in range(min(buckets), max(buckets) + 1):
        count = buckets[bucket]
        bar = "#" * round(width * count / most)
        print(f"{1 << max(bucket - 1, 0):>12} ns .. {(1 << bucket) - 1:>12} ns {count:>7} {bar}")


def main() -> None:
    image, function, calls = (sys.argv[1:] + ["ticker", "tick", "2000"][len(sys.argv) - 1 :])[:3]
    if os.path.exists(image):
        image = os.path.abspath(image)
    with vmprobe.connect() as service:
        found = durations(service, image, function, int(calls))
    print(f"{function}: {len(found)} calls")
    if found:
        plot(found)


if __name__ == "__main__":
    main()
