"""New requests never meet keys and values of old weights: each update gives vLLM's prefix cache a new root.

vLLM finds cached blocks by a chain of hashes. The first hash of a request takes in its ``cache_salt``; here also the update
whose weights compute the request. So nothing needs to be dropped: blocks of earlier weights are not found any more, in the
engine or in a store beside it, and are the first to be evicted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

# Requests in these states have no blocks. A request that waits for blocks from another engine has them already.
_WITHOUT_BLOCKS = ("WAITING", "PREEMPTED", "WAITING_FOR_FSM", "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR")


class PrefixRoot:
    """The root of one engine's prefix cache.

    Attributes:
        root: names the update whose weights new requests meet; empty before the first.
    """

    def __init__(self, engine: Any) -> None:
        """Salt the hashes of ``engine``'s requests, if it has a prefix cache."""
        self.root = ""
        self._scheduler: Scheduler = engine.scheduler
        self._hashes: Callable[[Request], list[BlockHash]] | None = getattr(engine, "request_block_hasher", None)
        if self._hashes is not None:
            engine.request_block_hasher = self._salted
            self._add, engine.scheduler.add_request = engine.scheduler.add_request, self._added

    def move(self, root: str) -> None:
        """Let all requests that have nothing computed, now and later, start from ``root``. Runs on the engine's loop."""
        self.root = root
        if self._hashes is None:
            return
        for request in self._scheduler.requests.values():
            if request.num_computed_tokens == 0 and request.status.name in _WITHOUT_BLOCKS:
                self._hash_again(request)

    def _salted(self, request: Request) -> list[BlockHash]:
        """Return the hashes of ``request``'s new full blocks, as vLLM's own hasher does."""
        assert self._hashes is not None
        # Once and for all: a block may lie on both sides of an update, and its request keeps the root it began with.
        root = request.__dict__.setdefault("_areal_root", self.root)
        if request.block_hashes or not root:
            return self._hashes(request)
        salt = request.cache_salt
        request.cache_salt = f"{root} {salt or ''}"
        try:
            return self._hashes(request)
        finally:
            request.cache_salt = salt

    def _added(self, request: Request) -> None:
        # vLLM hashes a request on the thread that receives it, perhaps before an update that the loop has carried out since.
        if request.__dict__.get("_areal_root") != self.root and request.num_computed_tokens == 0:
            self._hash_again(request)
        self._add(request)

    def _hash_again(self, request: Request) -> None:
        request.__dict__["_areal_root"] = self.root
        request.block_hashes.clear()
        request.block_hashes.extend(self._salted(request))
