"""Bad frames and strange connections at every port of ours, while updates go on.

    python -m chaos.strangers --frames 1000000 --connections 100000

Two engines with their directory run in one process, a trainer in another (``attacked_trainer.py``). The ports are: each
engine's endpoint, the directory, the listener where workers connect to the trainer, the one where a worker fetches a peer's
weights, the gloo process of a worker in a trainer's own group, and the launcher's lifeline. Several processes send bad frames
(malformed, absurd, repeated, replayed, of a wrong key) to the ZeroMQ ports, and open strange TCP connections (silent, reset,
garbage, other protocols, half a handshake, a recorded session) to all of them. Meanwhile the trainer updates the engines.

The last line is JSON. Exits with 1 if an engine, the trainer or an update failed, or if memory or descriptors grew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.protocol import security
from harness import bad_frames, simulated_engine
from harness.report import described

from .attacked_trainer import Trainer

# Allocators and bounded caches; what is kept of each frame or connection would be more.
_MORE_MEMORY_BYTES = 48 << 20
_MORE_FILES = 20
_SETTLE_SECONDS = 2.0
_PATIENCE_SECONDS = 9.0  # longer than any port waits for a stranger
_HELD_CONNECTIONS = 200
_FRAMES_OF_A_PEER = 2000


class Stranger:
    """Opens connections that never become any."""

    def __init__(self, ports: list[int], patient: int, recorded: bytes, seed: int) -> None:
        """
        Args:
            ports: to connect to.
            patient: one of them, whose owner closes no silent connection.
            recorded: what an honest client once sent.
            seed: decides what is said.
        """
        self._ports, self._patient, self._recorded = ports, patient, recorded
        self._random = random.Random(seed)
        self._held: list[socket.socket] = []
        self.refused = self.outstayed = 0

    def knock(self, connections: int) -> None:
        for number in range(connections):
            one = socket.socket()
            # Every address of this block is this host's, so that no range of client ports runs out.
            one.bind((f"127.{number % 200}.{self._random.randrange(1, 255)}.1", 0))
            one.settimeout(5.0)
            try:
                one.connect(("127.0.0.1", self._random.choice(self._ports)))
                self._say(one)
            except OSError:
                self.refused += 1  # the listener of a trainer is open at times only
            self._leave(one)
        ends = time.monotonic() + _PATIENCE_SECONDS
        for one in self._held:
            one.settimeout(max(ends - time.monotonic(), 0.01))
            try:
                while one.recv(4096):
                    pass
            except TimeoutError:
                self.outstayed += one.getpeername()[1] != self._patient
            except OSError:
                pass  # reset
            one.close()

    def _say(self, one: socket.socket) -> None:
        said = self._random.choice(
            (*bad_frames.TCP_GARBAGE, self._recorded, self._random.randbytes(self._random.randrange(2000)))
        )
        if self._random.random() < 0.1:  # byte by byte
            for byte in said[:20]:
                one.send(bytes([byte]))
        else:
            one.sendall(said)
        match self._random.randrange(4):
            case 0:
                one.shutdown(socket.SHUT_WR)
            case 1:
                one.settimeout(0.02)
                one.recv(1000)

    def _leave(self, one: socket.socket) -> None:
        if self._random.random() < 0.5:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset
        if self._random.random() < 0.3:
            self._held.append(one)
            if len(self._held) > _HELD_CONNECTIONS:
                self._held.pop(self._random.randrange(len(self._held))).close()
        else:
            one.close()


def record_session(address: str, key: security.ClusterKey) -> bytes:
    """Return what an honest client sends to ``address``, as it is on the wire."""
    import zmq

    from areal_vllm_ext import protocol
    from areal_vllm_ext.protocol.server import connect as connect_client

    host, port = address.removeprefix("tcp://").split(":")
    recorded = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def carry() -> None:
            client, _ = proxy.accept()
            with client, socket.create_connection((host, int(port))) as server, contextlib.suppress(OSError):
                threading.Thread(target=_pump, args=(server, client, bytearray()), daemon=True).start()
                _pump(client, server, recorded)

        thread = threading.Thread(target=carry)
        thread.start()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        peer = connect_client(context, f"tcp://127.0.0.1:{proxy.getsockname()[1]}", key, b"recorded")
        peer.send_multipart([os.urandom(protocol.REQUEST_ID_BYTES), protocol.encoder.encode(protocol.GetStatus())])
        assert peer.poll(10_000)
        context.destroy(linger=0)
        thread.join(10)
    assert len(recorded) > 300
    return bytes(recorded)


def _pump(source: socket.socket, target: socket.socket, seen: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            seen += data
            target.sendall(data)


def memory(pid: int) -> int:
    """Return the resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int) -> int:
    """Return the number of descriptors of a process."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


class Samples:
    """Memory and descriptors of the processes under attack, over time."""

    def __init__(self, processes: dict[str, subprocess.Popen[str]]) -> None:
        self._processes = processes
        self._taken: dict[str, list[tuple[int, int]]] = {name: [] for name in processes}

    def take(self) -> None:
        """Take one sample of each process."""
        for name, process in self._processes.items():
            with contextlib.suppress(OSError, IndexError):  # it has ended
                self._taken[name].append((memory(process.pid), open_files(process.pid)))

    def ended(self) -> list[str]:
        """Return the processes that have ended."""
        return [name for name, process in self._processes.items() if process.poll() is not None]

    def summary(self) -> dict[str, Any]:
        """Return for each process: peak memory of the middle and the last third, descriptors before and after."""
        found = {}
        for name, samples in self._taken.items():
            third = len(samples) // 3
            middle, last = samples[third : 2 * third] or samples, samples[2 * third :]
            files = [files for _, files in samples]
            found[name] = {
                "memory_mib": [max(one)[0] >> 20 for one in (middle, last)],
                "memory_mib_over_time": [samples[len(samples) * tenth // 10][0] >> 20 for tenth in range(10)],
                "descriptors": [files[0], max(files), files[-1]],
            }
        return found


def grown(summary: dict[str, Any]) -> list[str]:
    """Return what is not flat."""
    found = []
    for name, one in summary.items():
        before, after = one["memory_mib"]
        if (after - before) << 20 > _MORE_MEMORY_BYTES:
            found.append(f"{name}: memory grew from {before} to {after} MiB")
        first, _, last = one["descriptors"]
        if last > first + _MORE_FILES:
            found.append(f"{name}: descriptors grew from {first} to {last}")
    return found


def attack(frames: int, connections: int, processes: int = 2, seed: int = 0) -> dict[str, Any]:
    """Run it all, and return the facts."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="areal-strangers-")))
        key = security.write_key(folder / "cluster.key")
        key_file = str(folder / "cluster.key")
        engines = _start(stack, [simulated_engine.__file__, "--key-file", key_file, "--engines", "2"])
        directory = _line(engines)
        trainer = _start(stack, ["-m", "chaos.strangers", "--be-trainer", directory, "--key-file", key_file])
        with EngineGroup.connect(directory, key_file=key_file) as group:
            addresses = [directory, *(engine.address for engine in group.wait_ready(2, timeout=60))]
        ports = json.loads(_line(trainer))
        listening = [int(address.rpartition(":")[2]) for address in addresses] + list(ports.values())
        (folder / "recorded").write_bytes(record_session(addresses[1], key))

        samples = Samples({"engines": engines, "trainer": trainer})
        time.sleep(2.0)
        samples.take()
        started = time.monotonic()
        strangers = []
        for number in range(processes):
            options = {
                "--frames": frames // processes,
                "--connections": connections // processes,
                "--seed": seed + number,
                "--addresses": ",".join(addresses),
                "--ports": ",".join(map(str, listening)),
                "--patient": str(ports["gloo"]),
                "--key-file": key_file,
                "--recorded": str(folder / "recorded"),
            }
            words = [str(word) for pair in options.items() for word in pair]
            strangers.append(_start(stack, ["-m", "chaos.strangers", "--be-strangers", *words]))
        while any(one.poll() is None for one in strangers) and not samples.ended():
            time.sleep(1.0)
            samples.take()
        took = time.monotonic() - started
        problems = [f"{name} ended" for name in samples.ended()]
        refused = outstayed = 0
        if not problems:
            for one in strangers:
                said, _ = one.communicate(timeout=60)
                problems += [] if one.returncode == 0 else ["an attacker failed: its port did not answer in time"]
                one_refused, one_outstayed = map(int, (said or "0 0").split())
                refused, outstayed = refused + one_refused, outstayed + one_outstayed
            time.sleep(_SETTLE_SECONDS)
            samples.take()
        said, _ = trainer.communicate(timeout=120)
        facts = json.loads(said.splitlines()[-1]) if said else {}
        summary = samples.summary()
        problems += [f"{outstayed} silent connections were never closed"] if outstayed else []
        problems += [*grown(summary), *facts.get("errors", [])]
        idle = [name for name in ("updates", "rendezvous", "fetches", "gloo_broadcasts") if not facts.get(name)]
        if facts.get("lifelines_lost") or idle:
            problems.append(f"the trainer's ports did not work: {facts}")
        return {
            "frames": frames,
            "connections": connections,
            "refused_connections": refused,
            "seconds": round(took, 1),
            **{name: value for name, value in facts.items() if name != "errors"},
            "processes": summary,
            "problems": problems[:20],
        }


