"""A trainer of two ranks: processes of one torch.distributed job (gloo), which do what they are told, and can be killed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import peers
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from areal_vllm_ext import EngineGroup

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

SIZE = 2


class Ranks:
    """The processes."""

    def __init__(self, port: int, directory: str, key_file: str) -> None:
        self._started = [peers.start(serve, rank, port, directory, key_file) for rank in range(SIZE)]
        self.pids = [process.pid for process, _ in self._started]
        for _, connection in self._started:
            assert connection.poll(120)
            assert connection.recv() == "ready"

    def begin(self, *work: str, **options: Any) -> None:
        """Have each rank do its ``work``, named as below; one name is for all."""
        for rank, (_, connection) in enumerate(self._started):
            connection.send((work[min(rank, len(work) - 1)], options))

    def outcome(self, rank: int, timeout: float = 20.0) -> tuple[str, str, float]:
        """What became of it: the error's type or an empty string, its message or the version, and how long it took."""
        _, connection = self._started[rank]
        assert connection.poll(timeout), f"rank {rank} hangs"
        outcome: tuple[str, str, float] = connection.recv()
        return outcome

    def both(self, *work: str, **options: Any) -> list[tuple[str, str, float]]:
        self.begin(*work, **options)
        return [self.outcome(rank) for rank in range(SIZE)]

    def heard(self, rank: int, what: str) -> None:
        _, connection = self._started[rank]
        assert connection.poll(20)
        assert connection.recv() == what

    def close(self) -> None:
        for process, connection in self._started:
            peers.end(process, connection)


# What a rank does


def serve(connection: Connection, rank: int, port: int, directory: str, key_file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=SIZE, timeout=timedelta(seconds=60)
    )
    group = EngineGroup.connect(directory, key_file=key_file)
    parts(0)  # imports, and meets
    connection.send("ready")
    while True:
        name, options = connection.recv()
        started = time.monotonic()
        try:
            outcome = "", str(update(group, connection, globals()[name], **options))
        except BaseException as error:
            outcome = type(error).__name__, str(error)
        connection.send((*outcome, time.monotonic() - started))


def update(
    group: EngineGroup,
    connection: Connection,
    work: Callable[..., Any],
    seed: int,
    timeout: float,
    bucket: int,
    **given: Any,
) -> object:
    from real_receivers import set_bucket_bytes

    opened = group.update(seed, process_group=dist.group.WORLD, timeout=timeout, **given)
    set_bucket_bytes(opened, bucket)
    with opened:
        work(opened, seed, connection)
    return opened.result.version


def tensors(seed: int) -> dict[str, torch.Tensor]:
    from real_receivers import weights

    return weights(seed)


def parts(seed: int, dim: int = 0) -> dict[str, torch.Tensor]:
    """As a sharded trainer has them: each rank a part of each tensor."""
    mesh = init_device_mesh("cpu", (SIZE,))
    return {
        name: distribute_tensor(tensor, mesh, [Shard(dim) if tensor.ndim > dim else Replicate()])
        for name, tensor in tensors(seed).items()
    }


class Model(torch.nn.Module):
    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.embed = torch.nn.Parameter(torch.zeros_like(state["embed"]))
        self.layer = torch.nn.ParameterList([torch.zeros_like(state[f"layer.{i}"]) for i in range(2)])
        self.norm = torch.nn.Parameter(torch.zeros_like(state["norm"]))
        self.scale = torch.nn.Parameter(torch.zeros_like(state["scale"]))
        self.load_state_dict(state)


def fsdp(opened: Any, seed: int, _: Connection) -> None:
    model = Model(tensors(seed))
    fully_shard(model, mesh=init_device_mesh("cpu", (SIZE,)), ignored_params={model.scale})
    assert model.embed.to_local().shape[0] == 50
    opened.send(model)


def rows(opened: Any, seed: int, _: Connection) -> None:
    opened.send(parts(seed))


def adapter_tensors(seed: int) -> dict[str, torch.Tensor]:
    return {f"layer.{part}": torch.arange(12.0).view(4, 3) + seed for part in ("lora_A", "lora_B")}


def with_adapter(opened: Any, seed: int, _: Connection) -> None:
    """Weights, and an adapter of which each rank has rows."""
    opened.send(parts(seed))
    adapter_alone(opened, seed, _)


def adapter_alone(opened: Any, seed: int, _: Connection) -> None:
    mesh = init_device_mesh("cpu", (SIZE,))
    sharded = {name: distribute_tensor(one, mesh, [Shard(0)]) for name, one in adapter_tensors(seed).items()}
    opened.send_adapter("math", (sharded, {"r": 4}))
    opened.remove_adapter("old")


def columns(opened: Any, seed: int, _: Connection) -> None:
    opened.send(parts(seed, dim=1))


