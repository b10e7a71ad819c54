"""Which engines are missing from a group, in words. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from collections.abc import Set as AbstractSet

    from ..protocol import EngineInfo, Engines


def describe_missing(
    found: Engines, engines: int | None = None, dropped: AbstractSet[tuple[str, int]] = frozenset()
) -> str:
    """Say which engines are missing, by node and DP rank; empty if none is.

    Args:
        found: the directory's answer.
        engines: how many engines there should be (default: all ranks of every replica that was seen).
        dropped: replica and DP rank of engines that the group goes on without.
    """
    problems = [
        f"{engine.name} is lost: no heartbeat for {seconds:.0f} s"
        for engine, seconds in found.lost
        if _key(engine) not in dropped
    ]
    problems += [
        f"two engines registered as {engine.name}: give each replica its own AREAL_VLLM_REPLICA"
        for engine in found.displaced
    ]
    problems += [f"{engine.name} has just started, and joins when no client is at work" for engine in found.joining]
    explained = {_key(engine) for engine in (*found.joining, *(engine for engine, _ in found.lost))}
    problems += _never_registered(found.alive, explained | dropped | set(found.forgotten))
    if any(_key(engine) not in dropped for engine, _ in found.lost):
        problems.append("restart lost engines, or give them up for good: areal-vllm forget REPLICA DP_RANK")
    if problems:
        return "; ".join(problems)
    if not found.alive:
        return (
            "no engine has registered with the directory: start engines with --worker-extension-cls or AREAL_VLLM_ENABLE=1 "
            "(and name areal_vllm_ext in VLLM_PLUGINS, if that is set)"
        )
    if engines is not None and len(found.alive) < engines:
        names = ", ".join(engine.name for engine in found.alive)
        return f"{len(found.alive)} of {engines} engines registered: {names}"
    return ""


def _never_registered(alive: Iterable[EngineInfo], explained: AbstractSet[tuple[str, int]]) -> Iterator[str]:
    """Name the DP ranks of each replica that are neither alive nor ``explained``."""
    replicas: dict[str, list[EngineInfo]] = {}
    for engine in alive:
        replicas.setdefault(engine.replica, []).append(engine)
    for replica, ranks in sorted(replicas.items()):
        registered = {engine.dp_rank for engine in ranks}
        for rank in range(ranks[0].dp_size):
            if rank not in registered and (replica, rank) not in explained:
                seen = ", ".join(f"{engine.dp_rank} on {engine.node}" for engine in ranks)
                yield (
                    f"DP rank {rank} of replica {replica} never registered (registered: {seen}); is its node up, was it "
                    "started with --worker-extension-cls or AREAL_VLLM_ENABLE=1, and has it the same key file?"
                )


def _key(engine: EngineInfo) -> tuple[str, int]:
    return engine.replica, engine.dp_rank
