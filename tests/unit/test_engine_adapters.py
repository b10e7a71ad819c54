"""Which adapter a request means: the engine's table of versions, and the names that a front end accepts."""

from __future__ import annotations

import asyncio
import inspect
import queue
from types import SimpleNamespace
from typing import Any

import pytest

from areal_vllm_ext.engine_core.adapters import BY_NAME, Adapters, UnknownAdapter
from areal_vllm_ext.engine_core.front_end import AdapterNames
from areal_vllm_ext.protocol import Adapter, Units


def lora(name: str, number: int = 1, path: str = BY_NAME) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, path)


class Request:
    """What is asked of vLLM's request."""

    def __init__(self, adapter: Any) -> None:
        self.request_id, self.client_index, self.lora_request = "r", 0, adapter
        self.block_hashes: list[str] = []
        self.update_block_hashes()

    def update_block_hashes(self) -> None:
        self.block_hashes.append(self.lora_request.lora_name if self.lora_request else "base")


class Engine:
    """What is asked of vLLM's engine."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(lora_config=SimpleNamespace(max_cpu_loras=2, max_loras=1))
        self.scheduler = SimpleNamespace(requests={})
        self.model_executor = SimpleNamespace(collective_rpc=self.load_on_workers)
        self.loaded: list[int] = []
        self.needed: set[int] = set()
        self.kept: list[tuple[int, ...]] = []  # by each worker
        self.added: list[Request] = []
        self.errors: list[str] = []
        self._weight_version = "start"
        self.output_queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.adapters = Adapters(self)

    def add_lora(self, lora_request: Any) -> bool:
        raise AssertionError("it is replaced")

    def load_on_workers(self, method: str, args: tuple[Any, tuple[int, ...]]) -> list[tuple[int, ...]]:
        wanted, needed = args
        assert method == "areal_load_adapter"
        if wanted.lora_path == "/gone":
            raise RuntimeError("No adapter found for /gone")
        self.loaded.append(wanted.lora_int_id)
        self.needed = set(needed)
        return self.kept or [needed, needed]

    def preprocess_add_request(self, request: Any) -> tuple[Request, int]:
        return Request(request.lora_request), 0

    def add_request(self, request: Request, request_wave: int = 0) -> None:
        self.added.append(request)

    def _send_error_outputs_to_client(self, requests: list[str], client: int) -> None:
        self.errors += requests

    def commit(self, version: int = 1, removed: tuple[str, ...] = (), **manifests: str) -> tuple[int, ...]:
        """Commit adapters; returns the numbers that workers keep."""
        units = Units(False, tuple(Adapter(name, "{}", one) for name, one in manifests.items()), removed)
        numbers = self.adapters.numbers_of(units)
        kept = self.adapters.in_use_after(units, numbers)
        self.adapters.commit(units, numbers, kept, dict.fromkeys(numbers, str(version)))
        self._weight_version = str(version)
        return kept

    def _attach_weight_version(self, outputs: dict[int, Any]) -> None:
        for batch in outputs.values():
            batch.weight_version = self._weight_version

    def outputs(self, *requests: str, finished: tuple[str, ...] = ()) -> list[tuple[list[str], str]]:
        """Which requests' outputs leave the engine together, and the version that they carry."""
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

        made = [
            EngineCoreOutput(name, [1], finish_reason=FinishReason.STOP if name in finished else None)
            for name in requests
        ]
        batches = {0: EngineCoreOutputs(outputs=made)}
        self._attach_weight_version(batches)
        sent = [self.output_queue.get()[1] for _ in range(self.output_queue.qsize())]
        return [([one.request_id for one in batch.outputs], batch.weight_version) for batch in (*sent, batches[0])]

    def hears(self, adapter: Any) -> Request:
        """A request that its thread has read, and that waits for the loop."""
        return self.preprocess_add_request(SimpleNamespace(lora_request=adapter))[0]


