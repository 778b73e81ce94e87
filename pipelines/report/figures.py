"""The report's figures: inline SVG in the page's own colours, whose text stays text."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-ins that are replaced by the page's own colours, so that one figure serves light and dark.
INK, MUTED, ACCENT, SOFT, LINE = "#010101", "#020202", "#030303", "#040404", "#050505"
COLOURS = {INK: "ink", MUTED: "muted", ACCENT: "accent", SOFT: "soft", LINE: "line"}
WIDTH_INCHES = 7.2
MAX_POINTS = 1000
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def bars(name: str, label: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """Draws a horizontal bar for each (name, value, text at its end)."""

    def draw(axes: Axes) -> None:
        places = range(len(rows))
        values = [value for _, value, _ in rows]
        axes.barh(places, values, height=0.62, color=ACCENT)
        axes.set_yticks(places, [row[0] for row in rows], parse_math=False)
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.set_xlim(0, max(*values, 1e-9) * 1.22)
        axes.tick_params(axis="y", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        for place, (_, value, text) in zip(places, rows, strict=True):
            axes.annotate(
                text, (value, place), xytext=(5, 0), textcoords="offset points", va="center"
            )

    return _svg(name, label, 0.35 + 0.27 * len(rows), draw)


def intervals(name: str, label: str, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Draws (name, value, low, high) as points with their intervals."""

    def draw(axes: Axes) -> None:
        places = range(len(rows))
        axes.set_yticks(places, [row[0] for row in rows], parse_math=False)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.tick_params(axis="both", length=0)
        axes.spines["left"].set_visible(False)
        for place, (_, value, low, high) in zip(places, rows, strict=True):
            axes.plot([low, high], [place, place], color=ACCENT, linewidth=2, alpha=0.55)
            axes.plot([value], [place], "o", color=ACCENT, markersize=7)
            axes.annotate(
                f"{value:.3f}",
                (value, place),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
            )
        axes.set_xlabel(label)

    return _svg(name, label, 0.75 + 0.42 * len(rows), draw)


def seed_ranks(name: str, label: str, rows: Sequence[tuple[int, int, int]]) -> str:
    """Draws (rank, scored queries, kept queries) as bars; rank 0 is a seed that was not found."""

    def draw(axes: Axes) -> None:
        last = max(rank for rank, _, _ in rows)
        places = [rank or last + 2 for rank, _, _ in rows]
        axes.bar(places, [row[1] for row in rows], width=0.7, color=SOFT, label="scored")
        axes.bar(places, [row[2] for row in rows], width=0.7, color=ACCENT, label="kept")
        ticks = range(1, last + 1, -(-last // 25) or 1)
        axes.set_xticks([*ticks, last + 2], [*map(str, ticks), "not\nfound"])
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("rank of the seed in the retriever's list")
        axes.set_ylabel("queries")
        axes.legend()

    return _svg(name, label, 2.4, draw)


def rank_shifts(name: str, label: str, rows: Sequence[tuple[int, int]]) -> str:
    """Draws (the retriever's rank of the positive, queries) as bars."""

    def draw(axes: Axes) -> None:
        last = max(rank for rank, _ in rows)
        axes.bar([row[0] for row in rows], [row[1] for row in rows], width=0.7, color=ACCENT)
        axes.set_xticks(range(1, last + 1, -(-last // 25) or 1))
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("rank of the positive in the retriever's list")
        axes.set_ylabel("queries")

    return _svg(name, label, 2.0, draw)


def loss_curve(
    name: str, label: str, loss: Sequence[Sequence[float]], held_out: Sequence[Sequence[float]] = ()
) -> str:
    """Draws (batch, loss), its moving mean, and the loss of the examples that were held out."""

    def draw(axes: Axes) -> None:
        text = _draw_curve(axes, loss, "loss", noisy=True, num_ticks=10)
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o-", color=INK, markersize=3.5, linewidth=1)
        names = ["each batch", *([text] if text else []), *(["held out"] if held_out else [])]
        if len(names) > 1:
            axes.legend(names)

    return _svg(name, label, 2.6, draw)


def curve(
    name: str, label: str, points: Sequence[Sequence[float]], what: str, *, noisy: bool = False
) -> str:
    """Draws (batch, value), and its moving mean if `noisy`, at half the page's width."""
    draw = partial(_draw_curve, points=points, what=what, noisy=noisy, num_ticks=5)
    return _svg(name, label, 1.7, draw, WIDTH_INCHES / 2)


def _draw_curve(
    axes: Axes, points: Sequence[Sequence[float]], what: str, *, noisy: bool, num_ticks: int
) -> str:
    """Draws the points and their mean over a twentieth of them; returns the mean's label."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    batches, values = np.asarray(points, dtype=np.float64).T
    window = max(1, len(values) // 20) if noisy else 1
    thin = slice(None, None, -(-len(values) // MAX_POINTS))
    colour, marker = SOFT if window > 1 else ACCENT, "." if len(values) < 20 else ""
    axes.plot(batches[thin], values[thin], marker=marker, color=colour, linewidth=1)
    if window > 1:
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(batches[window - 1 :][thin], mean[thin], color=ACCENT, linewidth=1.8)
    axes.set_xlabel("batch")
    axes.set_ylabel(what)
    axes.xaxis.set_major_locator(MaxNLocator(num_ticks, integer=True))
    axes.grid(axis="y")
    axes.margins(x=0.01)
    axes.tick_params(axis="both", length=0)
    return f"mean of {window} batches" if window > 1 else ""


def sparkline(label: str, points: Sequence[Sequence[float]]) -> str:
    """Draws (batch, value), averaged into thirty points, as a line of the height of text."""
    import numpy as np

    parts = np.array_split(np.asarray(points, dtype=np.float64), min(30, len(points)))
    x, y = np.array([part.mean(axis=0) for part in parts]).T
    x, y = ((v - v.min()) / (np.ptp(v) or 1) for v in (x, y))
    corners = " ".join(f"{1 + 118 * a:.1f},{21 - 20 * b:.1f}" for a, b in zip(x, y, strict=True))
    return (
        f'<svg class="spark" role="img" aria-label="{label}" viewBox="0 0 120 22"><polyline'
        f' points="{corners}" fill="none" stroke="var(--accent)" stroke-width="1.5"/></svg>'
    )


def _svg(
    name: str,
    label: str,
    height_inches: float,
    draw: Callable[[Axes], object],
    width_inches: float = WIDTH_INCHES,
) -> str:
    """Draws a self-contained SVG element, whose ids begin with `name`."""
    import matplotlib
    from matplotlib.figure import Figure

    # A style of its own, whatever the machine's matplotlibrc says.
    style: dict[Any, Any] = {**matplotlib.rcParamsDefault, **STYLE, "svg.hashsalt": name}
    style.pop("backend")
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", text, count=5)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for stand_in, colour in COLOURS.items():
        text = text.replace(stand_in, f"var(--{colour})")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
