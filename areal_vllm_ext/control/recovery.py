"""Recovery: how a client or the directory resolves an update that an earlier client left in doubt. No I/O.

A coordinator sends its first commit only after every engine was prepared and paused. So if one engine committed, every
other engine can, and must. If none committed, none will, because the new epoch fences the earlier client off.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..protocol import Abort, AdoptEpoch, Commit, EngineRequest, Resume, Status

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Recovery:
    """Requests by engine, to be sent in this order: ``resolve``, ``adopt``, ``resume``.

    Attributes:
        resolve: commit or abort.
        adopt: make the new epoch the committed one.
        resume: let the engine generate again; empty while something is to be resolved, because only then an engine tells
            whether it is tainted or stale.
        wait: an engine is committing, so ask again soon.
    """

    resolve: dict[str, EngineRequest]
    adopt: dict[str, EngineRequest]
    resume: dict[str, EngineRequest]
    wait: bool


def plan(statuses: Mapping[str, Status], epoch: int, *, all_here: bool = True) -> Recovery:
    """Return the requests that bring every engine back to serving one version.

    Args:
        statuses: each engine's status, taken after the engine was fenced with ``epoch``.
        epoch: the new epoch.
        all_here: whether ``statuses`` has all engines. An engine that is away may have committed. So if the others abort,
            they adopt the new epoch, and the engine is stale when it comes back.
    """
    committed = {status.last_update for status in statuses.values()}
    committed |= {status.update for status in statuses.values() if status.update_phase == "committing"}
    resolve: dict[str, EngineRequest] = {}
    for name, status in statuses.items():
        if status.update_phase == "prepared" and status.update in committed:
            resolve[name] = Commit(epoch=epoch, update=status.update)
        elif status.update_phase in ("receiving", "prepared"):
            resolve[name] = Abort(epoch=epoch, update=status.update, reason=_silent(epoch))
    wait = any(status.update_phase == "committing" for status in statuses.values())
    current = _current(statuses, resolve)
    adopt: dict[str, EngineRequest] = {}
    if not all_here and not wait and any(isinstance(request, Abort) for request in resolve.values()):
        adopt = {name: AdoptEpoch(epoch=epoch) for name in current}
    resume: dict[str, EngineRequest] = {}
    if not resolve and not wait:
        resume = _resume(statuses, current, epoch)
    return Recovery(resolve, adopt, resume, wait)


def _silent(epoch: int) -> str:
    return (
        f"its client was gone or stood still until its lease was over, and a newer client or the directory (epoch {epoch}) "
        "gave it up: send it again"
    )


def _current(statuses: Mapping[str, Status], resolve: Mapping[str, EngineRequest]) -> set[str]:
    """Return the engines that have the group's weights once ``resolve`` is done: neither tainted nor stale."""
    newest = max((status.committed_epoch for status in statuses.values()), default=0)
    return {
        name
        for name, status in statuses.items()
        if status.update_phase not in ("tainted", "stale")
        and (isinstance(resolve.get(name), Commit) or status.committed_epoch >= newest)
    }


def _resume(statuses: Mapping[str, Status], current: set[str], epoch: int) -> dict[str, EngineRequest]:
    """Return what lets the engines run that were left paused, and those of a replica whose user's pause is orphaned."""
    orphaned = {status.engine.replica for status in statuses.values() if status.orphaned}
    # The ranks of an MoE group resume together, so a replica in which one sleeps waits for the client that wakes it up.
    orphaned -= {status.engine.replica for status in statuses.values() if status.sleep != "awake"}
    return {
        name: Resume(epoch=epoch, update="" if status.engine.replica in orphaned else status.paused_for)
        for name, status in statuses.items()
        if name in current
        and status.generation != "running"
        and (status.paused_for or status.engine.replica in orphaned)
    }
