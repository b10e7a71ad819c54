"""Timing that both sides of a connection rely on, in seconds."""

from __future__ import annotations

# An engine reports to the directory at this interval.
HEARTBEAT_SECONDS = 1.0
# An engine is lost after this time without a heartbeat.
LOST_AFTER_SECONDS = 5.0
# A directory that is full makes room by removing engines that have been lost for this time.
FORGOTTEN_AFTER_SECONDS = 60.0
# A directory that has just started has heard from every engine that is alive once this time is over.
SETTLE_SECONDS = 2.5
