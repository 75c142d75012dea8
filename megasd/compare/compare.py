"""Methods side by side: train each from the same start on the same prompts, one table, one plot."""

import json
import os
from pathlib import Path

from megasd.compare.execute import execute
from megasd.compare.plot import plot
from megasd.compare.results import collect, to_json
from megasd.compare.runs import Comparison
from megasd.compare.table import as_text


def compare(comparison: Comparison) -> list[str]:
    """Runs what is left to run; writes compare.md, compare.json, compare.png into its folder.

    Returns a sentence for each run that failed; raises ValueError if the warm start did.
    """
    failures = execute(comparison)
    results = collect(comparison, failures)
    config, folder = comparison.config, comparison.folder
    text = as_text(comparison, results)
    record = {
        "config": comparison.path,
        "overrides": list(comparison.overrides),
        "warm_start": config.compare.warm_start,
        "model": config.model.path,
        "steps": config.run.steps,
        "seeds": sorted({run.seed for run in comparison.runs}),
        "samples": config.evaluation.samples,
        "threshold": config.compare.threshold,
        "overruled": {
            name: {key: {"own": own, "used": used} for key, (own, used) in keys.items()}
            for name, keys in comparison.overruled.items()
        },
        **to_json(results),
    }
    _write(folder / "compare.md", text)
    _write(folder / "compare.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    picture = folder / "compare.png"
    plot(results, picture, title=folder.name, threshold=config.compare.threshold)
    print(f"\n{text}\n{folder}/compare.md, compare.json, compare.png")
    return [f"{path}: {reason}" for path, reason in failures.items()]


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
