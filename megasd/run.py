"""A run: everything is checked and built in the order of its cost, then trained, then exported."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megasd.configuration.load import Config, to_container, to_yaml, with_absolute_paths
from megasd.configuration.validate import (
    context_length,
    longest_rollout,
    needs_rewards,
    needs_solutions,
    run_folder,
)
from megasd.data.context import PrivilegedContext
from megasd.data.datasets import load_prompts
from megasd.data.prompts import Prompts
from megasd.data.tokenizer import load_tokenizer
from megasd.evaluation.evaluator import Evaluator
from megasd.loop.rehearsal import rehearse
from megasd.loop.watchdog import Watchdog
from megasd.metrics.phases import Phases
from megasd.metrics.records import Metrics
from megasd.metrics.run_folder import create_run_folder
from megasd.policy import backend
from megasd.process import interrupt, startup, together
from megasd.rewards.scorer import Scorer
from megasd.rollout.build import build_engine
from megasd.rollout.fleet import Fleet
from megasd.rollout.placement import Seat, expert_receivers, seats
from megasd.rollout.probe import probe_sequences
from megasd.rollout.solutions import SolutionsEngine
from megasd.rollout.spread import Spread
from megasd.types import Prompt
from megasd.weights.hf_folder import read_hf_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megasd.checkpoint.checkpoints import Checkpoints
    from megasd.loop.ending import Left
    from megasd.loop.experience import Collector
    from megasd.loop.train import Job
    from megasd.policy.policy import Policy


# Largest mean difference between an engine's log-probs and the trainer's that passes for noise.
PROBE_GAPS = {"float32": 0.001, "bfloat16": 0.05, "fp8": 0.2}


def start_training(config: Config, *, resume: bool) -> bool:
    """Run `config` to its end on every rank that the launcher started, and export the policy.

    False: it was asked to stop, and has saved; something is still to be done.
    """
    config = with_absolute_paths(config)
    rehearse(config.algorithm)
    started = backend.start(
        config.run.device,
        layers=config.model.layers,
        tensor=config.parallel.tensor,
        deterministic=config.run.deterministic,
        recipe=config.model.fp8.recipe if config.model.fp8 else None,
    )
    # Megatron may be imported from here on.
    from megasd.loop import ending

    data = _read_data(config)
    folder = run_folder(config)
    with _process_group(config, started), ending.owned(folder):

        def begin() -> ending.Left:
            if resume:
                return ending.left_of(config, folder)
            create_run_folder(
                folder, config=to_yaml(config), seed=config.run.seed, command=sys.argv
            )
            return ending.everything(config)

        left = ending.on_first_rank(begin, about=folder)
        interrupt.after_this(f"go on with `megasd train --resume {folder}`")
        if left.anything and not _train(config, data, started, folder, left, resume=resume):
            return False
        ending.say_done(config, folder, was_before=not left.anything)
    return True


def _train(
    config: Config,
    data: "_Data",
    started: backend.Backend,
    folder: Path,
    left: "Left",
    *,
    resume: bool,
) -> bool:
    """All that is left; False: it was asked to stop."""
    from megasd.checkpoint.checkpoints import Checkpoints
    from megasd.checkpoint.export import export_hf
    from megasd.loop import ending
    from megasd.loop.train import train

    with contextlib.ExitStack() as stack:
        phases = Phases()
        stack.enter_context(Watchdog(config.watchdog, folder, phases))
        policy = _build_policy(config, started)
        checkpoints = Checkpoints(config.checkpoint, folder, policy, data.prompts)
        stack.callback(checkpoints.close)
        if resume:
            checkpoints.restore()
        if checkpoints.next_step < config.run.steps:  # by a damaged one, perhaps
            left = ending.everything(config)
        if left.steps or left.evaluation:
            job = _assemble(
                *(config, data, policy, checkpoints, folder, phases, stack),
                evaluates_at_end=left.evaluation,
            )
            startup.end()
            is_done = train(job)
        else:
            is_done = True
    if not is_done:
        ending.say_stopped(config, folder, checkpoints.saved_step)
        return False
    ending.note_end(config, folder, exported=config.checkpoint.export_hf and not left.export)
    together.meet()  # launchers end the ranks that are left some time after the first
    if left.export:
        export_hf(policy, config.model.path, folder / "hf", replace=True)
        ending.note_end(config, folder, exported=True)
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    tokenizer: "PreTrainedTokenizerBase"
    prompts: Prompts
    held_out: Sequence[Prompt]


def _read_data(config: Config) -> _Data:
    """Every row is read and checked before the model is."""
    tokenizer = load_tokenizer(config.model.path)
    read = partial(load_prompts, config.data, tokenizer, vocab_size=_vocab_size(config))
    loaded = read(require_solution=needs_solutions(config))
    held_out: Sequence[Prompt] = ()
    if files := config.evaluation.files:
        held_out = read(files=files, key="evaluation.files").prompts
    prompts = Prompts(loaded.prompts, seed=config.run.seed, shuffle=config.data.shuffle)
    return _Data(tokenizer=tokenizer, prompts=prompts, held_out=held_out)


def _assemble(
    config: Config,
    data: _Data,
    policy: "Policy",
    checkpoints: "Checkpoints",
    folder: Path,
    phases: Phases,
    stack: contextlib.ExitStack,
    *,
    evaluates_at_end: bool,
) -> "Job":
    """What the loop runs on this rank; `stack` closes what must be closed."""
    from megasd.loop.diagnostics import Diagnostics
    from megasd.loop.health import Health
    from megasd.loop.meter import Meter
    from megasd.loop.reading import Reader
    from megasd.loop.train import Job

    # One scorer per data-parallel replica, on the rank where Megatron's order begins.
    layout = policy.layout
    judges = layout.tp_rank == 0 and layout.is_first_stage
    spread = Spread(layout.dp_rank if judges else None, layout.dp_size)
    scorer = None
    if judges:
        scorer = stack.enter_context(Scorer(config.reward, config.data.answer_pattern))
    policy.park()  # engines measure what is free as they start
    engines = _fleet(config, data, policy, folder)
    stack.callback(engines.close)
    source = _solutions(config, data, spread) if config.algorithm.needs.solutions else engines
    health = Health(speaks=dist.get_rank() == 0)
    stack.callback(health.sum_up)
    return Job(
        algorithm=config.algorithm,
        policy=policy,
        engines=engines,
        collector=_collector(config, data, policy, source, scorer, spread),
        reader=Reader(
            policy,
            config.algorithm,
            _privileged(config, data.tokenizer),
            minibatches=config.optimizer.minibatches_per_step,
            mismatch=config.rollout.mismatch,
            seed=config.run.seed,
            memory=checkpoints.memory,
        ),
        meter=Meter(policy, seed=config.run.seed),
        evaluator=_evaluator(config, data, engines, scorer, spread, folder),
        checkpoints=checkpoints,
        metrics=stack.enter_context(_metrics(config, folder, checkpoints)),
        diagnostics=Diagnostics(
            folder,
            config=to_yaml(config),
            max_skipped_in_a_row=config.optimizer.max_skipped_in_a_row,
        ),
        health=health,
        phases=phases,
        steps=config.run.steps,
        minibatches=config.optimizer.minibatches_per_step,
        evaluates_at_end=evaluates_at_end,
    )


def _metrics(config: Config, folder: Path, checkpoints: "Checkpoints") -> Metrics:
    return Metrics(
        config.metrics,
        folder,
        total_steps=config.run.steps,
        rank=dist.get_rank(),
        run_config=to_container(config),
        first_step=checkpoints.next_step,
        unwritten=checkpoints.rows,
    )


def _collector(
    config: Config,
    data: _Data,
    policy: "Policy",
    engines: Fleet,
    scorer: Scorer | None,
    spread: Spread,
) -> "Collector":
    from megasd.loop.experience import Collector

    return Collector(
        prompts=data.prompts,
        engines=engines,
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
    engines: Fleet,
    scorer: Scorer | None,
    spread: Spread,
    folder: Path,
) -> Evaluator:
    return Evaluator(
        config.evaluation,
        data.held_out,
        engines=engines,
        scorer=scorer,
        spread=spread,
        seed=config.run.seed,
        rollout=config.rollout,
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
        bucket_bytes=config.rollout.sync.bucket_mib * 2**20,
        receivers=expert_receivers(
            config.rollout,
            ranks_per_stage=dist.get_world_size() // config.parallel.pipeline,
            world_size=dist.get_world_size(),
            is_cuda=started.is_cuda,
        ),
        parks=config.rollout.engine == "vllm" and config.rollout.vllm.park_trainer,
    )


def _solutions(config: Config, data: _Data, spread: Spread) -> Fleet:
    """What a supervised method learns from: read, not sampled."""
    engine = SolutionsEngine(data.tokenizer) if spread.worker is not None else None
    seat = None if spread.worker is None else Seat(spread.worker)
    return Fleet(engine, seat, spread.num_workers, config.rollout.sync)


def _fleet(config: Config, data: _Data, policy: "Policy", folder: Path) -> Fleet:
    """The engines that sample, for training or for held-out evaluation; perhaps none."""
    feeds_training = not config.algorithm.needs.solutions
    if not (data.held_out or feeds_training):
        return Fleet(None, None, 0, config.rollout.sync, feeds_training=False)
    layout, world_size = policy.layout, dist.get_world_size()
    seating = seats(
        config.rollout,
        replica_starts=[dp * layout.tp_size for dp in range(layout.dp_size)],
        ranks_per_stage=layout.stage_size,
        world_size=world_size,
        is_cuda=policy.backend.is_cuda,
    )
    engine = build_engine(
        config.rollout,
        seating,
        folder=config.model.path,
        tokenizer=data.tokenizer,
        dtype=getattr(torch, config.model.dtype),
        device=policy.backend.device,
        hf_shapes=policy.table.hf_shapes(),
        max_tokens=longest_rollout(config),
        run_folder=folder,
    )
    gap, vllm = config.rollout.sync.probe_gap, config.rollout.vllm
    scores_in_fp8 = config.model.fp8 is not None and config.model.fp8.score
    is_fp8 = vllm.quantization == "fp8" or scores_in_fp8
    precision = "fp8" if is_fp8 else config.model.dtype
    return Fleet(
        engine,
        seating.get(dist.get_rank()),
        len({seat.number for seat in seating.values()}),
        config.rollout.sync,
        probe=probe_sequences(data.prompts.rows if feeds_training else data.held_out),
        max_probe_gap=PROBE_GAPS[precision] if gap is None else gap,
        feeds_training=feeds_training,
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
        vocab_size=_vocab_size(config),
    )


def _vocab_size(config: Config) -> int:
    return read_hf_config(config.model.path)["vocab_size"]


@contextlib.contextmanager
def _process_group(config: Config, started: backend.Backend) -> Iterator[None]:
    backend.join_ranks(started, timeout_seconds=config.parallel.timeout_seconds)
    interrupt.share(dist.distributed_c10d._get_default_store())
    try:
        yield
    finally:
        dist.destroy_process_group()
