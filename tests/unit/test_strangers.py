"""Peers that have the cluster's key, but are not who they say they are, or ask for what nobody needs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
import zmq
from engine_infos import engine_info
from raw_client import RawClient
from safetensors.torch import save_file
from waiting import eventually

from areal_vllm_ext import protocol
from areal_vllm_ext.control import directory
from areal_vllm_ext.control.directory import Directory
from areal_vllm_ext.engine_core.participant import Participant
from areal_vllm_ext.protocol import (
    EPOCH_JUMP,
    Ack,
    AcquireLease,
    Attach,
    Begin,
    DescribeWeights,
    Discover,
    Disk,
    EngineInfo,
    Engines,
    Error,
    Fence,
    GetStatus,
    Lease,
    Register,
    Registered,
    Sender,
    Status,
    Weights,
    WorkerDone,
    WorkerInfo,
    security,
)
from areal_vllm_ext.protocol import server as wire
from areal_vllm_ext.protocol.timing import FORGOTTEN_AFTER_SECONDS, LOST_AFTER_SECONDS
from harness.simulated_engine import HOST, NEVER, Deployment, Shape, deployed

Raw = Callable[..., RawClient]


def worker(rank: int) -> WorkerInfo:
    return WorkerInfo(rank=rank, node="stranger", pid=1, device="cpu", device_id="cpu")


def status(client: RawClient) -> Status:
    answer = client.ask(GetStatus())
    assert isinstance(answer, Status)
    return answer


# Workers


@pytest.mark.parametrize("token", ["", "guessed", "0" * 32, "é"])
def test_a_stranger_does_not_take_a_workers_place(deployment: Deployment, raw: Raw, token: str) -> None:
    endpoint = deployment.engines[0].endpoint
    client = raw(endpoint.address)
    refusal = client.ask(Attach(worker=worker(0), token=token))
    assert isinstance(refusal, Error)
    assert "was not started with worker 0 on stranger" in refusal.message
    assert [one.node for one in status(client).engine.workers] == [HOST]
    begun = Begin(epoch=1, update="u", version=1, senders={0: Sender(transfer=Disk(path="/"))}, timeout=5.0)
    assert isinstance(client.ask(begun), Ack), "the order went to somebody else"


def test_a_rank_that_the_engine_does_not_have_is_no_worker(key: security.ClusterKey, raw: Raw) -> None:
    with deployed(key, 1, shape=Shape(workers=2), simulate_workers=False) as one:
        endpoint = one.engines[0].endpoint
        client = raw(endpoint.address)
        for rank in (2, 3):
            assert isinstance(client.ask(Attach(worker=worker(rank), token=endpoint.attach_token)), Error)
        assert not endpoint.wait_attached(0)


def test_only_the_worker_itself_votes(deployment: Deployment, raw: Raw) -> None:
    engine = deployment.engines[0]
    engine.seconds["prepare"] = NEVER
    client = raw(engine.endpoint.address)
    begun = Begin(epoch=1, update="u", version=1, senders={0: Sender(transfer=Disk(path="/"))}, timeout=60.0)
    assert isinstance(client.ask(begun), Ack)
    for vote in (WorkerDone(update="u", rank=0, step="prepare"), WorkerDone(update="u", rank=0, step="x", error="no")):
        client.send(os.urandom(16), protocol.encoder.encode(vote))
        assert status(client).update_phase == "receiving"
    assert isinstance(client.ask(begun), Ack), "a stranger's error counted"


# Epochs


def test_an_epoch_that_leaves_no_room_for_later_ones_is_refused(deployment: Deployment, raw: Raw) -> None:
    client = raw(deployment.engines[0].endpoint.address)
    assert status(client).epoch == 0
    for epoch in (2**62, 2**53, EPOCH_JUMP + 1):
        refusal = client.ask(Fence(epoch=epoch))
        assert isinstance(refusal, Error)
        assert refusal.kind == "fenced"
    assert isinstance(client.ask(Fence(epoch=EPOCH_JUMP)), Status)
    assert isinstance(client.ask(Fence(epoch=EPOCH_JUMP + 1)), Status)


def test_an_epoch_outside_of_its_bounds_is_malformed(deployment: Deployment, raw: Raw) -> None:
    client = raw(deployment.engines[0].endpoint.address)
    client.send(os.urandom(16), msgspec.msgpack.encode({"type": "Fence", "epoch": 2**63}))
    answer = client.answer()
    assert isinstance(answer, Error)
    assert answer.kind == "malformed"


def test_a_participant_obeys_no_absurd_epoch_in_a_command() -> None:
    participant = Participant(0, frozenset({0}), epoch=5)
    assert participant.fence(5 + EPOCH_JUMP + 1) is not None
    assert participant.epoch == 5


def test_the_directory_gives_no_absurd_epoch_away() -> None:
    known = Directory()
    assert isinstance(known.handle(Register(engine=engine(), epoch=2**62), 0.0), Error)
    lease = known.handle(AcquireLease(holder="h", seconds=1.0), 0.0)
    assert isinstance(lease, Lease)
    assert lease.epoch == 1


# Registrations


def engine(replica: str = "r", rank: int = 0, size: int = 1, incarnation: str = "1") -> EngineInfo:
    return engine_info(rank, size, replica=replica, incarnation=incarnation)


def found(known: Directory, now: float) -> Engines:
    answer = known.handle(Discover(), now)
    assert isinstance(answer, Engines)
    return answer


@pytest.mark.parametrize(
    "absurd",
    [{"dp_rank": -1}, {"dp_size": 10**9}, {"replica": "x" * 5000}, {"workers": [{"rank": -1}]}],
    ids=["a negative rank", "a billion engines", "a name without end", "a negative worker"],
)
def test_an_absurd_engine_is_malformed(absurd: dict[str, object]) -> None:
    message = {"type": "Register", "epoch": 0, "engine": msgspec.to_builtins(engine()) | absurd}
    with pytest.raises(msgspec.ValidationError, match=next(iter(absurd))):
        protocol.directory_decoder.decode(msgspec.msgpack.encode(message))


def test_an_engine_beyond_its_groups_size_is_refused() -> None:
    known = Directory()
    answer = known.handle(Register(engine=engine(rank=2, size=2), epoch=0), 0.0)
    assert isinstance(answer, Error)
    assert "cannot be one of 2" in answer.message
    assert found(known, 0.0) == Engines(alive=())


def test_the_directory_knows_so_many_engines_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "MOST_ENGINES", 10)
    known = Directory()
    answers = [known.handle(Register(engine=engine(str(number)), epoch=0), 0.0) for number in range(11)]
    assert all(isinstance(answer, Registered) for answer in answers[:10])
    assert isinstance(answers[10], Error)
    assert "knows 10 engines, which is its limit" in answers[10].message
    assert isinstance(known.handle(Register(engine=engine("3"), epoch=0), 1.0), Registered), "one of them beats"
    later = FORGOTTEN_AFTER_SECONDS + 0.5
    answer = known.handle(Register(engine=engine("new"), epoch=0), later)
    assert isinstance(answer, Registered), "the others are forgotten"
    assert [one.replica for one in found(known, later).alive] == ["new"]


def test_the_directory_remembers_so_many_that_lost_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "MOST_ENGINES", 10)
    known = Directory()
    known.handle(Register(engine=engine(incarnation="9"), epoch=0), 0.0)
    for number in range(100, 150):
        known.handle(Register(engine=engine(incarnation=str(number)), epoch=0), 0.0)
    assert len(found(known, 0.0).displaced) == 10
    assert not known._displaced or len(known._displaced) == 10
    assert found(known, LOST_AFTER_SECONDS + 1).displaced == ()
    assert not known._displaced, "they are forgotten, not only hidden"


# Floods


@pytest.fixture
def server(key: security.ClusterKey) -> Iterator[wire.Server[protocol.DirectoryRequest]]:
    """A server that the test itself reads."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    security.ZapAuthenticator(context, key)
    made = wire.Server(context, HOST, 0, key, protocol.directory_decoder, 1 << 16)
    yield made
    made.socket.close()
    context.term()


