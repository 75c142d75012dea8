"""What a resumed run may change, and the configuration it goes on with."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megasd.configuration.load import (
    COMMAND_LINE,
    ConfigError,
    Loaded,
    differing_keys,
    is_within,
    read_config,
)
from megasd.metrics.run_folder import CONFIG_FILE

MAY_CHANGE = ("run.steps", "parallel", "checkpoint", "metrics", "evaluation", "watchdog")
_RULE = (
    "a resumed run may only change run.steps, parallel.*, checkpoint.*, metrics.*, evaluation.* "
    "and watchdog.*"
)


def read_resumed(folder: Path, path: str | None, overrides: Sequence[str]) -> Loaded:
    """The configuration to continue the run in `folder` with; with a CONFIG it must be the same.

    An override may repeat what the run was started with.
    """
    folder = existing_run(folder)
    loaded = saved = read_config(folder / CONFIG_FILE, () if path is not None else overrides)
    errors = [
        f"{COMMAND_LINE}: {key}: {_RULE}; leave it out, or start a new run"
        for key, source in saved.sources.items()
        if source == COMMAND_LINE and not is_within(key, MAY_CHANGE)
    ]
    errors += saved.errors
    if path is not None:
        loaded = read_config(path, overrides)
        errors += loaded.errors
        if saved.config is not None and loaded.config is not None and not loaded.errors:
            errors += [
                f"{loaded.source(key)}: {key}: differs from {folder / CONFIG_FILE}, and {_RULE}; "
                "resume with the config and the model of the run, or start a new run"
                for key in differing_keys(saved.config, loaded.config)
                if not is_within(key, (*MAY_CHANGE, "run.directory"))
            ]
    config = loaded.config
    if config is not None:  # the folder may have been moved, or the working directory be another
        where = dataclasses.replace(config.run, directory=str(folder.parent), name=folder.name)
        config = dataclasses.replace(config, run=where)
    return dataclasses.replace(loaded, config=config, errors=list(dict.fromkeys(errors)))


def existing_run(folder: Path) -> Path:
    """The absolute path of a run's folder."""
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            [f"{folder}: not a run folder, it holds no {CONFIG_FILE}; name the folder of a run"]
        )
    return folder.resolve()
