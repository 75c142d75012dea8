"""The registry: the names that `algorithm.name` may take. Importing it loads no torch.

A preset is a name for a method with other values: the config writes `algorithm: {name: dapo}`,
and what it sets beside the name wins over the preset.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a method lives, and what this name of it sets otherwise than the class does."""

    module: str
    class_name: str
    paper: str | None = None  # None: the class's
    preset: Mapping[str, Any] = field(default_factory=dict)  # fields
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # other sections


def _entry(module: str, class_name: str, **rest: Any) -> Entry:
    return Entry(module=f"megasd.algorithms.{module}", class_name=class_name, **rest)


ALGORITHMS: Mapping[str, Entry] = {
    "antisd": _entry("antisd", "AntiSD"),
    "cepo": _entry("cepo", "CEPO"),
    "dapo": _entry(  # its buffer is 4,096 of 20,480 tokens
        "grpo",
        "GRPO",
        paper="arXiv:2503.14476",
        preset={"reduction": "token_mean", "dynamic_sampling": True, "overlong_buffer": 0.2},
    ),
    "dasd": _entry("dasd", "DASD"),
    "distil": _entry("distil", "DistIL"),  # science
    "distil_code": _entry(
        "distil",
        "DistIL",
        preset={"top_k": 20},
        sections={"context": {"sources": ["feedback"]}, "optimizer": {"lr": 1e-6}},
    ),
    "distil_math": _entry(
        "distil",
        "DistIL",
        sections={
            "context": {"sources": ["solution"]},
            "optimizer": {"lr": 5e-6},
            "rollout": {"group_size": 1},
        },
    ),
    "distilled_rl": _entry("distilled_rl", "DistilledRL"),
    "dr_grpo": _entry(
        "grpo",
        "GRPO",
        paper="arXiv:2503.20783",
        preset={"reduction": "constant", "scale_by_std": False},
    ),
    "entropy_bonus": _entry("entropy_bonus", "EntropyBonus"),
    "gkd": _entry("gkd", "GKD"),
    "grpo": _entry("grpo", "GRPO"),
    "grpo_opsd": _entry("grpo_opsd", "GRPOWithOPSD"),
    "hepo": _entry("hepo", "HEPO"),
    "opd": _entry("opd", "OPD"),
    "opsd": _entry("opsd", "OPSD"),
    "opsd_dasd_baseline": _entry(
        "opsd",
        "OPSD",
        preset={"divergence": {"kind": "reverse_kl"}, "reduction": "sequence_mean"},
    ),
    "opsd_distil_math": _entry(
        "opsd",
        "OPSD",
        preset={"divergence": {"kind": "forward_kl"}, "reduction": "sequence_mean"},
    ),
    "rlcsd": _entry("rlcsd", "RLCSD"),
    "rlrt": _entry("rlrt", "RLRT"),  # base models
    "rlrt_instruct": _entry("rlrt", "RLRT", preset={"mix_steps": 30, "max_deviation": 0.5}),
    "rlrt_thinking": _entry("rlrt", "RLRT", preset={"mix_steps": 30, "max_deviation": 0.2}),
    "rlsd": _entry("rlsd", "RLSD"),
    "sdpo": _entry("sdpo", "SDPO"),  # science
    "sdpo_code": _entry(
        "sdpo",
        "SDPO",
        preset={"divergence": {"kind": "reverse_kl", "top_k": 20}},
        sections={
            "teacher": {"decay": 0.99},
            "context": {"sources": ["sibling", "feedback"]},
            "optimizer": {"lr": 1e-6},
        },
    ),
    "sft": _entry("sft", "SFT"),
    "srpo": _entry("srpo", "SRPO"),
    "temporal": _entry("temporal", "Temporal"),
}


class Method(NamedTuple):
    """What a name of the registry stands for."""

    cls: type[Any]  # the dataclass, which is its config section
    paper: str
    preset: Mapping[str, Any]
    sections: Mapping[str, Mapping[str, Any]]  # defaults in other sections of the config

    def build(self, **fields: Any) -> Any:
        """The algorithm with the preset and `fields`; nested ones may be mappings."""
        from omegaconf import OmegaConf

        return OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(self.cls), dict(self.preset), fields)
        )


def load_algorithm(name: str) -> Method:
    """The method called `name`. Raises a ValueError for a name that is not in the registry."""
    if name not in ALGORITHMS:
        near = get_close_matches(name, ALGORITHMS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"algorithm.name is {name!r}, not one of {', '.join(ALGORITHMS)}{hint}")
    entry = ALGORITHMS[name]
    cls = getattr(import_module(entry.module), entry.class_name)
    sections = {
        section: {**cls.section_defaults.get(section, {}), **entry.sections.get(section, {})}
        for section in (*cls.section_defaults, *entry.sections)
    }
    return Method(cls, entry.paper or cls.paper, entry.preset, sections)
