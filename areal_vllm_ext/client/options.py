"""The options of an update."""

from __future__ import annotations

from typing import Literal

Senders = Literal["first", "parts", "colocated"]
