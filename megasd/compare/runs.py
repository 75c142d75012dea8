"""The runs of a comparison, composed and checked before the first one starts."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megasd.algorithms import load_algorithm
from megasd.configuration.load import (
    COMMAND_LINE,
    Config,
    ConfigError,
    Loaded,
    differing_keys,
    is_within,
    load_config,
    read_config,
    to_container,
)
from megasd.configuration.validate import run_folder, validate
from megasd.metrics.records import METRICS_FILE, read_rows
from megasd.metrics.run_folder import CONFIG_FILE

MAY_DIFFER = ("compare", "metrics")  # between a folder's run and the one asked for


@dataclass(frozen=True, kw_only=True)
class Run:
    """One `megasd train`, in a folder of its own."""

    config: Config

    @property
    def algorithm(self) -> str:
        return self.config.algorithm_name

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @property
    def folder(self) -> Path:
        return run_folder(self.config)

    @property
    def is_complete(self) -> bool:
        """True if nothing of it is left to do: the export, and the evaluation before it."""
        config, steps = self.config, self.config.run.steps
        if config.checkpoint.export_hf and not (self.folder / "hf").is_dir():
            return False
        if config.evaluation.files:
            return any(row["step"] == steps for row in read_rows(self.folder / METRICS_FILE))
        return (self.folder / "checkpoints" / f"step_{steps:06d}").is_dir()

    @property
    def has_checkpoint(self) -> bool:
        return any((self.folder / "checkpoints").glob("step_*"))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Algorithms x seeds from the same weights, on the same prompts in the same order."""

    path: str
    overrides: tuple[str, ...]
    launcher: tuple[str, ...]  # put before each `megasd train`; none: one process
    folder: Path
    warm_start: Run | None
    runs: tuple[Run, ...]  # by algorithm in the order asked for, then by seed
    overruled: dict[str, dict[str, tuple[Any, Any]]]  # algorithm -> key -> its own, the config's

    @property
    def config(self) -> Config:
        """Of the first run; what the others have otherwise is the algorithm's or the seed."""
        return self.runs[0].config


def compose(
    path: str, algorithms: Sequence[str], num_seeds: int, overrides: Sequence[str], launcher: str
) -> Comparison:
    """Every run of the comparison; raises ConfigError with all faults of all of them.

    Seeds count up from run.seed. Folders that hold runs already must hold these runs.
    """
    if not algorithms or len(set(algorithms)) < len(algorithms) or num_seeds < 1:
        raise ConfigError(
            [f"{COMMAND_LINE}: compare one or more algorithms, each named once, on 1 seed or more"]
        )
    named = {name: [*overrides, f"algorithm.name={name}"] for name in algorithms}
    loaded = {name: read_config(path, items) for name, items in named.items()}
    first = loaded[algorithms[0]].config
    if first is None:
        raise ConfigError(loaded[algorithms[0]].errors)
    launch = tuple(shlex.split(launcher))
    errors: list[str] = []
    warm_start = _warm_start(first, errors, launch)
    faults = {name: _faults(one, warm_start, launch) for name, one in loaded.items()}
    shared = [s for s in faults[algorithms[0]] if all(s in others for others in faults.values())]
    errors += shared
    errors += [f"{name}: {s}" for name in faults for s in faults[name] if s not in shared]
    if errors:
        raise ConfigError(errors)

    folder = Path(first.run.directory) / f"{first.run.name}-compare"
    start = (
        [] if warm_start is None else [f"model.path={json.dumps(str(warm_start.folder / 'hf'))}"]
    )
    runs: list[Run] = []
    for name in algorithms:
        for seed in range(first.run.seed, first.run.seed + num_seeds):
            where = [f"run.name={name}-seed{seed}", f"run.directory={json.dumps(str(folder))}"]
            items = [*named[name], *start, *where, f"run.seed={seed}"]
            runs.append(Run(config=load_config(path, items)))
    if errors := [fault for run in runs for fault in _other_run(run)]:
        raise ConfigError(errors)
    return Comparison(
        path=path,
        overrides=tuple(overrides),
        launcher=launch,
        folder=folder,
        warm_start=warm_start,
        runs=tuple(runs),
        overruled={name: _overruled(name, one.config) for name, one in loaded.items()},
    )


def _warm_start(config: Config, errors: list[str], launcher: Sequence[str]) -> Run | None:
    path = config.compare.warm_start
    if path is None:
        return None
    loaded = read_config(path)
    faults = loaded.errors + _validated(loaded, launcher)
    if loaded.config is not None and not loaded.config.checkpoint.export_hf:
        faults.append(f"{path}: checkpoint.export_hf: the runs start from RUN/hf; set it to true")
    if loaded.config is not None and not faults:
        run = Run(config=loaded.config)
        faults = [f"compare.warm_start: {path}: {fault}" for fault in _other_run(run)]
        if not faults:
            return run
    errors += faults
    return None


def _faults(loaded: Loaded, warm_start: Run | None, launcher: Sequence[str]) -> list[str]:
    config = loaded.config
    if config is None:
        return loaded.errors
    if warm_start is not None:  # its export may not be there yet, but will be of the same model
        model = replace(config.model, path=warm_start.config.model.path)
        loaded = replace(loaded, config=replace(config, model=model))
    faults = loaded.errors + _validated(loaded, launcher)
    if not config.evaluation.files:
        faults.append(
            f"{loaded.source('evaluation.files')}: evaluation.files: methods are compared on "
            "held-out rows and there are none; name a .jsonl or .parquet file"
        )
    return faults


def _validated(loaded: Loaded, launcher: Sequence[str]) -> list[str]:
    """Under a launcher, whose processes only it can count, as for one replica of the model."""
    world_size = 1
    if launcher and loaded.config is not None:
        parallel = loaded.config.parallel
        world_size = max(1, parallel.tensor * parallel.pipeline)
    return validate(loaded, world_size=world_size, new_run=False)


def _other_run(run: Run) -> list[str]:
    """What is wrong with the run that the folder holds already: it is not the one asked for."""
    saved_as = run.folder / CONFIG_FILE
    if not saved_as.is_file():
        return []
    saved = read_config(saved_as)
    keys = ["keys of another version"]
    if saved.config is not None and not saved.errors:
        differing = differing_keys(saved.config, run.config)
        keys = [key for key in differing if not is_within(key, MAY_DIFFER)]
    if not keys:
        return []
    return [
        f"{run.folder} holds a run of another configuration ({', '.join(keys)}); "
        "remove that folder, or choose another run.name"
    ]


def _overruled(name: str, config: Config | None) -> dict[str, tuple[Any, Any]]:
    """What the method sets in other sections and the config sets otherwise, by key."""
    assert config is not None, "what could not be read is an error"
    used = to_container(config)
    return {
        f"{section}.{key}": (own, used[section][key])
        for section, keys in load_algorithm(name).sections.items()
        for key, own in keys.items()
        if used[section][key] != own
    }
