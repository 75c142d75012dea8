"""A run: everything is checked and built in the order of its cost, then trained, then exported."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megasd.config import Config, load_config, to_container, to_yaml
from megasd.data.context import PrivilegedContext
from megasd.data.datasets import load_prompts
from megasd.data.prompts import Prompts
from megasd.data.tokenizer import load_tokenizer
from megasd.evaluation.evaluator import Evaluator
from megasd.metrics.records import Metrics
from megasd.metrics.run_folder import CONFIG_FILE, create_run_folder
from megasd.policy import backend
from megasd.rewards.scorer import Scorer
from megasd.rollout.build import build_engine
from megasd.rollout.engine import RolloutEngine
from megasd.rollout.spread import Spread
from megasd.types import Prompt
from megasd.validate import context_length, needs_rewards, needs_solutions, run_folder
from megasd.weights.hf_folder import read_hf_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megasd.checkpoint.checkpoints import Checkpoints
    from megasd.experience import Collector
    from megasd.policy.policy import Policy
    from megasd.train import Job


def start_training(config: Config, *, resume: bool) -> None:
    """Run `config` to its last step on every rank that the launcher started."""
    started = backend.start(config.run.device)
    # Megatron may be imported from here on.
    from megasd.checkpoint.checkpoints import Checkpoints
    from megasd.checkpoint.export import export_hf
    from megasd.train import train

    data = _read_data(config)
    folder = run_folder(config)
    with _process_group(config, started):
        policy = _build_policy(config, started)
        if not resume and dist.get_rank() == 0:
            create_run_folder(
                folder, config=to_yaml(config), seed=config.run.seed, command=sys.argv
            )
        dist.barrier()
        checkpoints = Checkpoints(config.checkpoint, folder, policy, data.prompts)
        if resume:
            checkpoints.restore()
        with contextlib.ExitStack() as stack:
            train(_assemble(config, data, policy, checkpoints, folder, stack))
        if config.checkpoint.export_hf:
            export_hf(policy, config.model.path, folder / "hf", replace=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    tokenizer: "PreTrainedTokenizerBase"
    prompts: Prompts
    held_out: Sequence[Prompt]


def _read_data(config: Config) -> _Data:
    """Every row is read and checked before the model is."""
    tokenizer = load_tokenizer(config.model.path)
    loaded = load_prompts(config.data, tokenizer, require_solution=needs_solutions(config))
    held_out: Sequence[Prompt] = ()
    if files := config.evaluation.files:
        held_out = load_prompts(config.data, tokenizer, files=files, key="evaluation.files").prompts
    prompts = Prompts(loaded.prompts, seed=config.run.seed, shuffle=config.data.shuffle)
    return _Data(tokenizer=tokenizer, prompts=prompts, held_out=held_out)


def _assemble(
    config: Config,
    data: _Data,
    policy: "Policy",
    checkpoints: "Checkpoints",
    folder: Path,
    stack: contextlib.ExitStack,
) -> "Job":
    """What the loop runs on this rank; `stack` closes what must be closed."""
    from megasd.reading import Reader
    from megasd.rollout.sync import WeightSync
    from megasd.train import Job

    algorithm = config.algorithm
    # One engine per data-parallel replica, on the rank where Megatron's order begins.
    layout = policy.layout
    samples = layout.tp_rank == 0 and layout.is_first_stage
    spread = Spread(layout.dp_rank if samples else None, layout.dp_size)
    sampler = source = scorer = None
    if samples:
        if data.held_out or not algorithm.needs.solutions:
            sampler = _engine(config, data.tokenizer, policy.backend, solutions=False)
        source = sampler
        if algorithm.needs.solutions:
            source = _engine(config, data.tokenizer, policy.backend, solutions=True)
        scorer = stack.enter_context(Scorer(config.reward, config.data.answer_pattern))
    metrics = Metrics(
        config.metrics,
        folder,
        total_steps=config.run.steps,
        rank=dist.get_rank(),
        run_config=to_container(config),
        first_step=checkpoints.next_step,
    )
    return Job(
        algorithm=algorithm,
        policy=policy,
        sync=WeightSync(sampler, feeds_training=not algorithm.needs.solutions),
        collector=_collector(config, data, policy, source, scorer, spread),
        reader=Reader(
            policy,
            algorithm,
            _privileged(config, data.tokenizer),
            minibatches=config.optimizer.minibatches_per_step,
            mismatch=config.rollout.mismatch,
            seed=config.run.seed,
            memory=checkpoints.memory,
        ),
        evaluator=_evaluator(config, data, sampler, scorer, spread, folder),
        checkpoints=checkpoints,
        metrics=stack.enter_context(metrics),
        steps=config.run.steps,
        minibatches=config.optimizer.minibatches_per_step,
    )


def _collector(
    config: Config,
    data: _Data,
    policy: "Policy",
    engine: RolloutEngine | None,
    scorer: Scorer | None,
    spread: Spread,
) -> "Collector":
    from megasd.experience import Collector

    return Collector(
        prompts=data.prompts,
        engine=engine,
        scorer=scorer,
        spread=spread,
        algorithm=config.algorithm,
        needs_rewards=needs_rewards(config),
        rollout=config.rollout,
        reward=config.reward,
        minibatches=config.optimizer.minibatches_per_step,
        device=policy.backend.device,
        seed=config.run.seed,
    )


def _evaluator(
    config: Config,
    data: _Data,
    engine: RolloutEngine | None,
    scorer: Scorer | None,
    spread: Spread,
    folder: Path,
) -> Evaluator:
    return Evaluator(
        config.evaluation,
        data.held_out,
        engine=engine,
        scorer=scorer,
        spread=spread,
        seed=config.run.seed,
        max_response_tokens=config.rollout.max_response_tokens,
        success_threshold=config.reward.success_threshold,
        run_folder=folder if dist.get_rank() == 0 else None,
    )


def _build_policy(config: Config, started: backend.Backend) -> "Policy":
    from megasd.policy.policy import Policy

    return Policy(
        model=config.model,
        parallel=config.parallel,
        optimizer=config.optimizer,
        teacher=config.teacher,
        backend=started,
        temperature=config.rollout.temperature,
        mismatch=config.rollout.mismatch,
        total_steps=config.run.steps * config.optimizer.minibatches_per_step,
        seed=config.run.seed,
        roles=config.algorithm.needs.teachers,
    )


def _engine(
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    started: backend.Backend,
    *,
    solutions: bool,
) -> RolloutEngine:
    return build_engine(
        config.rollout,
        solutions=solutions,
        folder=config.model.path,
        tokenizer=tokenizer,
        dtype=getattr(torch, config.model.dtype),
        device=started.device,
    )


def _privileged(config: Config, tokenizer: "PreTrainedTokenizerBase") -> PrivilegedContext | None:
    """None where no role reads a context: then neither template nor tokenizer must fit one."""
    if not set(config.algorithm.needs.teachers) - {"reference"}:
        return None
    longest = context_length(config, read_hf_config(config.model.path))
    assert longest is not None, "validated"
    return PrivilegedContext(
        config.context,
        tokenizer,
        config.data.chat_template_options,
        max_context_tokens=longest,
        success_threshold=config.reward.success_threshold,
        answer_pattern=config.data.answer_pattern,
        seed=config.run.seed,
    )


@contextlib.contextmanager
def _process_group(config: Config, started: backend.Backend) -> Iterator[None]:
    backend.join_ranks(started, timeout_seconds=config.parallel.timeout_seconds)
    try:
        yield
    finally:
        dist.destroy_process_group()


def export_run(folder: Path, to: Path) -> None:
    """The newest checkpoint of a run as a Hugging Face folder, on one process."""
    alone = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false")
    config = load_config(folder / CONFIG_FILE, alone)
    started = backend.start(config.run.device)
    from megasd.checkpoint.checkpoints import restore_weights
    from megasd.checkpoint.export import export_hf

    with _process_group(config, started):
        policy = _build_policy(config, started)
        restore_weights(policy, folder)
        export_hf(policy, config.model.path, to, replace=False)
