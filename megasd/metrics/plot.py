"""The curve of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasd.metrics.records import METRICS_FILE, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {  # title -> metrics over steps; a panel of which a run has nothing is left out
    "accuracy": ("reward/mean", "reward/accuracy", "evaluation/accuracy"),
    "loss": ("update/loss",),
    "teacher gap (nats per token)": ("teacher/gap_mean", "teacher/gap_p95"),
    "response length (tokens)": ("rollout/response_length", "evaluation/response_length"),
}


def plot_run(run_folder: Path) -> Path:
    """Draws RUN/curve.png from RUN/metrics.jsonl: rewards, held-out accuracy, gap, length.

    Held-out accuracy carries its 95% interval. Raises ValueError if there are no rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(run_folder / METRICS_FILE)
    if not rows:
        raise ValueError(f"{run_folder / METRICS_FILE} holds no rows; nothing to plot")
    logged = {name for row in rows for name in row}
    panels = {title: names for title, names in PANELS.items() if logged & set(names)}
    figure = Figure(figsize=(5 * max(1, len(panels)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(run_folder.name)
    for place, (title, names) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        axes.set(title=title, xlabel="step")
        for name in names:
            if name in logged:
                _draw(axes, rows, name)
        axes.legend()
    path = run_folder / "curve.png"
    figure.savefig(path, dpi=120)
    return path


def _draw(axes: "Axes", rows: Sequence[dict[str, Any]], name: str) -> None:
    points = [row for row in rows if row.get(name) is not None]
    steps, values = [row["step"] for row in points], [row[name] for row in points]
    if name != "evaluation/accuracy":
        axes.plot(steps, values, label=name, linewidth=1)
        return
    # A bootstrap interval of few prompts may lie beside the mean; an error bar may not.
    below = [max(0.0, row[name] - row["evaluation/accuracy_low"]) for row in points]
    above = [max(0.0, row["evaluation/accuracy_high"] - row[name]) for row in points]
    axes.errorbar(
        steps, values, yerr=[below, above], label="held-out, 95% interval", marker="o", capsize=3
    )
