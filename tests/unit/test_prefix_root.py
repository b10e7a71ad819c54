"""Each update gives the prefix cache a new root, with vLLM's own requests and hashes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from lazily import Lazily

from areal_vllm_ext.engine_core.prefix_root import PrefixRoot

if TYPE_CHECKING:
    from vllm.v1.request import Request

vllm, hashing = Lazily("vllm"), Lazily("vllm.utils.hashing")
cache, requests = Lazily("vllm.v1.core.kv_cache_utils"), Lazily("vllm.v1.request")

BLOCK = 16


class Engine:
    """Where vLLM's EngineCore hashes requests and hands them to its scheduler."""

    def __init__(self) -> None:
        cache.init_none_hash(hashing.sha256)
        self.request_block_hasher: Any = cache.get_request_block_hasher(BLOCK, hashing.sha256)
        self.scheduler = SimpleNamespace(requests={}, add_request=self._schedule)

    def _schedule(self, request: Request) -> None:
        self.scheduler.requests[request.request_id] = request

    def received(self, name: str, tokens: int = 40, salt: str | None = None) -> Request:
        sampling = vllm.SamplingParams(max_tokens=100)
        hasher = self.request_block_hasher
        return requests.Request(name, list(range(tokens)), sampling, None, cache_salt=salt, block_hasher=hasher)

    def request(self, name: str, tokens: int = 40, salt: str | None = None) -> Request:
        request = self.received(name, tokens, salt)
        self.scheduler.add_request(request)
        return request


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def root(engine: Engine) -> PrefixRoot:
    return PrefixRoot(engine)


def test_before_the_first_update_hashes_are_vllms_own(engine: Engine, root: PrefixRoot) -> None:
    assert engine.request("a").block_hashes == Engine().request("a").block_hashes


def test_requests_of_two_updates_share_no_block_and_those_of_one_do(engine: Engine, root: PrefixRoot) -> None:
    hashes = [list(engine.request("none").block_hashes)]
    for update in ("u", "v"):
        root.move(update)
        first, second = (engine.request(f"{update}{number}").block_hashes for number in (1, 2))
        assert first == second
        hashes.append(list(first))
    assert len({hash_ for one in hashes for hash_ in one}) == 3 * 2


def test_equal_updates_have_equal_roots_on_all_engines() -> None:
    """Engines that hand each other cached blocks find them by the same hashes."""
    hashes = []
    for _ in range(2):
        engine = Engine()
        PrefixRoot(engine).move("u")
        hashes.append(engine.request("a").block_hashes)
    assert hashes[0] == hashes[1]


def test_a_users_salt_still_separates(engine: Engine, root: PrefixRoot) -> None:
    root.move("u")
    plain, salted = engine.request("a"), engine.request("b", salt="mine")
    assert not set(plain.block_hashes) & set(salted.block_hashes)
    assert salted.cache_salt == "mine"


def test_a_request_that_has_begun_keeps_its_root(engine: Engine, root: PrefixRoot) -> None:
    """Its blocks mix two weights: who starts later must not find them, also the one that the update cuts in two."""
    begun = engine.request("a", tokens=BLOCK + 4)
    begun.status, begun.num_computed_tokens = requests.RequestStatus.RUNNING, BLOCK + 4
    short = engine.request("b", tokens=BLOCK - 4)
    short.status, short.num_computed_tokens = requests.RequestStatus.RUNNING, BLOCK - 4
    root.move("u")
    begun.append_output_token_ids(list(range(BLOCK + 4, 2 * BLOCK)))
    short.append_output_token_ids(list(range(BLOCK - 4, BLOCK)))
    assert len(begun.block_hashes) == 2
    assert len(short.block_hashes) == 1
    later = engine.request("c", tokens=2 * BLOCK)
    assert not set(later.block_hashes) & {*begun.block_hashes, *short.block_hashes}


@pytest.mark.parametrize("status", ["WAITING", "PREEMPTED"])
def test_a_request_with_nothing_computed_moves_to_the_new_root(engine: Engine, root: PrefixRoot, status: str) -> None:
    waiting = engine.request("a")
    waiting.status = requests.RequestStatus[status]
    root.move("u")
    assert waiting.block_hashes == engine.request("b").block_hashes


def test_a_request_that_was_received_before_and_added_after_moves_too(engine: Engine, root: PrefixRoot) -> None:
    received = engine.received("a")
    root.move("u")
    engine.scheduler.add_request(received)
    assert received.block_hashes == engine.request("b").block_hashes


def test_a_request_whose_blocks_come_from_another_engine_is_left_alone(engine: Engine, root: PrefixRoot) -> None:
    remote = engine.request("a")
    remote.status = requests.RequestStatus.WAITING_FOR_REMOTE_KVS
    before = list(remote.block_hashes)
    root.move("u")
    assert remote.block_hashes == before


def test_an_engine_without_a_prefix_cache_is_left_alone() -> None:
    engine = Engine()
    engine.request_block_hasher = None
    add = engine.scheduler.add_request
    PrefixRoot(engine).move("u")
    assert engine.request_block_hasher is None
    assert engine.scheduler.add_request is add
