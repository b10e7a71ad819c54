"""What a client does, before anything else, about an update that its predecessor left behind. No I/O.

A coordinator sends its first commit only after every engine was prepared and paused. So if one engine committed, every
other can, and must; if none did, none will, because the new epoch fences the predecessor off.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..protocol import Abort, Commit, EngineRequest, Resume, Status

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Recovery:
    """Requests by engine: first ``settle`` (commit or abort), then ``resume``. ``wait``: an engine is switching just now."""

    settle: dict[str, EngineRequest]
    resume: dict[str, EngineRequest]
    wait: bool


def plan(statuses: Mapping[str, Status], epochs: Mapping[str, int], timeout: float) -> Recovery:
    """What brings every engine back to serving one version.

    Args:
        statuses: each engine's status, taken after it was fenced with its epoch.
        epochs: the new epoch of each engine.
        timeout: seconds that a resume may take.
    """
    committed = {status.last_update for status in statuses.values()}
    committed |= {status.update for status in statuses.values() if status.phase == "committing"}
    settle: dict[str, EngineRequest] = {}
    for name, status in statuses.items():
        if status.phase == "prepared" and status.update in committed:
            settle[name] = Commit(epoch=epochs[name], update=status.update)
        elif status.phase in ("receiving", "prepared"):
            settle[name] = Abort(epoch=epochs[name], update=status.update, reason="its client is gone")
    resume: dict[str, EngineRequest] = {
        name: Resume(epoch=epochs[name], timeout=timeout)
        for name, status in statuses.items()
        if status.flow != "running" and status.paused_for and status.phase != "tainted"
    }
    return Recovery(settle, resume, wait=any(status.phase == "committing" for status in statuses.values()))