def test_a_request_gets_the_version_that_is_current_when_it_comes() -> None:
    engine = Engine()
    engine.commit(math="one")
    first = engine.hears(lora("math"))
    engine.add_request(first)
    engine.scheduler.requests = {"r": first}
    assert len(engine.commit(math="two")) == 2, "a request still runs on the first version"
    second = engine.hears(lora("math"))
    engine.add_request(second)
    assert [one.lora_request.lora_name for one in engine.added] == ["math:one", "math:two"]
    assert [one.block_hashes for one in engine.added] == [["math:one"], ["math:two"]]
    assert first.lora_request.lora_int_id != second.lora_request.lora_int_id
    engine.scheduler.requests = {}
    assert engine.commit(code="three") == (
        second.lora_request.lora_int_id,
        engine.adapters._current["code"].lora_int_id,
    )


def test_a_request_that_waited_for_the_loop_while_an_update_was_committed_is_hashed_anew() -> None:
    engine = Engine()
    engine.commit(math="one")
    request = engine.hears(lora("math"))
    engine.commit(math="two")
    engine.add_request(request)
    assert request.lora_request.lora_name == "math:two"
    assert request.block_hashes == ["math:two"]


def test_a_version_that_comes_again_while_requests_run_on_it_has_its_number() -> None:
    # vLLM takes requests of one name as equal: with two numbers it would load only one of them.
    engine = Engine()
    engine.commit(math="one")
    request = engine.hears(lora("math"))
    engine.scheduler.requests = {"r": request}
    engine.commit(math="two")
    engine.commit(math="one")
    assert engine.hears(lora("math")).lora_request.lora_int_id == request.lora_request.lora_int_id


def test_outputs_carry_the_version_of_their_requests_adapter() -> None:
    engine = Engine()
    engine.commit(1, math="one", code="one")
    engine.scheduler.requests = {name: engine.hears(lora(name)) for name in ("math", "code")}
    engine.scheduler.requests["base"] = engine.hears(None)
    assert engine.outputs("math", "code", "base") == [(["math", "code", "base"], "1")]
    engine.commit(2, math="two")
    engine.commit(3, math="three")
    assert engine.outputs("math", "code", "base") == [(["math"], "1"), (["code", "base"], "3")]
    assert engine.outputs("math", "base", finished=("math",)) == [(["math"], "1"), (["base"], "3")]
    assert engine.outputs("math", "base") == [(["math", "base"], "3")], "another request of that name"


def test_a_removed_adapter_is_an_error_of_its_request_only() -> None:
    engine = Engine()
    engine.commit(math="one")
    waiting = engine.hears(lora("math"))
    engine.commit(removed=("math",))
    engine.add_request(waiting)
    assert engine.errors == ["r"]
    assert engine.added == []
    with pytest.raises(UnknownAdapter, match="this engine has no adapter math"):
        engine.hears(lora("math"))
    engine.add_request(engine.hears(None))
    assert len(engine.added) == 1


def test_another_users_adapter_is_loaded_before_its_request_can_end_the_engine() -> None:
    engine = Engine()
    for _ in range(2):
        engine.add_request(engine.hears(lora("theirs", 1, "/there")))
    assert engine.loaded == [1], "the workers have it"
    engine.add_request(engine.hears(lora("lost", 2, "/gone")))
    assert engine.errors == ["r"]
    engine.add_request(engine.hears(lora("theirs", 1, "/there")))
    assert engine.loaded == [1, 1], "a worker may have dropped it when another one failed"
    engine.kept = [(1, 3), (3,)]
    engine.add_request(engine.hears(lora("n3", 3, "/there")))
    engine.add_request(engine.hears(lora("n3", 3, "/there")))
    assert engine.loaded == [1, 1, 3]
    engine.add_request(engine.hears(lora("theirs", 1, "/gone")))
    assert engine.errors == ["r", "r"], "one worker has dropped it"