def read_all(server: wire.Server[protocol.DirectoryRequest], wanted: int) -> list[protocol.DirectoryRequest]:
    read: list[protocol.DirectoryRequest] = []
    while len(read) < wanted and server.socket.poll(5000):
        for caller, message in server.requests():
            read.append(message)
            server.answer(caller, Ack())
    return read


HELLO = protocol.encoder.encode(protocol.Hello())


@pytest.mark.parametrize("payload", [HELLO, b"garbage"])
def test_a_flood_is_read_in_rounds(server: wire.Server[protocol.DirectoryRequest], raw: Raw, payload: bytes) -> None:
    client = raw(server.address)
    for _ in range(60):
        client.send(os.urandom(16), payload)
    assert server.socket.poll(5000)
    eventually(lambda: bool(server.socket.poll(0)))
    rounds = 0
    while server.socket.poll(500):
        assert len(list(server.requests())) <= wire._ROUND
        rounds += 1
    assert rounds >= 2


def test_a_noisy_peer_pushes_out_its_own_answers_only(server: wire.Server[protocol.DirectoryRequest], raw: Raw) -> None:
    quiet, noisy = raw(server.address), raw(server.address)
    same = os.urandom(16)
    quiet.send(same, HELLO)
    assert len(read_all(server, 1)) == 1
    first = quiet.receive()
    for _ in range(5000):
        noisy.send(os.urandom(16), HELLO)
        while noisy.socket.poll(0):
            noisy.receive()
        for caller, _ in server.requests():
            server.answer(caller, Ack())
    quiet.send(same, HELLO)
    assert server.socket.poll(5000)
    while server.socket.poll(100):
        assert all(caller.request_id != same for caller, _ in server.requests()), "it was done again"
    assert quiet.receive() == first