def one_by_one(opened: Any, seed: int, _: Connection) -> None:
    opened.send(iter(parts(seed).items()))


def whole(opened: Any, seed: int, _: Connection) -> None:
    """Not sharded, so without a collective."""
    opened.send(tensors(seed))


def whole_where_others_have_rows(opened: Any, seed: int, _: Connection) -> None:
    parts(seed)  # the others' collectives
    opened.send(tensors(seed))


def own_layers(opened: Any, seed: int, _: Connection) -> None:
    """As a pipeline has them: each rank other tensors."""
    held = list(tensors(seed).items())
    opened.send(dict(held[:3] if dist.get_rank() == 0 else held[3:]))


def one_has_nearly_all(opened: Any, seed: int, _: Connection) -> None:
    """Rank 1 sends nothing, but has a part of a tensor that rank 0 sends."""
    norm, rest = parts(seed)["norm"], tensors(seed)
    opened.send({"norm": norm} if dist.get_rank() else {"norm": norm, **{n: t for n, t in rest.items() if n != "norm"}})


def fails_to_meet(opened: Any, seed: int, _: Connection) -> None:
    from areal_vllm_ext.transport.broadcast import BroadcastSink

    connect = BroadcastSink.connect
    BroadcastSink.connect = lambda *_: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    try:
        opened.send(tensors(seed))
    finally:
        BroadcastSink.connect = connect  # type: ignore[method-assign]


def not_in_step(opened: Any, seed: int, _: Connection) -> None:
    """As a data-parallel trainer has them whose ranks have drifted apart."""
    opened.send(tensors(seed + dist.get_rank()))


def writes_to_what_it_shares(opened: Any, seed: int, _: Connection) -> None:
    """By CUDA IPC; here what torch's counters would say is planted."""
    opened.send(tensors(seed))
    opened._transaction.sharing.changed = lambda: "norm was changed before the update was over"


def dies_in_its_part(opened: Any, seed: int, _: Connection) -> None:
    held = tensors(seed)
    held["layer.1"].full_tensor = lambda: os.kill(os.getpid(), 9)  # type: ignore[attr-defined]
    opened.send(held)


def fails_in_its_part(opened: Any, seed: int, _: Connection) -> None:
    held = tensors(seed)
    held["layer.1"].full_tensor = lambda: 1 / 0  # type: ignore[attr-defined]
    opened.send(held)


def in_double(opened: Any, seed: int, _: Connection) -> None:
    opened.send({name: part.double() for name, part in parts(seed).items()}, dtype="float32")


def fewer(opened: Any, seed: int, _: Connection) -> None:
    opened.send({name: part for name, part in parts(seed).items() if name != "norm"})


def not_finite(opened: Any, seed: int, _: Connection) -> None:
    held = parts(seed)
    held["norm"] = held["norm"] * float("nan")
    opened.send(held)


def gathers_at_each_step(opened: Any, seed: int, _: Connection) -> None:
    """As TRL, verl and OpenRLHF do: the iterator itself is a collective at each step."""
    held = tensors(seed)
    held["embed"] = held["embed"] * float("nan")

    def walk() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in held.items():
            dist.all_reduce(tensor.clone())
            yield name, tensor

    opened.send(walk())


def _fails_at(seed: int, what: Callable[[], object]) -> Iterator[tuple[str, torch.Tensor]]:
    held = parts(seed)  # now: it is a collective

    def walk() -> Iterator[tuple[str, torch.Tensor]]:
        for place, entry in enumerate(held.items()):
            if place == 3:
                what()
            yield entry

    return walk()


def raises(opened: Any, seed: int, _: Connection) -> None:
    opened.send(_fails_at(seed, lambda: 1 / 0))


def raises_afterwards(opened: Any, seed: int, _: Connection) -> None:
    opened.send(parts(seed))
    raise ZeroDivisionError


def raises_and_hides_it(opened: Any, seed: int, _: Connection) -> None:
    with contextlib.suppress(ZeroDivisionError):
        opened.send(_fails_at(seed, lambda: 1 / 0))


def waits(opened: Any, seed: int, connection: Connection) -> None:
    def wait() -> None:
        connection.send("waiting")
        time.sleep(60)

    opened.send(_fails_at(seed, wait))


def dies(opened: Any, seed: int, _: Connection) -> None:
    opened.send(_fails_at(seed, lambda: os.kill(os.getpid(), 9)))


def leaves_the_collective(opened: Any, seed: int, connection: Connection) -> None:
    """Fails inside a round, where nobody can be told: the others are in the collective already."""
    held = parts(seed)

    def broken() -> torch.Tensor:
        connection.send("left")
        time.sleep(60)
        raise AssertionError

    held["layer.1"].full_tensor = broken  # type: ignore[attr-defined]
    opened.send(held)


def sends_nothing(opened: Any, seed: int, _: Connection) -> None:
    pass
