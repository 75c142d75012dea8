"""What one rank or one machine can say about itself: GPUs, versions, its folder. No collective.

What cannot be seen is None or missing, never guessed: a finding then says so.
"""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

from megasd.metrics.run_folder import versions

Level = Literal["ok", "unseen", "wrong"]
PACKAGES = ("torch", "megatron-core", "transformer-engine", "vllm", "transformers", "numpy")
_FIELDS = (
    *("name", "driver_version", "memory.total", "memory.used", "clocks.max.sm"),
    *("ecc.mode.current", "ecc.errors.uncorrected.volatile.total"),
)
_SLOWED = ("hw_slowdown", "hw_thermal_slowdown")
_REASONS = (
    "clocks_event_reasons",
    "clocks_throttle_reasons",
)  # what drivers call them, new and old
USED_MIB = 1024  # more than this in use before a run starts is somebody else's
FREE_GIB = 1  # less room than this is no room, whatever the model


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence about a machine or a job."""

    level: Level
    sentence: str

    def __str__(self) -> str:
        mark = {"ok": "ok     ", "unseen": "unseen ", "wrong": "WRONG  "}[self.level]
        return mark + self.sentence


@dataclass(frozen=True, slots=True)
class GPU:
    """One line of nvidia-smi; memory in MiB, clock in MHz."""

    name: str
    driver: str
    memory_total: int | None
    memory_used: int | None
    clock: int | None
    ecc: str
    ecc_errors: int | None
    is_slowed: bool | None  # None: this driver does not say


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One rank's view of its machine; plain values that travel between ranks."""

    rank: int = 0
    host: str = field(default_factory=socket.gethostname)
    gpus: tuple[GPU, ...] | None = None  # None: nvidia-smi is not there or fails
    visible_gpus: int = 0  # to torch
    versions: Mapping[str, str | None] = field(default_factory=dict)
    transformer_engine: str | None = None  # why the one that is installed cannot be imported
    float8: Mapping[str, str | None] = field(default_factory=dict)  # by recipe: why not, None: can

    def comparable(self) -> dict[str, str]:
        """What must be the same on all ranks of a job, by what it is called."""
        found = {name: version or "not installed" for name, version in self.versions.items()}
        if self.gpus is not None:
            kinds = sorted({f"{gpu.name}, {_gib(gpu.memory_total)}" for gpu in self.gpus})
            found["GPUs"] = f"{len(self.gpus)} x {' and '.join(kinds)}"
            found["driver"] = ", ".join(sorted({gpu.driver for gpu in self.gpus}))
            found["GPU clock"] = ", ".join(sorted({f"{gpu.clock} MHz" for gpu in self.gpus}))
        return found


def _gib(mib: int | None) -> str:
    return "unknown memory" if mib is None else f"{mib / 1024:.0f} GiB"


def gather_facts(rank: int = 0) -> Facts:
    """Of this process's machine; importing Transformer Engine may start a CUDA context."""
    import torch

    from megasd.policy.backend import (
        float8_fault,
        is_transformer_engine_installed,
        transformer_engine_fault,
    )
    from megasd.policy.float8 import FORMATS

    gpus, visible = read_gpus(), torch.cuda.device_count()
    tries_it = visible > 0 and is_transformer_engine_installed()
    fault = transformer_engine_fault() if tries_it else None
    has_it = tries_it and fault is None
    return Facts(
        rank=rank,
        gpus=gpus,
        visible_gpus=visible,
        versions=installed_versions(),
        transformer_engine=fault,
        float8={recipe: float8_fault(recipe) for recipe in FORMATS} if has_it else {},
    )


def installed_versions() -> dict[str, str | None]:
    found = versions(PACKAGES)
    if found["vllm"] is None and importlib.util.find_spec("vllm") is not None:
        found["vllm"] = "another distribution"  # the CPU build of the tests
    return found


def read_gpus() -> tuple[GPU, ...] | None:
    lines = _query(_FIELDS)
    if lines is None:
        return None
    asked = (_query([f"{reasons}.{name}" for name in _SLOWED]) for reasons in _REASONS)
    slowed = next((answer for answer in asked if answer is not None), None)
    found = []
    for number, values in enumerate(lines):
        name, driver, total, used, clock, ecc, errors = values
        states = None if slowed is None else slowed[number]
        found.append(
            GPU(
                name=name,
                driver=driver,
                memory_total=_number(total),
                memory_used=_number(used),
                clock=_number(clock),
                ecc=ecc,
                ecc_errors=_number(errors),
                is_slowed=None if states is None else any(s == "Active" for s in states),
            )
        )
    return tuple(found)


