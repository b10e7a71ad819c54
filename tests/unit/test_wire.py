"""The wire: a bad frame costs its sender an error and nobody else anything; a repeated request is done once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq
from engine_infos import engine_info
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from raw_client import RawClient
from waiting import eventually
from zmq.utils.monitor import recv_monitor_message

from areal_vllm_ext import protocol
from areal_vllm_ext.config import Settings
from areal_vllm_ext.control.directory_server import DirectoryServer
from areal_vllm_ext.errors import SettingsError
from areal_vllm_ext.protocol import Ack, Error, GetStatus, Pause, Status, security
from areal_vllm_ext.protocol import server as wire
from examples import examples
from harness.simulated_engine import HOST, NEVER, Deployment, Shape, deployed

Raw = Callable[..., RawClient]
MAX_MESSAGE = 1 << 20
HELLO = protocol.encoder.encode(protocol.Hello())


@pytest.fixture(scope="module")
def shared_deployment(key: security.ClusterKey) -> Iterator[Deployment]:
    with deployed(key, 1, shape=Shape(settings=Settings(max_message_mib=1))) as one:
        one.wait_attached()
        yield one


@pytest.fixture
def address(shared_deployment: Deployment) -> str:
    return shared_deployment.engines[0].endpoint.address


def request_id() -> bytes:
    return os.urandom(protocol.REQUEST_ID_BYTES)


def pause(epoch: int = 1, timeout: float = 60.0) -> bytes:
    return protocol.encoder.encode(Pause(epoch=epoch, mode="keep", kv="keep", timeout=timeout))


# Garbage

NESTED = b"\x83\xa4type\xa5Fence\xa5epoch\x01\xa4deep"
BAD_FRAMES = {
    "no frame but one": [b"x"],
    "one empty frame": [b""],
    "too many frames": [request_id(), HELLO, b"more"],
    "swapped frames": [HELLO, request_id()],
    "a short id": [b"short", HELLO],
    "a long id": [bytes(17), HELLO],
    "no message": [request_id(), b""],
    "not msgpack": [request_id(), b"\xc1"],
    "text": [request_id(), b"GET / HTTP/1.1\r\n\r\n"],
    "truncated": [request_id(), HELLO[:-1]],
    "something behind": [request_id(), HELLO + b"\x00"],
    "another msgpack": [request_id(), msgspec.msgpack.encode([1, 2, 3])],
    "no tag": [request_id(), msgspec.msgpack.encode({"protocol": 1})],
    "a wrong type": [request_id(), msgspec.msgpack.encode({"type": "Hello", "protocol": "1"})],
    "an answer as request": [request_id(), protocol.encoder.encode(Ack())],
    "deep nesting": [request_id(), NESTED + b"\x91" * 50_000 + b"\x00"],
    "deep nesting in a list": [request_id(), b"\x91" * 50_000 + b"\x00"],
    "a length of 4 GiB": [request_id(), b"\xdd\xff\xff\xff\xff"],
}


@pytest.mark.parametrize("frames", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_a_bad_frame_is_answered_with_an_error_and_others_are_unharmed(
    address: str, raw: Raw, frames: list[bytes]
) -> None:
    sender, other = raw(address), raw(address)
    sender.send(*frames)
    answer = sender.answer()
    assert isinstance(answer, Error)
    assert answer.kind == "malformed"
    assert isinstance(other.ask(GetStatus()), Status)
    assert isinstance(sender.ask(GetStatus()), Status), "its sender may go on"


def test_a_message_that_stops_in_mid_frame_costs_nobody_anything(address: str, raw: Raw) -> None:
    sender, other = raw(address), raw(address)
    sender.ask(GetStatus())
    sender.socket.send(request_id(), zmq.SNDMORE)  # never the rest
    sender.socket.send(b"", zmq.SNDMORE)
    assert isinstance(other.ask(GetStatus()), Status)


def test_an_oversized_frame_ends_its_senders_connection_and_no_other(address: str, raw: Raw) -> None:
    sender, other = raw(address), raw(address)
    assert isinstance(other.ask(GetStatus()), Status)
    monitor = sender.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    sender.send(request_id(), bytes(MAX_MESSAGE + 1))
    assert monitor.poll(5000), "the connection was not closed"
    assert recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED
    sender.socket.disable_monitor()
    monitor.close()
    assert sender.receive(0.1) is None
    assert isinstance(other.ask(GetStatus()), Status)
    assert isinstance(sender.ask(GetStatus()), Status), "it may come back"


def test_the_longest_message_is_still_read(address: str, raw: Raw) -> None:
    client = raw(address)
    client.send(request_id(), bytes(MAX_MESSAGE))
    answer = client.answer(timeout=1.0)
    assert isinstance(answer, Error)
    assert answer.kind == "malformed"


def mutations() -> st.SearchStrategy[bytes]:
    """Messages with a few bytes changed, cut out or put in."""
    whole = [
        protocol.encoder.encode(message)
        for message in (
            protocol.Hello(),
            protocol.Register(
                engine=engine_info(),
                epoch=1,
            ),
            protocol.AcquireLease(holder="h", seconds=1.0),
        )
    ]

    @st.composite
    def mutated(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(st.sampled_from(whole)))
        for _ in range(draw(st.integers(1, 4))):
            place = draw(st.integers(0, max(len(data) - 1, 0)))
            cut = draw(st.integers(0, 3))
            data[place : place + cut] = draw(st.binary(max_size=3))
        return bytes(data)

    return mutated() | st.binary(max_size=64)


@pytest.fixture(scope="module")
def bare_server(key: security.ClusterKey) -> Iterator[tuple[wire.Server[protocol.DirectoryRequest], RawClient]]:
    """A server that the test itself reads, so that what it cannot take is seen, and a client of it."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    security.ZapAuthenticator(context, key)
    server = wire.Server(context, HOST, 0, key, protocol.directory_decoder, MAX_MESSAGE)
    client = RawClient(server.address, key)
    yield server, client
    client.close()
    server.socket.close()
    context.term()