def _start(stack: contextlib.ExitStack, arguments: list[str]) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def _be_strangers(options: argparse.Namespace) -> None:
    """Send frames from one thread, and open connections from another."""
    key, addresses = security.read_key(options.key_file), options.addresses.split(",")
    ports = [int(port) for port in options.ports.split(",")]
    stranger = Stranger(ports, int(options.patient), Path(options.recorded).read_bytes(), options.seed)
    knocking = threading.Thread(target=stranger.knock, args=(options.connections,))
    knocking.start()
    for number, address in enumerate(addresses):
        attacker = bad_frames.Attacker(address, key, options.seed * 10 + number, 16 << 20, _FRAMES_OF_A_PEER)
        try:
            attacker.send(options.frames // len(addresses))
        finally:
            attacker.close()
    knocking.join()
    print(stranger.refused, stranger.outstayed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--connections", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2, help="attackers at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the facts here")
    for name in ("--be-trainer", "--key-file", "--addresses", "--ports", "--patient", "--recorded"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--be-strangers", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be_trainer:
        Trainer(options.be_trainer, options.key_file).run()
        sys.stdout.flush()
        os._exit(0)  # strangers still connect, which the end of an event loop does not expect
    if options.be_strangers:
        _be_strangers(options)
        return 0
    facts = attack(options.frames, options.connections, options.processes, options.seed)
    if options.out:
        options.out.write_text(json.dumps(described(facts), indent=1) + "\n")
    print(json.dumps(facts))
    return int(bool(facts["problems"]))


if __name__ == "__main__":
    sys.exit(main())
