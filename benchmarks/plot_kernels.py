"""Speed of kernels relative to torch's unquantized product, over the number of tokens: one panel a scheme.

    anybit bench kernels --write benchmarks/results/h200.json
    python benchmarks/plot_kernels.py benchmarks/results/h200.json docs/plots/h200     (needs matplotlib)

Writes h200-light.svg and h200-dark.svg. A line is a shape (K x N); each point is the fastest kernel that was measured
there and whose answer was right, the plan's choice among one layout where the points are joined.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

INK = {"light": ("#1b1f24", "#d0d7de"), "dark": ("#e6edf3", "#3d444d")}
COLOURS = {"light": ("#0969da", "#bc4c00", "#1a7f37", "#8250df"), "dark": ("#58a6ff", "#f0883e", "#3fb950", "#bc8cff")}


def best(rows: list[dict[str, Any]]) -> dict[str, dict[tuple[int, int], dict[int, tuple[float, str]]]]:
    """Scheme -> shape (K, N) -> tokens -> (times as fast as the unquantized product, kernel)."""
    found: dict[str, dict[tuple[int, int], dict[int, tuple[float, str]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["fault"]:
            continue
        n, k = row["shape"]
        cell = found[row["name"]][k, n]
        ratio = row["unquantized_seconds"] / row["seconds"]
        if ratio > cell.get(row["tokens"], (0.0, ""))[0]:
            cell[row["tokens"]] = (ratio, row["kernel"])
    return found


def draw(document: dict[str, Any], theme: str, target: Path) -> None:
    """One figure in one theme."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    ink, grid = INK[theme]
    mpl.rcParams.update({"text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink,
                         "axes.edgecolor": grid, "svg.fonttype": "none", "svg.hashsalt": "anybit", "font.size": 9})
    panels = best(document["rows"])
    columns = 4
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(12, 2.6 * lines), sharex=True, sharey=True, squeeze=False)
    for place, (name, shapes) in zip(axes.flat, panels.items(), strict=False):
        place.axhline(1.0, color=grid, linewidth=1.5)
        for colour, ((k, n), cells) in zip(COLOURS[theme], sorted(shapes.items()), strict=False):
            tokens = sorted(cells)
            ratios = [cells[m][0] for m in tokens]
            place.plot(tokens, ratios, marker="o", markersize=3, color=colour, label=f"{k} x {n}")
        place.set_title(name, fontsize=9)
        place.set_xscale("log", base=4)
        place.set_xticks(sorted({m for cells in shapes.values() for m in cells}))
        place.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
        place.grid(color=grid, linewidth=0.4)
        place.patch.set_alpha(0.0)
    for place in list(axes.flat)[len(panels):]:
        place.set_visible(False)
    figure.supxlabel("tokens M", fontsize=9)
    figure.supylabel("times as fast as unquantized bfloat16", fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False, title="K x N")
    figure.tight_layout(rect=(0.02, 0, 1, 0.92))
    figure.savefig(target, transparent=True, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    """Write both themes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("target", type=Path, help="path without -light.svg")
    options = parser.parse_args()
    document = json.loads(options.results.read_text())
    options.target.parent.mkdir(parents=True, exist_ok=True)
    for theme in INK:
        draw(document, theme, options.target.with_name(f"{options.target.name}-{theme}.svg"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
