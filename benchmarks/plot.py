# SPDX-License-Identifier: Apache-2.0
"""
`make bench-plot`: what the benchmarks wrote last, as one picture.

Reads peers.json, results.json and growth.json, writes docs/benchmarks.svg. A part
whose file is not there is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "benchmarks.svg"

WIDTH = 960
LINE = 22
LEFT = 24
INK, PALE, OURS, THEIRS, BAD = "#1f2933", "#8a94a0", "#1a7f5a", "#b8c2cc", "#c0392b"
COLOURS = {"goal": OURS, "must": "#2f6fb3", "MISSED": BAD}
STORES = {"SQLite": OURS, "Postgres": "#2f6fb3"}


class Canvas:
    """
    Shapes from the top down; *y* is where the next line goes.
    """

    def __init__(self) -> None:
        self.shapes: list[str] = []
        self.y = 16.0

    def text(self, x: float, words: object, **look: Any) -> None:
        """
        Write on the present line.
        """
        given = {"fill": INK, "font_size": 12, **look}
        said = " ".join(f'{k.replace("_", "-")}="{v}"' for k, v in given.items())
        self.shapes.append(
            f'<text x="{x:.1f}" y="{self.y:.1f}" {said}>{escape(str(words))}</text>'
        )

    def bar(self, x: float, width: float, colour: str) -> None:
        """
        Draw a bar beside the present line's text.
        """
        self.shapes.append(
            f'<rect x="{x:.1f}" y="{self.y - 11:.1f}" width="{max(width, 1):.1f}" '
            f'height="13" rx="2" fill="{colour}"/>'
        )

    def line(self, points: list[tuple[float, float]], colour: str) -> None:
        """
        Draw a line through points, each with a dot.
        """
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.shapes.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" '
            'stroke-width="2"/>'
        )
        self.shapes += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
            for x, y in points
        ]

    def heading(self, words: str, below: str) -> None:
        """
        Begin a part.
        """
        self.y += 2 * LINE
        self.text(LEFT, words, font_size=16, font_weight="bold")
        self.y += LINE - 4
        self.text(LEFT, below, fill=PALE)
        self.y += LINE + 4

    def svg(self) -> str:
        """
        Return the whole picture.
        """
        height = self.y + LINE
        head = (
            '<svg xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 0 {WIDTH} {height:.0f}" '
            f'width="{WIDTH}" height="{height:.0f}" font-family="sans-serif" '
            'role="img" aria-label="Benchmarks of fasten">'
        )
        ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
        return "\n".join([head, ground, *self.shapes, "</svg>", ""])


def read(name: str) -> dict[str, Any] | None:
    """
    Return what a benchmark wrote, or None.
    """
    path = HERE / name
    return json.loads(path.read_text()) if path.exists() else None


def where(measured: dict[str, Any]) -> str:
    """
    Say on what machine, and when.
    """
    at = measured["machine"]
    return (
        f"{at['at'][:10]}, {at['cores']} shared {at['machine']} cores, "
        f"Python {at['python']}"
    )


def logarithmic(low: float, high: float, width: float) -> Callable[[float], float]:
    """
    Return a scale of powers of ten.
    """
    span = math.log10(high / low)
    return lambda value: width * max(0.0, math.log10(max(value, low) / low)) / span


def draw_peers(canvas: Canvas, measured: dict[str, Any]) -> None:
    """
    Bars for what a caller waits, what arrives, and what is left after a kill.
    """
    canvas.heading(
        "Beside other libraries",
        f"One run, in turns; logarithmic but for the last. {where(measured)}",
    )
    columns = (280, 505, 750)
    names = ("caller's p50, us (less is better)", "durable events a second")
    for x, name in zip(columns, (*names, "found after kill -9"), strict=True):
        canvas.text(x, name, font_weight="bold")
    us, per_s = logarithmic(1, 1e5, 150), logarithmic(10, 1e5, 150)
    for row in measured["rows"]:
        canvas.y += LINE
        canvas.text(LEFT, row["name"])
        canvas.text(185, row["store"], fill=PALE, font_size=10)
        if "failed" in row:
            canvas.text(columns[0], "not measured", fill=PALE)
            continue
        colour = OURS if row["name"] == "fasten" else THEIRS
        bars = (
            (us(row["p50_us"]), f"{row['p50_us']:,.1f}"),
            (per_s(row["per_s"]), f"{row['per_s']:,.0f}"),
            (100 * row["found"], f"{100 * row['found']:.1f} %"),
        )
        for x, (width, words) in zip(columns, bars, strict=True):
            canvas.bar(x, width, colour)
            canvas.text(x + width + 6, words, font_size=11)


def draw_targets(canvas: Canvas, measured: dict[str, Any]) -> None:
    """
    Bars for how much of what must hold is used up; a tick is the goal.
    """
    canvas.heading(
        "Against the targets",
        "How much of what must hold is used up: shorter is better, the line is "
        f"the limit, the tick the goal. {where(measured)}",
    )
    x, unit, top = 400.0, 240.0, canvas.y - 14
    for row in measured["rows"]:
        sense, must = row["must"].split()
        used = share(row["value"], float(must), sense)
        goal = share(float(row["goal"].split()[1]), float(must), sense)
        canvas.text(LEFT, row["row"], fill=PALE)
        canvas.text(64, row["figure"])
        canvas.bar(x, unit * min(used, 1.6), COLOURS[row["holds"]])
        canvas.shapes.append(
            f'<rect x="{x + unit * goal:.1f}" y="{canvas.y - 12:.1f}" width="2" '
            f'height="15" fill="{INK}"/>'
        )
        canvas.text(
            x + unit * 1.6 + 12,
            f"{row['value']:g}  ({row['must']}, goal {row['goal']})",
            font_size=11,
        )
        canvas.y += LINE
    canvas.shapes.append(
        f'<rect x="{x + unit:.1f}" y="{top:.1f}" width="1" '
        f'height="{canvas.y - top - 10:.1f}" fill="{BAD}"/>'
    )
    canvas.y -= LINE


def share(value: float, must: float, sense: str) -> float:
    """
    Return which part of a limit is used up.
    """
    return value / must if sense == "<=" else must / max(value, 1e-9)


def draw_growth(canvas: Canvas, measured: dict[str, Any]) -> None:
    """
    Lines for what one row, or one query, costs as the store grows.
    """
    canvas.heading(
        "As the store grows",
        "Microseconds a row (a query: of one request), at 10 k, 100 k and 1 M rows. "
        f"{where(measured)}",
    )
    keys = [key for key in measured["rows"][0] if key.endswith("_us")]
    width, height = (WIDTH - 2 * LEFT) / len(keys), 120.0
    top = canvas.y
    for number, key in enumerate(keys):
        panel(canvas, measured["rows"], key, (LEFT + number * width, width, height))
        canvas.y = top
    canvas.y = top + height + 2 * LINE
    for number, (store, colour) in enumerate(STORES.items()):
        canvas.bar(LEFT + 100 * number, 14, colour)
        canvas.text(LEFT + 100 * number + 20, store)


def panel(
    canvas: Canvas,
    rows: list[dict[str, Any]],
    key: str,
    place: tuple[float, float, float],
) -> None:
    """
    Draw one figure of the growth, a line a store.
    """
    left, width, height = place
    base = canvas.y + 16 + height
    canvas.text(left, key[:-3], font_weight="bold")
    most = max(row[key] for row in rows) * 1.15
    low, high = min(r["rows"] for r in rows), max(r["rows"] for r in rows)
    scale = logarithmic(low, high, width - 60) if high > low else lambda _: 0.0
    for store, colour in STORES.items():
        points = [
            (left + 8 + scale(row["rows"]), base - height * row[key] / most)
            for row in rows
            if row["store"] == store
        ]
        canvas.line(points, colour)
        for (x, y), row in zip(
            points, (r for r in rows if r["store"] == store), strict=True
        ):
            canvas.y = y - 7
            canvas.text(x - 6, f"{row[key]:.3g}", font_size=10, fill=colour)
    canvas.shapes.append(
        f'<rect x="{left:.1f}" y="{base:.1f}" width="{width - 24:.1f}" height="1" '
        f'fill="{PALE}"/>'
    )


def parts() -> Iterator[tuple[str, Callable[[Canvas, dict[str, Any]], None]]]:
    """
    Yield the files of the parts, and what draws them.
    """
    yield "peers.json", draw_peers
    yield "results.json", draw_targets
    yield "growth.json", draw_growth


def main() -> None:
    """
    Draw what there is.
    """
    canvas = Canvas()
    for name, draw in parts():
        measured = read(name)
        if measured is None:
            print(f"{name} is not there: run make bench, bench-peers or bench-growth")
            continue
        draw(canvas, measured)
    PICTURE.write_text(canvas.svg())
    print(f"drawn: {PICTURE}")


if __name__ == "__main__":
    main()
