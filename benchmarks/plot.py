"""Draw the times of every ``results/update_*.json`` into ``results/updates.svg``: ``python -m benchmarks.plot``."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_WIDTH, _LEFT, _RIGHT, _BAR = 900, 270, 110, 16
_SHORTEST_MS = 1.0
_TOTAL, _PAUSE = "#9ecae1", "#08519c"


def main() -> None:
    lines: list[tuple[str, dict[str, Any] | None]] = []
    for file in sorted(set(RESULTS.glob("update_*.json")) - set(RESULTS.glob("*.trace.json"))):
        found = json.loads(file.read_text())
        title = f"{file.stem.removeprefix('update_')}: {found['bytes'] / 1e6:.0f} MB, {found['tensors']} tensors"
        lines.append((f"{title}; {found['machine']}", None))
        lines += [(row["way"], row) for row in found["rows"] if row["right"] and "total_ms" in row]
    if not lines:
        return
    longest = max(row["total_ms"] for _, row in lines if row)
    decades = max(math.ceil(math.log10(longest / _SHORTEST_MS)), 1)

    def length(milliseconds: float) -> float:
        share = math.log10(max(milliseconds / _SHORTEST_MS, 1.0)) / decades
        return share * (_WIDTH - _LEFT - _RIGHT)

    height = (_BAR + 6) * len(lines) + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]
    for decade in range(decades + 1):
        x = _LEFT + length(_SHORTEST_MS * 10**decade)
        parts.append(f'<line x1="{x:.0f}" y1="24" x2="{x:.0f}" y2="{height - 30}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.0f}" y="16" text-anchor="middle">{_SHORTEST_MS * 10**decade:g} ms</text>')
    for place, (label, row) in enumerate(lines):
        y = 30 + place * (_BAR + 6)
        if row is None:
            parts.append(f'<text x="8" y="{y + _BAR - 3}" font-weight="bold">{escape(label)}</text>')
            continue
        total, pause = row["total_ms"], row.get("pause_ms")
        parts.append(f'<text x="{_LEFT - 8}" y="{y + _BAR - 3}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{length(total):.1f}" height="{_BAR}" fill="{_TOTAL}"/>')
        text = f"{total:.3g}"
        if pause is not None:
            parts.append(
                f'<rect x="{_LEFT}" y="{y + 4}" width="{length(pause):.1f}" height="{_BAR - 8}" fill="{_PAUSE}"/>'
            )
            text += f", pause {pause:.3g}"
        parts.append(f'<text x="{_LEFT + length(total) + 4:.1f}" y="{y + _BAR - 3}">{text}</text>')
    y = height - 22
    parts.append(f'<rect x="{_LEFT}" y="{y}" width="24" height="12" fill="{_TOTAL}"/>')
    parts.append(f'<text x="{_LEFT + 30}" y="{y + 11}">whole update</text>')
    parts.append(f'<rect x="{_LEFT + 130}" y="{y + 3}" width="24" height="6" fill="{_PAUSE}"/>')
    parts.append(f'<text x="{_LEFT + 160}" y="{y + 11}">engines paused (logarithmic, median)</text>')
    (RESULTS / "updates.svg").write_text("\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
