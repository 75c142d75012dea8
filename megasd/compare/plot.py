"""The curves of a comparison as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megasd.compare.results import Results
from megasd.metrics.records import METRICS_FILE, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, Any]]
PANELS = {
    "held-out accuracy": "evaluation/accuracy",
    "held-out response length (tokens)": "evaluation/response_length",
    "entropy of the tokens it learns from (nats)": "update/entropy",
}


def plot(results: Results, path: Path, *, title: str, threshold: float) -> None:
    """A line per algorithm, its mean over seeds, and in pale its seeds; the threshold dashed."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {
        one.name: [read_rows(Path(run.folder) / METRICS_FILE) for run in one.runs]
        for one in results.algorithms
        if one.runs
    }
    figure = Figure(figsize=(5 * len(PANELS), 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    colours = colormaps["tab10" if len(rows) <= 10 else "tab20"]
    for place, (label, metric) in enumerate(PANELS.items(), start=1):
        axes = figure.add_subplot(1, len(PANELS), place)
        axes.set(title=label, xlabel="step")
        for number, (name, runs) in enumerate(rows.items()):
            _draw(axes, runs, metric, name, colours(number))
        if metric == "evaluation/accuracy":
            axes.axhline(threshold, color="grey", linestyle="--", linewidth=1)
            axes.legend()
    figure.savefig(path, dpi=120)


def _draw(axes: "Axes", runs: Sequence[Rows], metric: str, name: str, colour: Any) -> None:
    curves: list[Mapping[int, float]] = [
        {row["step"]: row[metric] for row in rows if row.get(metric) is not None} for rows in runs
    ]
    for curve in curves:
        axes.plot(list(curve), list(curve.values()), color=colour, alpha=0.25, linewidth=1)
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    means = [float(np.mean([curve[step] for curve in curves])) for step in steps]
    axes.plot(steps, means, color=colour, label=name)
