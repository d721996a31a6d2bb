"""Speed of kernels relative to torch's unquantized product, over the number of tokens: one panel a scheme.

    anybit bench kernels --write benchmarks/results/h200.json
    python benchmarks/plot_kernels.py docs/plots/h200     (needs matplotlib)

Writes h200-light.svg and h200-dark.svg. A line is a shape (K x N); each point is the kernel that a plan by these times
takes (`tools/measured_tables.py`), of one stored layout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from measured_tables import all_rows, planned

_LEAST_CELLS = 4
_LEGEND_INCHES = 0.9
_HIGHEST = 4.0  # beyond it are odd sizes, at which the unquantized product falls to a fraction of its speed
INK = {"light": ("#1b1f24", "#d0d7de"), "dark": ("#e6edf3", "#3d444d")}
COLOURS = {
    "light": ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#6e7781", "#9a6700", "#1b7c83",
              "#cf222e", "#4d2d00"),
    "dark": ("#58a6ff", "#f0883e", "#3fb950", "#bc8cff", "#f778ba", "#8b949e", "#d29922", "#39c5cf",
             "#ff7b72", "#ffdfb6"),
}


def ratios_of(document: dict[str, Any]) -> dict[str, dict[tuple[int, int], dict[int, float]]]:
    """Scheme -> shape (K, N) -> tokens -> times as fast as the unquantized product."""
    found: dict[str, dict[tuple[int, int], dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for cell in planned(document):
        n, k = cell.shape
        if cell.name != "none":
            found[cell.name][k, n][cell.tokens] = cell.ratio
    return {name: {shape: cells for shape, cells in shapes.items() if len(cells) >= _LEAST_CELLS}
            for name, shapes in found.items()}


def draw(document: dict[str, Any], theme: str, target: Path) -> None:
    """One figure in one theme."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    ink, grid = INK[theme]
    mpl.rcParams.update({"text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink,
                         "axes.edgecolor": grid, "svg.fonttype": "none", "svg.hashsalt": "anybit", "font.size": 9})
    panels = ratios_of(document)
    order = sorted({shape for shapes in panels.values() for shape in shapes})  # a shape has one colour in every panel
    columns = 4
    lines = -(-len(panels) // columns)
    height = 2.6 * lines + _LEGEND_INCHES
    figure, axes = plt.subplots(lines, columns, figsize=(12, height), sharex=True, sharey=True, squeeze=False)
    for place, (name, shapes) in zip(axes.flat, panels.items(), strict=False):
        place.axhline(1.0, color=grid, linewidth=1.5)
        for (k, n), cells in sorted(shapes.items()):
            tokens = sorted(cells)
            colour = COLOURS[theme][order.index((k, n)) % len(COLOURS[theme])]
            place.plot(tokens, [cells[m] for m in tokens], marker="o", markersize=3, color=colour, label=f"{k} x {n}")
        place.set_title(name, fontsize=9)
        place.set_xscale("log", base=4)
        place.set_xticks(sorted({m for cells in shapes.values() for m in cells}))
        place.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
        place.grid(color=grid, linewidth=0.4)
        place.patch.set_alpha(0.0)
    for place in list(axes.flat)[len(panels):]:
        place.set_visible(False)
    for place in list(axes.flat)[:len(panels)][-columns:]:  # with no panel below them
        place.xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel("tokens M", fontsize=9)
    figure.supylabel("times as fast as unquantized bfloat16", fontsize=9)
    legends = [place.get_legend_handles_labels() for place in axes.flat]
    named = {label: handle for handles, labels in legends for handle, label in zip(handles, labels, strict=True)}
    figure.legend(named.values(), named.keys(), loc="upper center", ncols=min(len(named), 5), frameon=False,
                  title="K x N")
    axes.flat[0].set_ylim(0, min(axes.flat[0].get_ylim()[1], _HIGHEST))
    figure.tight_layout(rect=(0.02, 0, 1, 1 - _LEGEND_INCHES / height))
    figure.savefig(target, transparent=True, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    """Write both themes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="path without -light.svg")
    parser.add_argument("results", type=Path, nargs="?", help="default: what is committed of an H200")
    options = parser.parse_args()
    document = all_rows() if options.results is None else json.loads(options.results.read_text())
    options.target.parent.mkdir(parents=True, exist_ok=True)
    for theme in INK:
        draw(document, theme, options.target.with_name(f"{options.target.name}-{theme}.svg"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
