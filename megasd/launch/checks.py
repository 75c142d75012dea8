"""Whether a run fits the nodes that it is to get, before a job is in the queue."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

from megasd.configuration.load import COMMAND_LINE, Config, Loaded
from megasd.configuration.validate import (
    check_batch,
    check_rollout,
    read_model,
    run_folder,
    validate,
)
from megasd.launch.site import Site
from megasd.policy.checks import check_layout

SUGGESTED = 8  # node counts, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nodes:
    """What a job asks for; engines on servers have nodes of their own."""

    train: int
    gpus_per_node: int
    engines: int = 0
    gpus_per_engine: int = 1

    @property
    def ranks(self) -> int:
        return self.train * self.gpus_per_node

    @property
    def engines_per_node(self) -> int:
        return max(1, self.gpus_per_node // max(1, self.gpus_per_engine))

    @property
    def serve(self) -> int:
        """Nodes of engines."""
        return -(-self.engines // self.engines_per_node)


def nodes_for(config: Config, nodes: int, site: Site) -> Nodes:
    rollout, engines = config.rollout, 0
    if rollout.engine == "vllm" and rollout.vllm.placement == "server":
        engines = rollout.vllm.engines
    return Nodes(
        train=nodes,
        gpus_per_node=site.gpus_per_node,
        engines=engines,
        gpus_per_engine=rollout.vllm.tensor,
    )


def on_gpus(loaded: Loaded) -> Loaded:
    """`run.device: auto` as the nodes will read it: where a job is submitted there is no GPU."""
    config = loaded.config
    if config is None or config.run.device != "auto":
        return loaded
    run = dataclasses.replace(config.run, device="cuda")
    return dataclasses.replace(loaded, config=dataclasses.replace(config, run=run))


def check_job(loaded: Loaded, nodes: int, site: Site, *, new_run: bool, chain: int) -> list[str]:
    """Every reason why this job could not run, `loaded.errors` among them."""
    errors = [
        f"{COMMAND_LINE}: --{name} {value}: give 1 or more"
        for name, value in (("nodes", nodes), ("chain", chain))
        if value < 1
    ]
    loaded = on_gpus(loaded)
    config = loaded.config
    errors += loaded.errors
    if config is None or nodes < 1:
        return errors
    asked = nodes_for(config, nodes, site)
    errors += validate(
        loaded, world_size=asked.ranks, new_run=new_run, will_run_here=not site.image
    )
    if not loaded.faulty:
        source = loaded.source("rollout.vllm.tensor")
        errors += [f"{source}: {sentence}" for sentence in check_engines_on_nodes(config, asked)]
        errors += advice_on_nodes(config, asked)
    return errors + check_paths(loaded, config, site)


def check_engines_on_nodes(config: Config, asked: Nodes) -> list[str]:
    """Whether each engine of vLLM finds its GPUs on one node."""
    rollout, size, gpus = config.rollout, config.rollout.vllm.tensor, asked.gpus_per_node
    if min(size, gpus) < 1:
        return []  # said already
    if asked.engines and size > gpus:
        return [
            f"rollout.vllm.tensor: an engine of {size} GPUs does not fit on a node of {gpus}; "
            "lower it, and raise rollout.vllm.engines"
        ]
    is_colocated = rollout.engine == "vllm" and rollout.vllm.placement == "colocated"
    if not is_colocated or config.run.device != "cuda" or gpus % size == 0:
        return []
    # Engines lie one behind the other over the ranks of each pipeline stage.
    hf_config, _ = read_model(config.model.path)
    stage = asked.ranks // max(1, config.parallel.pipeline)
    shared = math.gcd(gpus, stage, 0 if hf_config is None else hf_config["num_attention_heads"])
    fitting = [str(n) for n in range(1, gpus + 1) if shared % n == 0]
    return [
        f"rollout.vllm.tensor: colocated engines of {size} GPUs do not fill nodes of {gpus}, and "
        f"an engine lies on one node; with this layout these fit: {', '.join(fitting)}"
    ]


def advice_on_nodes(config: Config, asked: Nodes) -> list[str]:
    """Node counts that would fit, if what is wrong has to do with their number."""
    hf_config, _ = read_model(config.model.path)

    def faults(nodes: int) -> int:
        size = nodes * asked.gpus_per_node
        return len(
            check_layout(config.parallel, world_size=size, device=config.run.device)
            + check_batch(config, size)
            + check_rollout(config, hf_config, size, will_run_here=False)
        )

    ours = faults(asked.train)
    others = {n: faults(n) for n in range(1, max(64, 4 * asked.train) + 1)} if ours else {}
    fewest = min(others.values(), default=0)
    if ours == fewest:  # not a matter of nodes
        return []
    fitting = [n for n, count in others.items() if count == fewest]
    nearest = sorted(sorted(fitting, key=lambda n: abs(n - asked.train))[:SUGGESTED])
    return [
        f"{COMMAND_LINE}: --nodes {asked.train}: with {asked.gpus_per_node} GPUs per node these "
        f"would fit: {', '.join(map(str, nearest))}"
    ]


def check_paths(loaded: Loaded, config: Config, site: Site) -> list[str]:
    """Whether the nodes would see what the config names, as far as the site says."""
    errors = []
    mounted = [mount.split(":")[:2] for mount in site.mounts]
    for key, path in [("the working directory", Path.cwd()), *paths_of(config)]:
        shown = f"{loaded.source(key)}: {key}: {path}"
        if site.shared and not _is_under(path, site.shared):
            errors.append(
                f"{shown} is under none of the folders that all nodes see "
                f"({', '.join(site.shared)}: `shared` of the site file); move it there"
            )
        # A container sees what is mounted, under the same name: the config has but one.
        same = [parts[0] for parts in mounted if len(set(parts)) == 1]
        if site.image and not _is_under(path, same):
            errors.append(
                f"{shown} would not exist in the container; add --mount with a folder above it"
            )
    return errors


def paths_of(config: Config) -> Iterator[tuple[str, Path]]:
    """Every absolute path that a run reads or writes, with its key."""
    yield "run.directory", run_folder(config).absolute()
    yield "model.path", Path(config.model.path).absolute()
    if config.teacher.path is not None:
        yield "teacher.path", Path(config.teacher.path).absolute()
    for key, files in (
        ("data.files", config.data.files),
        ("evaluation.files", config.evaluation.files),
    ):
        yield from ((key, Path(file).absolute()) for file in files)


def _is_under(path: Path, folders: list[str]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)
