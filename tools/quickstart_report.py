"""Held-out accuracy before and after a run, its curve, and a last line for machines."""

import argparse
from pathlib import Path

from megasd.metrics.plot import plot_run
from megasd.metrics.records import METRICS_FILE, read_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--seconds", type=int, required=True, help="what all of it took")
    arguments = parser.parse_args()
    run_folder: Path = arguments.run_folder
    rows = [
        row
        for row in read_rows(run_folder / METRICS_FILE)
        if row.get("evaluation/accuracy") is not None
    ]
    if len(rows) < 2:
        raise SystemExit(f"{run_folder / METRICS_FILE}: no evaluation before and after the run")
    print()
    accuracies = []
    for label, row in (("before", rows[0]), ("after", rows[-1])):
        accuracy, low, high = (row[f"evaluation/accuracy{end}"] for end in ("", "_low", "_high"))
        accuracies.append(accuracy)
        print(f"held-out accuracy {label:6} {accuracy:.3f}  95% interval [{low:.3f}, {high:.3f}]")
    print(f"curve: {plot_run(run_folder)}")
    before, after = accuracies
    print(
        f"quickstart: accuracy_before={before:.2f} accuracy_after={after:.2f} "
        f"seconds={arguments.seconds} run={run_folder}"
    )


if __name__ == "__main__":
    main()
