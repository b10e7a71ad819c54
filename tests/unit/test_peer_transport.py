"""The connection between two workers: bytes, refusals, strangers, silence, and ends that are lost."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from areal_vllm_ext.transport import peer
from areal_vllm_ext.transport.base import Cancelled, PeerLost
from areal_vllm_ext.transport.peer import PeerSink, PeerSource, Refused

TOKEN = "a random name"
DATA = bytes(range(256)) * 20_000  # more than a chunk


@pytest.fixture
def sink() -> Iterator[PeerSink]:
    one = PeerSink("127.0.0.1")
    yield one
    one.close()
    one.free()


def serve(sink: PeerSink, answer: Callable[[int], None]) -> Future[None]:
    """Accept, and answer requests until the end."""

    def run() -> None:
        sink.accept(TOKEN)
        while (number := sink.next_request()) is not None:
            answer(number)

    pool = ThreadPoolExecutor(1)
    future = pool.submit(run)
    pool.shutdown(wait=False)
    return future


def fetched(source: PeerSource, number: int, nbytes: int, seconds: float = 10.0) -> bytes:
    buffer = bytearray(nbytes)
    source.fetch(number, memoryview(buffer), time.monotonic() + seconds)
    return bytes(buffer)


def test_tensors_come_one_after_another(sink: PeerSink) -> None:
    halves = (memoryview(DATA)[:1000], memoryview(DATA)[1000:])
    done = serve(sink, lambda number: sink.send(len(DATA) if number else 0, halves if number else ()))
    source = PeerSource(sink.address, TOKEN, lambda: False)
    assert fetched(source, 1, len(DATA)) == DATA
    assert fetched(source, 0, 0) == b""
    assert fetched(source, 2, len(DATA)) == DATA
    source.close()
    assert done.result(timeout=10) is None


def test_a_refusal_says_why(sink: PeerSink) -> None:
    serve(sink, lambda _: sink.refuse("an update has begun there"))
    source = PeerSource(sink.address, TOKEN, lambda: False)
    with pytest.raises(Refused, match="an update has begun there"):
        fetched(source, 0, 10)
    source.close()


def test_a_tensor_of_another_size_is_refused(sink: PeerSink) -> None:
    serve(sink, lambda _: sink.send(3, (memoryview(b"abc"),)))
    source = PeerSource(sink.address, TOKEN, lambda: False)
    with pytest.raises(PeerLost, match="a tensor of 3 bytes instead of 4"):
        fetched(source, 0, 4)
    source.close()


def test_who_does_not_know_the_name_gets_nothing(sink: PeerSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "_CONNECT_SECONDS", 1.0)
    done = serve(sink, lambda _: sink.send(3, (memoryview(b"abc"),)))
    with pytest.raises((TimeoutError, RuntimeError), match="the peer"):
        PeerSource(sink.address, "another name", lambda: False)
    with pytest.raises(TimeoutError, match="did not connect"):
        done.result(timeout=10)


def test_a_stranger_in_the_peers_place_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(bytes(16))
            connection.recv(100)
            connection.sendall(bytes(32))
            time.sleep(0.5)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        with pytest.raises(RuntimeError, match="is not the peer of this update"):
            PeerSource(f"127.0.0.1:{listener.getsockname()[1]}", TOKEN, lambda: False)


def test_a_silent_peer_is_lost(sink: PeerSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "_SILENT_SECONDS", 0.3)
    serve(sink, lambda _: time.sleep(2))
    source = PeerSource(sink.address, TOKEN, lambda: False)
    started = time.monotonic()
    with pytest.raises(PeerLost, match="the peer was silent"):
        fetched(source, 0, 4)
    assert time.monotonic() - started < 1.5
    source.close()


def test_the_deadline_ends_a_slow_transfer(sink: PeerSink) -> None:
    def slow(_: int) -> None:
        sink.send(10 << 20, (time.sleep(0.2) or memoryview(bytes(1 << 20)) for _ in range(10)))  # type: ignore[func-returns-value]

    serve(sink, slow)
    source = PeerSource(sink.address, TOKEN, lambda: False)
    with pytest.raises(TimeoutError, match="did not arrive in time"):
        fetched(source, 0, 10 << 20, seconds=0.5)
    source.close()


def test_a_peer_that_dies_is_lost(sink: PeerSink) -> None:
    serve(sink, lambda _: sink.close())
    source = PeerSource(sink.address, TOKEN, lambda: False)
    with pytest.raises(PeerLost, match="the connection to the peer broke"):
        fetched(source, 0, 4)
    source.close()


def test_giving_up_ends_a_wait_at_once(sink: PeerSink) -> None:
    over = threading.Event()
    serve(sink, lambda _: time.sleep(2))
    source = PeerSource(sink.address, TOKEN, over.is_set)

    def give_up() -> None:
        over.set()
        source.shut_down()

    threading.Timer(0.2, give_up).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        fetched(source, 0, 4)
    assert time.monotonic() - started < 1.0
    source.close()


def test_an_offer_that_nobody_takes_ends(sink: PeerSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "_CONNECT_SECONDS", 0.3)
    with pytest.raises(TimeoutError):
        sink.accept(TOKEN)
