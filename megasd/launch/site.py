"""How jobs run on a cluster: what a site file says, with the flags of `megasd submit` over it."""

import argparse
import dataclasses
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megasd.configuration import schema
from megasd.configuration.load import COMMAND_LINE, escaped
from megasd.configuration.written import read_yaml
from megasd.planner.hardware import GPUS

LEAD_SECONDS = 300  # the least lead that is chosen


@dataclass(frozen=True)
class Site:
    """A site file; every key may be left out."""

    partition: str | None = None
    account: str | None = None
    time: str = "4:00:00"
    gpus_per_node: int = 8
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    cpus_per_task: int | None = None  # null: Slurm's default, and tasks are not bound to cores
    exclusive: bool = True  # whole nodes
    mem: str | None = "0"  # "0": all of a node's
    mpi: str | None = "none"  # srun's --mpi: torch needs none
    srun: list[str] = field(default_factory=list)  # more arguments for srun
    directives: dict[str, str] = field(default_factory=dict)  # more for sbatch; "": a bare flag
    environment: dict[str, str] = field(default_factory=dict)  # NCCL, InfiniBand; --env adds to it
    setup: str = ""  # shell lines in front of all: module load ...
    python: str | None = None  # null: the one that submits, `python` in a container
    runtime: Literal["pyxis", "apptainer"] = "pyxis"  # what starts containers
    image: str | None = None
    mounts: list[str] = field(default_factory=list)  # --mount adds to them
    runtime_options: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)  # folders that all nodes see; empty: unknown
    ssh: str | None = None  # user@host with a Slurm that sees our folders; --via nemo-run only
    preflight: bool = True  # `megasd doctor --preflight` before the ranks, at every start
    network_gb_per_second: float | None = None  # of one GPU to other nodes; null: the published one
    gpu: str | None = None  # its kind, for the estimate of a step: H100, H200, B200
    signal_lead_seconds: int | None = None  # before the limit, to stop and save; null: estimated
    grace_seconds: int = 60  # for the other ranks, after the first has ended
    max_requeues: int = 100  # of one job, for whatever reason
    max_crashes: int = 3  # one after the other, without a new checkpoint

    @property
    def interpreter(self) -> str:
        return self.python or ("python" if self.image else sys.executable)


def read_site(flags: argparse.Namespace) -> tuple[Site, list[str]]:
    """Also every fault of file and flags; what cannot be used is left at its default."""
    errors: list[str] = []
    site = _read(flags.site, errors) if flags.site else Site()
    names = ("partition", "account", "time", "gpus_per_node", "image")
    given = {name: value for name in names if (value := getattr(flags, name)) is not None}
    environment = dict(site.environment)
    for item in flags.env:
        key, equals, value = item.partition("=")
        if equals:
            environment[key] = value
        else:
            errors.append(f"{COMMAND_LINE}: --env {item}: not KEY=VALUE; write one like A=1")
    if flags.env:
        given["environment"] = environment
    if flags.mount:
        given["mounts"] = [*site.mounts, *flags.mount]
    site = dataclasses.replace(site, **given)
    for sentence in check_site(site):
        key = sentence.partition(":")[0]
        origin = COMMAND_LINE if key in given or not flags.site else flags.site
        errors.append(f"{origin}: {sentence}")
    return site, errors


def _read(path: str, errors: list[str]) -> Site:
    try:
        file = Path(path)
        values = read_yaml(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        errors.append(f"{path}: cannot be read as YAML ({error}); correct it")
        return Site()
    if not isinstance(values, dict):
        errors.append(f"{path}: no site file, which holds keys like `partition:`; check --site")
        return Site()
    hints, kept = schema.fields_of(Site), OmegaConf.structured(Site)
    for key, value in values.items():
        if key not in hints:
            advice = schema.did_you_mean(str(key), hints) or "; known: " + ", ".join(hints)
            errors.append(f"{path}: {key}: unknown key{advice}")
            continue
        value = schema.as_meant(value, hints[key])
        try:
            kept = OmegaConf.merge(kept, {key: escaped(value)})
        except OmegaConfBaseException:
            wanted = schema.describe(hints[key])
            errors.append(f"{path}: {key}: got {schema.shown(value)}; write {wanted}")
    site: Any = OmegaConf.to_object(kept)
    return site


def check_site(site: Site) -> list[str]:
    """What no cluster could take, as sentences."""
    errors = [
        f"{name}: {value} is out of range; set it to {low} or more"
        for name, low in (
            *(("gpus_per_node", 1), ("signal_lead_seconds", 1), ("grace_seconds", 1)),
            *(("max_requeues", 0), ("max_crashes", 1)),
        )
        if (value := getattr(site, name)) is not None and value < low
    ]
    if site.gpu is not None and site.gpu not in GPUS:
        errors.append(f"gpu: {site.gpu!r} is not known; choose one of {', '.join(GPUS)}")
    network = site.network_gb_per_second
    if network is not None and not (math.isfinite(network) and network > 0):
        errors.append(f"network_gb_per_second: {network} is out of range; set it above 0")
    errors += [
        f"environment: {key!r} is not the name of a variable; use letters, digits and '_'"
        for key in site.environment
        if not re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII)
    ]
    asked = {"partition": site.partition, "account": site.account, "mem": site.mem}
    asked |= {f"directives.{key}": value for key, value in site.directives.items()}
    errors += [
        f"{key}: {value!r} has a line break, and #SBATCH takes one line; write it as one"
        for key, value in asked.items()
        if "\n" in key + (value or "")
    ]
    limit = seconds(site.time)
    lead = LEAD_SECONDS if site.signal_lead_seconds is None else site.signal_lead_seconds
    if limit is None:
        errors.append(f"time: {site.time} is not a time of Slurm's; write hours:minutes:seconds")
    elif limit <= lead + 60:
        errors.append(
            f"time: the limit of {limit:.0f} s leaves nothing to train: the ranks are told to save "
            f"signal_lead_seconds = {lead} before it, and Slurm may be a minute early; "
            " raise the limit or lower the lead"
        )
    if site.mounts and not site.image:
        errors.append("mounts: there is no image to mount them into; give --image, or leave them")
    errors += [
        f"mounts: {mount}: {mount.partition(':')[0]} is not an absolute path; write it in full"
        for mount in site.mounts
        if not mount.startswith("/")
    ]
    return errors


def seconds(time: str) -> float | None:
    """Of a time limit: minutes, m:s, h:m:s, days-h, days-h:m, days-h:m:s; None: not one."""
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if found is None:
        return None
    days, *parts = (0 if part is None else int(part) for part in found.groups())
    if found[1] is not None or found[4] is not None:  # begins with hours
        hours, minutes, rest = parts
    else:
        hours, (minutes, rest, _) = 0, parts
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest
