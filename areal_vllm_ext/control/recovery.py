"""What a client does, before anything else, about an update that its predecessor left behind. No I/O.

A coordinator sends its first commit only after every engine was prepared and paused. So if one engine committed, every
other can, and must; if none did, none will, because the new epoch fences the predecessor off.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..protocol import Abort, AdoptEpoch, Commit, EngineRequest, Resume, Status

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Recovery:
    """Requests by engine: first ``settle`` (commit or abort), then ``agree``, then ``resume``.

    ``wait``: an engine is switching just now.
    """

    settle: dict[str, EngineRequest]
    agree: dict[str, EngineRequest]
    resume: dict[str, EngineRequest]
    wait: bool


def plan(statuses: Mapping[str, Status], epoch: int, *, all_here: bool = True) -> Recovery:
    """What brings every engine back to serving one version.

    Args:
        statuses: each engine's status, taken after it was fenced with ``epoch``.
        epoch: the new epoch.
        all_here: whether ``statuses`` are those of all engines. One that is away may have committed: where the others
            abort, they agree on that with the new epoch, and it is stale when it comes back.
    """
    committed = {status.last_update for status in statuses.values()}
    committed |= {status.update for status in statuses.values() if status.update_phase == "committing"}
    settle: dict[str, EngineRequest] = {}
    for name, status in statuses.items():
        if status.update_phase == "prepared" and status.update in committed:
            settle[name] = Commit(epoch=epoch, update=status.update)
        elif status.update_phase in ("receiving", "prepared"):
            settle[name] = Abort(epoch=epoch, update=status.update, reason="its client is gone")
    wait = any(status.update_phase == "committing" for status in statuses.values())
    current = _current(statuses, settle)
    agree: dict[str, EngineRequest] = {}
    if not all_here and not wait and any(isinstance(request, Abort) for request in settle.values()):
        agree = {name: AdoptEpoch(epoch=epoch) for name in current}
    orphaned = {status.engine.replica for status in statuses.values() if status.orphaned}
    resume: dict[str, EngineRequest] = {
        name: Resume(epoch=epoch)
        for name, status in statuses.items()
        if name in current
        and status.generation != "running"
        and (status.paused_for or status.engine.replica in orphaned)
    }
    return Recovery(settle, agree, resume, wait)


def _current(statuses: Mapping[str, Status], settle: Mapping[str, EngineRequest]) -> set[str]:
    """The engines that will have the group's weights once ``settle`` is done: neither tainted nor stale."""
    newest = max((status.committed_epoch for status in statuses.values()), default=0)
    return {
        name
        for name, status in statuses.items()
        if status.update_phase not in ("tainted", "stale")
        and (isinstance(settle.get(name), Commit) or status.committed_epoch >= newest)
    }
