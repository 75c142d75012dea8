"""Weights & Biases, as one of the records: it may fail, and the run goes on."""

import os
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megasd.metrics.config import MetricsConfig
from megasd.process.durable import write_durably

INIT_SECONDS = 30.0
FINISH_SECONDS = 120.0  # for what is still to be sent when the run is over


def chosen_mode(config: MetricsConfig) -> str:
    """`online`, `offline` or `off`. `auto` does as WANDB_MODE says, else goes online with a key."""
    if config.wandb != "auto":
        return config.wandb
    if mode := os.environ.get("WANDB_MODE"):
        return {"disabled": "off", "dryrun": "offline", "run": "online"}.get(mode, mode)
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"


def start(config: MetricsConfig, run_folder: Path, run_config: Mapping[str, Any]) -> Any:
    """A wandb run; None when off. What cannot go online is recorded offline, with a warning."""
    mode: Any = chosen_mode(config)
    if mode == "off":
        return None
    import wandb  # a second of import time

    # The id outlives the process: a resumed run continues its curves.
    id_file = run_folder / "wandb_id"
    if not id_file.exists():
        write_durably(id_file, secrets.token_hex(4))
    arguments: dict[str, Any] = {
        "project": config.wandb_project,
        "name": run_folder.name,
        "id": id_file.read_text().strip(),
        "dir": str(run_folder),
        "config": dict(run_config),
        "settings": wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
        ),
    }
    if mode != "offline":
        try:
            return wandb.init(mode=mode, resume="allow", **arguments)
        except Exception as error:
            warnings.warn(
                f"metrics.wandb: cannot go online ({error}); this run is recorded in "
                f"{run_folder}/wandb, send it later with `wandb sync`",
                stacklevel=2,
            )
            wandb.teardown()  # its service still holds the id, and would refuse it
    return wandb.init(mode="offline", **arguments)


def where(run: Any) -> str:
    """For the console: where its curves are."""
    return run.url or f"{Path(run.dir).parent} (offline; send it with `wandb sync`)"
