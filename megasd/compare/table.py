"""The results of a comparison in words: what was run, the table, what is noise."""

import json
import math
from typing import Any

from megasd.compare.results import AlgorithmResult, Difference, Results
from megasd.compare.runs import Comparison
from megasd.evaluation.statistics import Estimate


def as_text(comparison: Comparison, results: Results) -> str:
    """Markdown that reads as well on a terminal."""
    parts = [_header(comparison, results), _table(comparison, results), _verdict(results)]
    failed = [
        f"- {one.name} seed {seed}: {reason}"
        for one in results.algorithms
        for seed, reason in one.failures.items()
    ]
    if failed:
        parts.append("\n".join(["Failed, and in no figure above:", *failed]))
    return "\n\n".join(parts) + "\n"


def _header(comparison: Comparison, results: Results) -> str:
    config, seeds = comparison.config, sorted({run.seed for run in comparison.runs})
    warm_start = config.compare.warm_start
    started_from = "" if warm_start is None else f" (warm start {warm_start})"
    before = [run.accuracy_before for one in results.algorithms for run in one.runs]
    lines = [
        f"# {comparison.folder.name}: {' '.join([comparison.path, *comparison.overrides])}",
        "",
        f"{config.run.steps} steps from {config.model.path}{started_from}, "
        f"seeds {', '.join(map(str, seeds))}. Held out: {results.num_prompts} prompts x "
        f"{config.evaluation.samples} responses"
        + (f", accuracy before training {sum(before) / len(before):.3f}." if before else "."),
        "Accuracy is the mean over seeds, with a 95% bootstrap interval over prompts and seeds; "
        "the difference is over the same prompts and seeds.",
    ]
    if any(comparison.overruled.values()):
        lines += ["", "The config decides for all, against defaults that methods bring:", ""]
        lines += [
            f"- {name}: "
            + ", ".join(
                f"{key} {_plain(used)} (its own: {_plain(own)})" for key, (own, used) in set_
            )
            for name, keys in comparison.overruled.items()
            if (set_ := list(keys.items()))
        ]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(comparison: Comparison, results: Results) -> str:
    first = results.algorithms[0].name
    head = (
        "algorithm",
        "accuracy",
        f"steps to {comparison.config.compare.threshold:g}",
        "length",
        "entropy",
        "leakage",
        "seconds",
        f"accuracy less {first}'s",
    )
    rows = [head, *(_row(one) for one in results.algorithms)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _row(one: AlgorithmResult) -> tuple[str, ...]:
    return (
        one.name,
        _estimate(one.accuracy),
        _figure(one.steps_to_threshold, "g"),
        _figure(one.response_length, ".1f"),
        _figure(one.entropy, ".3f"),
        "-" if one.leakage is None else _figure(one.leakage, ".3f"),
        _figure(one.seconds, ".0f"),
        "-" if one.difference is None else _difference(one.difference),
    )


def _figure(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _estimate(found: Estimate) -> str:
    if not math.isfinite(found.mean):
        return "-"
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _difference(found: Difference) -> str:
    if not math.isfinite(found.mean):
        return "-"
    noise = " within noise" if found.is_noise else ""
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{noise}"


def _verdict(results: Results) -> str:
    """Which differences may be chance, plainly."""
    compared = {
        one.name: one.difference
        for one in results.algorithms
        if one.difference is not None and math.isfinite(one.difference.mean)
    }
    if not compared:
        return "There is nothing to compare."
    first = results.algorithms[0].name
    noise = [name for name, found in compared.items() if found.is_noise]
    above = [name for name, found in compared.items() if found.low > 0]
    below = [name for name, found in compared.items() if found.high < 0]
    sentences = [
        f"{what} {first}: {', '.join(names)}."
        for what, names in (("Within noise of", noise), ("Above", above), ("Below", below))
        if names
    ]
    if len(compared) > 1:
        sentences.append(
            f"Each interval stands alone: of {len(compared)} comparisons, "
            "one in twenty misses 0 by chance."
        )
    if any(len(one.runs) == 1 for one in results.algorithms):
        sentences.append("An interval of one seed counts prompts only: it is too narrow.")
    return " ".join(sentences)
