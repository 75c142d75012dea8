"""What a user wants to know of a method before running it: paper, needs, defaults, their source."""

import dataclasses
import warnings
from typing import Any

from megasd.algorithms import ALGORITHMS, load_algorithm
from megasd.algorithms.base import Algorithm, Needs


def describe(name: str) -> dict[str, Any]:
    """Plain values: name, paper, needs, defaults by config key with where each one stands."""
    method = load_algorithm(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a preset may take what its method warns about
        algorithm: Algorithm = method.build()
    values = {f"algorithm.{key}": value for key, value in dataclasses.asdict(algorithm).items()}
    for section, keys in method.sections.items():
        values |= {f"{section}.{key}": value for key, value in keys.items()}
    entry = ALGORITHMS[name]
    of_preset = {f"algorithm.{key}" for key in entry.preset}
    of_preset |= {f"{section}.{key}" for section, keys in entry.sections.items() for key in keys}
    return {
        "name": name,
        "paper": method.paper,
        "needs": _needs(algorithm.needs, method.sections.get("context", {}).get("sources")),
        "defaults": {
            key: {
                "value": value,
                "source": f"preset {name}"
                if key in of_preset
                else method.cls.sources[key.removeprefix("algorithm.")],
            }
            for key, value in values.items()
        },
    }


def _needs(needs: Needs, contexts: list[str] | None) -> dict[str, Any]:
    """Contexts, passes over the batch beside the update, and memory per response token."""
    compares = needs.teachers and (needs.old_logprobs or needs.cross_entropy)
    reads_student = bool(needs.entropy or compares or needs.support == "student")
    passes = ["student before the update"] if reads_student else []
    passes += [f"teacher as {role}" for role in needs.teachers]
    # Every pass brings log-probs and entropy.
    numbers = 2 * len(passes) + needs.cross_entropy
    return {
        "rewards": needs.rewards,
        "solutions": needs.solutions,
        "contexts": contexts if contexts and needs.teachers else [],
        "passes": passes,
        # float32 numbers on every rank; ids and their log-probs where the token is read; there
        # too, where hidden_states is 1, a hidden state in the model's dtype.
        "bytes_per_token": {
            "every_rank": 4 * numbers,
            "reading_rank": 8 * needs.support_size,
            "hidden_states": int(needs.teacher_hidden),
        },
    }


def as_text(methods: list[dict[str, Any]]) -> str:
    """A table: a method and what it asks for in each row."""
    rows = [("name", "paper", "the teacher reads", "passes", "bytes/token")]
    for method in methods:
        needs = method["needs"]
        memory = needs["bytes_per_token"]
        rows.append(
            (
                method["name"],
                method["paper"],
                " + ".join(needs["contexts"]) or "-",
                str(len(needs["passes"])),
                f"{memory['every_rank']}"
                + (f" + {memory['reading_rank']}" if memory["reading_rank"] else "")
                + (" + hidden state" if memory["hidden_states"] else ""),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