def exchange(
    server: wire.Server[protocol.DirectoryRequest], client: RawClient, payload: bytes
) -> protocol.Answer | protocol.DirectoryRequest:
    client.send(request_id(), payload)
    assert server.socket.poll(5000)
    request = next(server.requests(), None)
    return client.answer() if request is None else request[1]


def test_text_that_is_no_utf8_is_malformed(
    bare_server: tuple[wire.Server[protocol.DirectoryRequest], RawClient],
) -> None:
    answer = exchange(*bare_server, HELLO.replace(b"Hello", b"He\xffo"))
    assert isinstance(answer, Error)
    assert answer.kind == "malformed"


@examples(150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payload=mutations())
def test_whatever_bytes_come_the_server_answers_or_understands_them(
    bare_server: tuple[wire.Server[protocol.DirectoryRequest], RawClient], payload: bytes
) -> None:
    try:
        answer = exchange(*bare_server, payload)
    except UnicodeDecodeError:
        return  # the test above
    assert isinstance(answer, Error | protocol.Message)


# Repetition


def test_a_repeated_request_is_done_once_and_gets_the_first_answer_again(deployment: Deployment, raw: Raw) -> None:
    engine = deployment.engines[0]
    client = raw(engine.endpoint.address)
    same = request_id()
    client.send(same, pause())
    first = client.receive()
    assert first is not None
    assert isinstance(client.ask(protocol.Resume(epoch=2)), Ack)
    for _ in range(3):
        client.send(same, pause())  # by now it would be fenced, or pause again
        assert client.receive() == first
    assert engine.calls == ["pause keep", "resume"]


def test_a_request_that_is_repeated_before_its_answer_is_done_and_answered_once(
    deployment: Deployment, raw: Raw
) -> None:
    engine = deployment.engines[0]
    engine.seconds["pause"] = 0.3
    client = raw(engine.endpoint.address)
    same = request_id()
    for _ in range(3):
        client.send(same, pause())
    assert isinstance(client.answer(), Ack)
    assert client.receive(0.2) is None
    assert engine.calls == ["pause keep"]


def test_the_same_id_of_another_peer_is_another_request(deployment: Deployment, raw: Raw) -> None:
    one, other = (raw(deployment.engines[0].endpoint.address) for _ in range(2))
    same = request_id()
    one.send(same, protocol.encoder.encode(protocol.Hello()))
    other.send(same, protocol.encoder.encode(GetStatus()))
    assert isinstance(one.answer(), protocol.Welcome)
    assert isinstance(other.answer(), Status)


def test_a_peer_that_comes_back_is_answered_what_it_asked_before(deployment: Deployment, raw: Raw) -> None:
    engine = deployment.engines[0]
    engine.seconds["pause"] = 0.5
    same = request_id()
    before = raw(engine.endpoint.address, identity=b"trainer")
    before.send(same, pause())
    eventually(lambda: engine.calls)
    before.close()
    after = raw(engine.endpoint.address, identity=b"trainer")
    after.send(same, pause())
    assert isinstance(after.answer(), Ack)
    assert engine.calls == ["pause keep"]


def test_kept_answers_are_bounded_in_bytes(
    bare_server: tuple[wire.Server[protocol.DirectoryRequest], RawClient],
) -> None:
    server, client = bare_server
    weights = protocol.Weights(tensors=(), error="x" * (1 << 20))
    for _ in range(80):
        client.send(request_id(), HELLO)
        assert server.socket.poll(5000)
        request = next(server.requests(), None)
        assert request is not None
        server.answer(request[0], weights)
        assert client.receive() is not None
    assert server._answers.nbytes <= 1 << 20


# An engine that is busy


def test_an_engine_that_never_comes_back_to_its_calls_still_answers_hello_and_status(
    deployment: Deployment, raw: Raw
) -> None:
    engine = deployment.engines[0]
    engine.seconds["pause"] = NEVER
    client = raw(engine.endpoint.address)
    client.send(request_id(), pause())
    eventually(lambda: engine.calls)
    started = time.monotonic()
    status = client.ask(GetStatus())
    assert isinstance(status, Status)
    assert status.generation == "pausing"
    assert isinstance(client.ask(protocol.Hello()), protocol.Welcome)
    assert time.monotonic() - started < 1.0


# Binding


def test_a_port_in_use_is_named(key: security.ClusterKey, deployment: Deployment) -> None:
    taken = deployment.engines[0].endpoint.address.rpartition(":")[2]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1:{taken}: Address already in use"):
        DirectoryServer(context, HOST, int(taken), key)
    context.term()  # would hang if the socket were left open


def test_an_address_that_is_not_of_this_machine_is_named(key: security.ClusterKey) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with pytest.raises(SettingsError, match=r"cannot listen on 192\.0\.2\.1:7"):
        wire.Server(context, "192.0.2.1", 7, key, protocol.engine_decoder, MAX_MESSAGE)
    context.term()


def test_an_endpoint_listens_on_its_own_address_only(deployment: Deployment) -> None:
    for engine in deployment.engines.values():
        assert engine.endpoint.address.startswith("tcp://127.0.0.1:")
