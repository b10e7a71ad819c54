"""Versions, as AReaL writes them into paths and names."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PATH = re.compile(r"weight_update_v(\d+)/*$")
_ADAPTER = re.compile(r"(.+)-v(\d+)$")


def version_of_path(path: str) -> int | None:
    """Return the N of a directory ``weight_update_vN``; None if it is called otherwise."""
    found = _PATH.search(path)
    return int(found[1]) if found else None


def version_of_adapter(name: str) -> int | None:
    """Return the N of an adapter ``name-vN``; None if it is called otherwise."""
    found = _ADAPTER.match(name)
    return int(found[2]) if found else None


def outdated(newest: str, served: Iterable[str]) -> list[str]:
    """Return the versions of an adapter that need not be served any more when ``newest`` is.

    Each version has a name of its own. The one before stays, for requests that give its name until they hear of the newest.
    """
    if not (new := _ADAPTER.match(newest)):
        return []
    versions = [found for name in served if (found := _ADAPTER.match(name)) and found[1] == new[1]]
    older = sorted((int(one[2]), one[0]) for one in versions if int(one[2]) < int(new[2]))
    return [name for _, name in older[:-1]]