def test_workers_keep_another_users_adapter_that_requests_still_need() -> None:
    engine = Engine()
    waiting = engine.hears(lora("theirs", 1, "/there"))
    engine.add_request(waiting)
    engine.scheduler.requests = {"r": waiting, "base": engine.hears(None)}
    for number in (2, 3):  # vLLM keeps two, so it drops the first
        engine.add_request(engine.hears(lora(f"n{number}", number, "/there")))
        assert engine.needed == {1, number}
    assert engine.add_lora(lora("n4", 4, "/there")), "through vLLM's own route"
    assert engine.needed == {1, 4}
    engine.scheduler.requests = {}
    assert engine.add_lora(lora("n5", 5, "/there"))
    assert engine.needed == {5}


def test_another_user_cannot_load_an_adapter_of_the_groups_name() -> None:
    engine = Engine()
    engine.commit(math="one")
    with pytest.raises(ValueError, match="adapter math belongs to the group, because an update brought it"):
        engine.add_lora(lora("math", 1, "/there"))
    assert engine.loaded == []
    # vLLM makes a request of what comes over its wire by the annotation.
    assert list(inspect.signature(engine.add_lora).parameters) == ["lora_request"]
    engine.commit(removed=("math",))
    assert engine.add_lora(lora("math", 1, "/there"))


class FrontEnd:
    """What is asked of vLLM's ``OpenAIServingModels``, with two engines behind it."""

    def __init__(self) -> None:
        self.served: list[dict[str, str]] = [{}, {}]
        self.asked = 0
        config = SimpleNamespace(
            lora_config=object(),
            parallel_config=SimpleNamespace(worker_extension_cls="areal_vllm_ext.worker.WorkerExtension"),
        )
        core = SimpleNamespace(call_utility_all_async=self._call)
        self.engine_client = SimpleNamespace(vllm_config=config, engine_core=core)
        self.lora_requests: dict[str, Any] = {}

    def is_base_model(self, name: str) -> bool:
        return name == "base"

    async def _call(self, method: str) -> list[dict[str, str]]:
        assert method == "areal_adapters"
        self.asked += 1
        return [dict(one) for one in self.served]


def test_a_front_end_asks_for_a_name_that_it_does_not_know_and_forgets_removed_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        models: Any = FrontEnd()
        models.lora_requests["theirs"] = theirs = lora("theirs", 3, "/there")
        names = AdapterNames.of(models)
        assert names is AdapterNames.of(models)
        assert names is not None
        await names.look_up("base")
        assert models.asked == 0
        models.served[0]["math"] = "1"
        await names.look_up("math")
        assert set(models.lora_requests) == {"theirs"}, "one engine has it, and the other not yet"
        models.served[1]["math"] = "1"
        await names.look_up("math")
        assert models.lora_requests["math"].lora_path == BY_NAME
        for _ in range(3):
            await names.look_up("math")
        assert models.asked == 2, "it was known, and that is not long ago"
        models.served[0].clear()
        monkeypatch.setattr("areal_vllm_ext.engine_core.front_end._FRESH_SECONDS", 0.0)
        await names.look_up("math")  # answered with what is known, and asked meanwhile
        await asyncio.sleep(0.01)
        assert models.lora_requests == {"theirs": theirs}

    asyncio.run(run())


def test_a_front_end_changes_no_adapter_of_the_group() -> None:
    async def run() -> None:
        models: Any = FrontEnd()
        models.served = [{"math": "1"}, {"math": "1"}]
        names = AdapterNames.of(models)
        assert names is not None
        assert "adapter math belongs to the group" in await names.refusal("math")
        assert await names.refusal("theirs") == ""
        models.served = [{}, {}]
        assert await names.refusal("math") == "", "an update has removed it"

    asyncio.run(run())


def test_a_front_end_of_other_engines_is_left_alone() -> None:
    models: Any = FrontEnd()
    models.engine_client.vllm_config.parallel_config.worker_extension_cls = ""
    assert AdapterNames.of(models) is None
    models = FrontEnd()
    models.engine_client.vllm_config.lora_config = None
    assert AdapterNames.of(models) is None
