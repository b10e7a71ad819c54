"""The steps of vLLM's own weight transfer that ``Call`` carries instead of a user's method. For both ends of a call.

``READY`` asks whether a worker could take part. Between ``START`` and ``FINISH`` the live weights are half loaded, so the
engine is tainted. ``ABANDON`` ends a session that failed. The arguments are those of vLLM's methods;
``FINISH`` has the version.
"""

from __future__ import annotations

_PREFIX = "areal_transfer_"

READY = f"{_PREFIX}ready"
INIT = f"{_PREFIX}init"
START = f"{_PREFIX}start"
UPDATE = f"{_PREFIX}update"
FINISH = f"{_PREFIX}finish"
ABANDON = f"{_PREFIX}abandon"
SHUTDOWN = f"{_PREFIX}shutdown"

STEPS = frozenset({READY, INIT, START, UPDATE, FINISH, ABANDON, SHUTDOWN})


def name_of(method: str) -> str:
    """Return the step's short name."""
    return method.removeprefix(_PREFIX)