def _query(fields: Sequence[str]) -> list[list[str]] | None:
    """nvidia-smi's values, by GPU; None where it is missing, hangs or knows no such field."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode != 0:
        return None
    return [[value.strip() for value in line.split(", ")] for line in done.stdout.splitlines()]


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def check_gpus(facts: Facts) -> list[Finding]:
    """Driver, sameness, memory, clocks and ECC of the GPUs of one machine."""
    if facts.gpus is None:
        return [
            Finding(
                "wrong" if facts.visible_gpus else "unseen",
                "nvidia-smi is missing or does not answer: nothing can be said about GPUs, driver, "
                "memory, clocks and ECC",
            )
        ]
    count, found = len(facts.gpus), []
    kinds = {(gpu.name, gpu.memory_total) for gpu in facts.gpus}
    shown = " and ".join(sorted(f"{name}, {_gib(total)}" for name, total in kinds))
    if len(kinds) > 1:
        found.append(Finding("wrong", f"the GPUs are not alike: {shown}; use one kind"))
    drivers = sorted({gpu.driver for gpu in facts.gpus})
    found.append(Finding("ok", f"{count} x {shown}, driver {' and '.join(drivers)}"))
    if facts.visible_gpus < count and "CUDA_VISIBLE_DEVICES" not in os.environ:
        found.append(
            Finding(
                "wrong",
                f"torch sees {facts.visible_gpus} of {count} GPUs: its CUDA does not fit the "
                "driver; install the driver that torch's CUDA needs",
            )
        )
    faults = [fault for n, gpu in enumerate(facts.gpus) for fault in _faults_of(n, gpu)]
    found += faults
    if not any(fault.level == "wrong" for fault in faults):
        found.append(Finding("ok", "memory is free, ECC reports no errors, no GPU is slowed"))
    return found


def _faults_of(number: int, gpu: GPU) -> list[Finding]:
    found = []
    if gpu.memory_used is None:
        found.append(Finding("unseen", f"GPU {number}: its free memory"))
    elif gpu.memory_used > USED_MIB:
        found.append(
            Finding(
                "wrong",
                f"GPU {number}: {gpu.memory_used / 1024:.1f} GiB are in use by other programs; "
                "end them",
            )
        )
    if gpu.ecc_errors is None:
        found.append(Finding("unseen", f"GPU {number}: its ECC errors (ECC is {gpu.ecc})"))
    elif gpu.ecc_errors:
        found.append(
            Finding(
                "wrong",
                f"GPU {number}: {gpu.ecc_errors} uncorrected ECC errors since the driver was "
                "loaded; take the GPU out of service",
            )
        )
    if gpu.is_slowed is None:
        found.append(Finding("unseen", f"GPU {number}: whether its hardware slows the clock"))
    elif gpu.is_slowed:
        found.append(
            Finding(
                "wrong", f"GPU {number}: its hardware slows the clock; look at cooling and power"
            )
        )
    return found


def check_transformer_engine(facts: Facts) -> list[Finding]:
    """What a run with `model.layers: auto` would end with; else, which model.fp8 it could have."""
    if facts.transformer_engine is None:
        return _float8(facts.float8)
    return [
        Finding(
            "wrong",
            "Transformer Engine is installed and cannot be imported "
            f"({facts.transformer_engine}); mend its installation, or set model.layers=local",
        )
    ]


def _float8(faults: Mapping[str, str | None]) -> list[Finding]:
    """A card that cannot is no fault: nobody has asked for it."""
    if not faults:
        return []
    can = ", ".join(recipe for recipe, fault in faults.items() if fault is None) or "nothing"
    cannot = "".join(f"; not {recipe}: {fault}" for recipe, fault in faults.items() if fault)
    return [Finding("ok", f"model.fp8.recipe can be {can}{cannot}")]


def check_versions(
    versions: Mapping[str, str | None], requirements: Sequence[str] | None, *, has_gpu: bool
) -> list[Finding]:
    """Installed versions against megasd's own ranges; those of the extra `gpu` with a GPU only."""
    from packaging.requirements import Requirement

    if requirements is None:
        return [Finding("unseen", "megasd is not installed as a package: which versions it needs")]
    found: list[Finding] = []
    fitting = [f"python {versions['python']}"]
    for text in requirements:
        requirement = Requirement(text)
        marker = requirement.marker
        is_base = marker is None or marker.evaluate({"extra": ""})
        if requirement.name not in versions:
            continue
        if not is_base and not (
            has_gpu and marker is not None and marker.evaluate({"extra": "gpu"})
        ):
            continue
        version, wanted = versions[requirement.name], f"{requirement.name} {requirement.specifier}"
        if version is None:
            found.append(Finding("wrong", f"{requirement.name} is missing: install {wanted}"))
        elif not requirement.specifier.contains(version, prereleases=True):
            found.append(
                Finding("wrong", f"{requirement.name} {version} does not fit: install {wanted}")
            )
        else:
            fitting.append(f"{requirement.name} {version}")
    others = [name for name in ("transformer-engine", "vllm") if versions.get(name) is None]
    if others and not has_gpu:
        found.append(Finding("unseen", f"{' and '.join(others)}: not installed, needed on GPUs"))
    return [Finding("ok", f"versions that fit: {', '.join(fitting)}"), *found]


def own_requirements() -> list[str] | None:
    try:
        return metadata.requires("megasd")
    except metadata.PackageNotFoundError:
        return None


def check_folder(folder: Path) -> list[Finding]:
    """Whether a run could write there, and keep what it writes; leaves the folder as it was."""
    made = not folder.exists()
    probe = folder / f".megasd-doctor-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as out:
            out.write(b"megasd")
            out.flush()
            os.fsync(out.fileno())
        is_same = probe.read_bytes() == b"megasd"
        probe.unlink()
        free = shutil.disk_usage(folder).free / 2**30
        if made:
            with contextlib.suppress(OSError):  # somebody has put something into it
                folder.rmdir()
    except OSError as error:
        return [
            Finding(
                "wrong", f"{folder} cannot be written: {error.strerror}; choose another run folder"
            )
        ]
    if not is_same:
        return [Finding("wrong", f"{folder} gives back other bytes than were written")]
    if free < FREE_GIB:
        return [
            Finding(
                "wrong",
                f"{folder} has {free:.0f} GiB of room, less than {FREE_GIB}; a checkpoint may not "
                "fit: make room",
            )
        ]
    return [Finding("ok", f"{folder} can be written, {free:.0f} GiB are free")]


def as_values(findings: Sequence[Finding]) -> list[dict[str, str]]:
    return [asdict(finding) for finding in findings]