def test_a_request_that_is_being_handled_is_not_read_again(
    server: wire.Server[protocol.DirectoryRequest], raw: Raw
) -> None:
    client, same = raw(server.address), os.urandom(16)
    for _ in range(3):
        client.send(same, HELLO)
    assert server.socket.poll(5000)
    read = []
    while server.socket.poll(200):
        read += list(server.requests())
    assert len(read) == 1


def test_a_peers_answers_are_bounded_in_number() -> None:
    answers = wire.ReplyCache()
    for number in range(1000):
        answers[wire.ReplyTo(b"peer", number.to_bytes(16, "big"))] = b"short"
    assert len(answers) == wire._KEPT_ANSWERS
    assert wire.ReplyTo(b"peer", (999).to_bytes(16, "big")) in answers


def test_peers_without_number_are_forgotten_the_longest_silent_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_KEPT_BYTES", 100_000)
    answers = wire.ReplyCache()
    answers[wire.ReplyTo(b"trainer", b"first")] = b"kept"
    for number in range(10_000):
        answers[wire.ReplyTo(b"trainer", bytes(16))] = b"x" * 1000
        answers[wire.ReplyTo(number.to_bytes(16, "big"), bytes(16))] = b"y" * 1000
    assert answers.nbytes <= 100_000
    assert 20 < len(answers) < 100
    assert wire.ReplyTo(b"trainer", b"first") in answers, "it was never silent"
    for caller in [wire.ReplyTo(peer, one) for peer, kept in answers._peers.items() for one in kept]:
        del answers[caller]
    assert (answers.nbytes, len(answers)) == (0, 0)


def test_a_message_of_thousands_of_frames_is_refused_whole(
    server: wire.Server[protocol.DirectoryRequest], raw: Raw
) -> None:
    client = raw(server.address)
    client.send(*[b"frame"] * 5000)
    client.send(os.urandom(16), HELLO)
    assert len(read_all(server, 1)) == 1
    refusal = client.answer()
    assert isinstance(refusal, Error)
    assert refusal.kind == "malformed"
    assert isinstance(client.answer(), Ack)


def test_who_asks_what_the_model_takes_waits_until_every_worker_has_said_it(
    key: security.ClusterKey, raw: Raw, tmp_path: Path
) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    shape = Shape(workers=2, model=str(tmp_path))
    with deployed(key, 1, shape=shape, simulate_workers=False) as one:
        one.workers.attach(one.engines[0], 0)
        client = raw(one.engines[0].endpoint.address)
        for _ in range(30):
            client.send(os.urandom(16), protocol.encoder.encode(DescribeWeights()))
        assert isinstance(client.ask(GetStatus()), Status)
        one.workers.attach(one.engines[0], 1)
        wanted = Weights(tensors=(protocol.TensorMeta("w", "float32", (1,)),))
        assert all(client.answer() == wanted for _ in range(30))


# libzmq ends a process that sends heartbeats on a connection whose messages wait, once the peer has closed it.
FLOODED = """
import os, time, zmq
from areal_vllm_ext import protocol
from areal_vllm_ext.protocol import security
from areal_vllm_ext.protocol.server import Server, connect
ours, others = zmq.Context(), zmq.Context()
key = security.new_key()
serving, asking = (ours, others) if {server_stays} else (others, ours)
security.ZapAuthenticator(serving, key)
server = Server(serving, "127.0.0.1", 0, key, protocol.directory_decoder, 1 << 20)
client = connect(asking, server.address, key, b"client")
client.sndtimeo = server.socket.sndtimeo = 300
client.send_multipart([bytes(16), b"first"])
assert server.socket.poll(5000)
try:
    for _ in range(20_000):
        if {server_stays}:
            client.send_multipart([os.urandom(16), bytes(2000)])
        else:
            server.socket.send_multipart([b"client", os.urandom(16), bytes(2000)], zmq.NOBLOCK)
except zmq.Again:
    time.sleep(0.3)
(client if {server_stays} else server.socket).close()
others.term()
time.sleep(2.5)  # heartbeats are due each second
os._exit(0)
"""


@pytest.mark.parametrize("server_stays", [True, False])
def test_a_peer_that_floods_and_leaves_ends_no_process(server_stays: bool) -> None:
    command = [sys.executable, "-c", FLOODED.format(server_stays=server_stays)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
