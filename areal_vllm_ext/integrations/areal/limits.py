"""How long AReaL's trainer may take."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long the trainer may take, in seconds.

    Attributes:
        join: until every rank of its process group is there.
        idle: between two of its calls, from pause to continue. After it the update is given up and engines generate again.
        update: for a whole update, as AReaL's own requests.
    """

    join: float = 300.0
    idle: float = 600.0
    update: float = 3600.0
