"""What ranks run for the tests of the policy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megasd.algorithms.base import Algorithm, Needs
from megasd.loop.experience import Experience
from megasd.losses.config import MismatchConfig
from megasd.types import (
    Credit,
    Prompt,
    ResponseBatch,
    Rollout,
    StudentOutput,
    TokenLoss,
    Verdict,
    View,
)

LEARNING_RATE = 1e-3
STEPS = 3


@dataclass(frozen=True, kw_only=True)
class PlainLoss(Algorithm):
    """-logprob - 0.1 entropy of each token, weighed by its advantage: touches all of the head.

    `offset` changes the loss and no gradient. `root` adds one of 0, which has no derivative there:
    gradients that are not finite, of a loss that is.
    """

    offset: float = 0.0
    root: bool = False

    @property
    def needs(self) -> Needs:
        return Needs()

    def assign_credit(self, batch: ResponseBatch, step: int) -> Credit:
        raise NotImplementedError("the cases bring their own credit")

    def token_loss(self, student: StudentOutput, batch: ResponseBatch, credit: Credit) -> TokenLoss:
        loss = -(student.logprobs + 0.1 * student.entropy) * credit.advantages + self.offset
        if self.root:
            loss = loss + (student.logprobs - student.logprobs.detach()).square().sqrt()
        return TokenLoss(loss, {"seen": torch.ones_like(loss)})


def random_views(seed: int, count: int, vocab: int, longest: int = 24) -> list[View]:
    """Prompts and responses of very different lengths, single-token responses among them.

    Without token 0, the padding: transformers keeps its embedding from learning, we do not.
    """
    draw = np.random.default_rng(seed)
    return [
        View(
            prompt_ids=draw.integers(1, vocab, draw.integers(1, longest)),
            response_ids=draw.integers(1, vocab, 1 if i == 0 else draw.integers(1, longest)),
        )
        for i in range(count)
    ]


def offsets_of(views: list[View]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(view.response_ids) for view in views])])


def batch_and_credit(
    views: list[View], seed: int, device: str = "cpu"
) -> tuple[ResponseBatch, Credit]:
    """A batch of one mini-batch with random advantages, some exactly 0 and some tokens left out."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(view.response_ids) for view in views])
    num_tokens = int(lengths.sum())
    batch = ResponseBatch(
        rewards=torch.zeros(len(views), device=device),
        is_correct=torch.zeros(len(views), dtype=torch.bool, device=device),
        group_ids=torch.arange(len(views), device=device) // 2,
        minibatch_ids=torch.zeros(len(views), dtype=torch.int64, device=device),
        rollout_ids=torch.repeat_interleave(torch.arange(len(views)), lengths).to(device),
        response_mask=torch.ones(num_tokens, dtype=torch.bool, device=device),
        max_response_tokens=32,
    )
    left_out = torch.rand(num_tokens, generator=draw) < 0.2
    credit = Credit(
        advantages=torch.randn(num_tokens, generator=draw).to(device),
        token_weights=torch.rand(num_tokens, generator=draw).to(device),
        path=torch.where(left_out, -1, 0).to(device),
    )
    return batch, credit


def make_policy(folder: Path, settings: Mapping[str, Any]) -> Any:
    """A policy on this rank; `settings` may set what `parallel` has, and other sections' keys.

    `ddp` among them: what Megatron's DDP is told otherwise.
    """
    from megasd.policy import backend
    from megasd.policy.config import (
        FP8Config,
        ModelConfig,
        OptimizerConfig,
        ParallelConfig,
        TeacherConfig,
    )

    started = backend.start(settings.get("device", "cpu"))
    from megasd.policy.megatron import build
    from megasd.policy.policy import Policy

    config = build.DistributedDataParallelConfig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            build,
            "DistributedDataParallelConfig",
            lambda **given: config(**{**given, **settings.get("ddp", {})}),
        )
        return Policy(
            model=ModelConfig(
                path=str(folder),
                dtype=settings.get("dtype", "float32"),
                recompute=settings.get("recompute", "none"),
                head_chunk_tokens=settings.get("chunk", 7),
                fp8=FP8Config(**settings["fp8"]) if "fp8" in settings else None,
            ),
            parallel=ParallelConfig(
                tensor=settings.get("tensor", 1),
                pipeline=settings.get("pipeline", 1),
                sequence=settings.get("sequence", False),
                expert=settings.get("expert", 1),
                expert_tensor=settings.get("expert_tensor"),
            ),
            optimizer=OptimizerConfig(
                lr=LEARNING_RATE,
                weight_decay=settings.get("weight_decay", 0.0),
                betas=settings.get("betas", (0.9, 0.999)),
                eps=settings.get("eps", 1e-8),
                clip_grad_norm=settings.get("clip", 1.0),
                max_tokens_per_microbatch=settings.get("max_tokens", 96),
                warmup_steps=settings.get("warmup", 0),
                schedule=settings.get("schedule", "constant"),
            ),
            teacher=TeacherConfig(**settings.get("teacher", {})),
            backend=started,
            temperature=settings.get("temperature", 1.0),
            mismatch=MismatchConfig(level="off"),
            total_steps=settings.get("total_steps", 10),
            seed=0,
            roles=settings.get("roles", ()),
            parks=settings.get("parks", False),
        )


def weights_of(policy: Any) -> dict[str, np.ndarray]:
    from megasd.weights.bucket import named_tensors

    buckets = policy.weight_buckets(whole=True)
    return {name: tensor.float().cpu().numpy().copy() for name, tensor in named_tensors(buckets)}


def score_and_learn(folder: Path, settings: Mapping[str, Any], seed: int, vocab: int) -> dict:
    """Scores before, three optimizer steps, scores after, and the final weights."""
    policy = make_policy(folder, settings)
    views = random_views(seed, count=11, vocab=vocab)
    offsets = offsets_of(views)
    before = policy.score(views, offsets)
    updates = []
    for step in range(STEPS):
        batch, credit = batch_and_credit(views, seed=100 + step)
        updates.append(policy.update(views, offsets, batch, credit, PlainLoss(), minibatch=0))
    after = policy.score(views, offsets)
    return {
        "before": [x.numpy() for x in before[:2]],
        "after": [x.numpy() for x in after[:2]],
        "metrics": [update.metrics for update in updates],
        "first_logprobs": updates[0].logprobs.numpy(),
        "first_read": updates[0].read.numpy(),
        "weights": weights_of(policy),
        "num_parameters": sum(p.numel() for p in policy.parameters.values()),
    }


def refusal(folder: Path, settings: Mapping[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"parallel\.") as failure:
        make_policy(folder, settings)
    return str(failure.value)


def frequencies(hf_config: Mapping[str, Any]) -> np.ndarray:
    """RoPE's inverse frequencies as Megatron computes them."""
    from megasd.policy import backend

    backend.start("cpu")
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megasd.policy.megatron.rope import rope_arguments

    rope = RotaryEmbedding(
        hf_config["head_dim"], 1.0, use_cpu_initialization=True, **rope_arguments(hf_config)
    )
    return rope.inv_freq.numpy()


def what_layers_on_a_gpu_do_otherwise(folder: Path) -> dict[str, Any]:
    """Scores in three ways, and the rotary embeddings that Megatron then keeps, by their lengths.

    As on a CPU; with key-value heads laid out for each query head; with few rotary lengths.
    """
    policy = make_policy(folder, {"max_tokens": 60})
    from megasd.policy.megatron.fixes import ask_for_few_rotary_lengths

    views = random_views(5, count=11, vocab=100)
    scores = [policy.score(views, offsets_of(views)).logprobs.numpy()]
    gpt, asked = policy.state.gpt, set()
    for layer in gpt.decoder.layers:
        layer.self_attention.core_attention.repeats_heads = True
    scores.append(policy.score(views, offsets_of(views)).logprobs.numpy())
    ask_for_few_rotary_lengths(gpt)
    gpt.rotary_pos_emb.register_forward_pre_hook(lambda _, given: asked.add(given[0]))
    scores.append(policy.score(views, offsets_of(views)).logprobs.numpy())
    return {"scores": scores, "asked": asked}


def join_a_world_of_its_own_twice() -> tuple[int, bool]:
    """As the tests of tests/gpu do, all of them in one process."""
    from tests.gpu.alone import join_alone

    dist.destroy_process_group()
    first, again = join_alone("cpu"), join_alone("cpu")
    return dist.get_world_size(), first is again


def learning_rates(folder: Path, settings: Mapping[str, Any], steps: int) -> list[float]:
    policy = make_policy(folder, {**settings, "total_steps": steps})
    views = random_views(1, count=2, vocab=100)
    rates = []
    for step in range(steps):
        batch, credit = batch_and_credit(views, seed=step)
        done = policy.update(views, offsets_of(views), batch, credit, PlainLoss(), minibatch=0)
        rates.append(done.metrics["lr"])
    return rates


def skip_a_broken_step(folder: Path, what: str) -> dict[str, Any]:
    """A gradient that is not finite on one data-parallel rank alone, between two good ones.

    Or an infinite loss: of the other sign on rank 0, so that the sum is no number.
    """
    policy = make_policy(folder, {"schedule": "linear", "total_steps": 4})
    views = random_views(2, count=6, vocab=100)
    offsets = offsets_of(views)
    infinite = PlainLoss(offset=-math.inf if dist.get_rank() == 0 else math.inf)
    seen, rates = [], []
    for step in range(3):
        batch, credit = batch_and_credit(views, seed=7)
        if step == 1 and what == "gradient":
            broken = credit.advantages.clone()
            broken[(credit.path == 0).nonzero()[0]] = float("inf")
            credit = credit._replace(advantages=broken)
        loss = infinite if step == 1 and what == "loss" else PlainLoss()
        before = weights_of(policy)
        done = policy.update(views, offsets, batch, credit, loss, minibatch=0)
        after = weights_of(policy)
        same = all(np.array_equal(before[name], after[name]) for name in before)
        seen.append((done.skipped, same, done.metrics["loss"], done.metrics["grad_norm"]))
        rates.append(done.metrics["lr"])
    return {
        "seen": seen,
        "rates": rates,
        "version": policy.version,
        "skipped": policy.skipped_steps,
    }


def steps_and_gradients(folder: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Three steps on one rank: weights before and after, and the gradients between them."""
    policy = make_policy(folder, settings)
    views = random_views(5, count=6, vocab=100)
    device = settings.get("device", "cpu")
    prepare, gradients = policy.state.optimizer.prepare_grads, {}

    def prepare_and_note() -> bool:
        gradients.update({n: p.main_grad.clone() for n, p in policy.parameters.items()})
        return prepare()

    def weights() -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in policy.parameters.items()}

    policy.state.optimizer.prepare_grads = prepare_and_note
    steps = []
    for step in range(3):
        batch, credit = batch_and_credit(views, seed=step, device=device)
        before = weights()
        done = policy.update(views, offsets_of(views), batch, credit, PlainLoss(), minibatch=0)
        steps.append(
            {
                "before": before,
                "gradients": dict(gradients),
                "after": weights(),
                "metrics": done.metrics,
            }
        )
    return steps


def learn_nothing_in_between(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A step, a mini-batch of which no token has weight, one without rollouts, a step."""
    policy = make_policy(folder, {**settings, "schedule": "linear", "total_steps": 2})
    from megasd.policy import forward

    views = random_views(2, count=6, vocab=100)
    batch, credit = batch_and_credit(views, seed=7)
    nothing = credit._replace(token_weights=torch.zeros_like(credit.token_weights))

    def update(credit: Credit, minibatch: int) -> Any:
        return policy.update(
            views, offsets_of(views), batch, credit, PlainLoss(), minibatch=minibatch
        )

    def everything() -> list[torch.Tensor]:
        moments = [
            tensor.clone()
            for part in policy.state.optimizer.chained_optimizers
            for of_parameter in part.optimizer.state.values()
            for tensor in of_parameter.values()
        ]
        return [p.detach().clone() for p in policy.parameters.values()] + moments

    first, before, run = update(credit, 0), everything(), forward.run
    forward.run = None  # pyright: ignore[reportAttributeAccessIssue]
    try:
        empty = [update(nothing, 0), update(credit, 1)]
    finally:
        forward.run = run
    same = all(torch.equal(*pair) for pair in zip(before, everything(), strict=True))
    last = update(credit, 0)
    return {
        "outcomes": [done.outcome for done in (first, *empty, last)],
        "metrics": [done.metrics for done in empty],
        "same": same,
        "version": policy.version,
        "rates": [first.metrics["lr"], last.metrics["lr"]],
    }


def train_one_layer_only(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the model's first layer is frozen; a step, and one that is skipped."""
    from megasd.policy import backend

    backend.start("cpu")
    from megasd.policy import policy as module

    load = module.load_model

    def load_and_freeze(*args: Any) -> Any:
        loaded = load(*args)
        is_first = loaded.gpt.pre_process
        for name, parameter in loaded.gpt.named_parameters():
            parameter.requires_grad = is_first and name.startswith("decoder.layers.0.")
        return loaded

    module.load_model = load_and_freeze
    try:
        policy = make_policy(folder, settings)
    finally:
        module.load_model = load
    views = random_views(2, count=4, vocab=100)
    batch, credit = batch_and_credit(views, seed=7)
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    done = [
        policy.update(views, offsets_of(views), batch, credit, PlainLoss(root=broken), minibatch=0)
        for broken in (False, True)
    ]
    return {
        "outcomes": [one.outcome for one in done],
        "changed": [n for n, p in policy.parameters.items() if not torch.equal(before[n], p)],
        "bad": list(done[1].bad_gradients),
    }


def stop_when_stuck(folder: Path, run_folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Skips two updates, does one, skips three in two steps of two: a limit of 3.

    It is the last rank whose gradients break.
    """
    from megasd.loop.diagnostics import Diagnostics

    policy = make_policy(folder, settings)
    views = random_views(2, count=6, vocab=100)
    batch, credit = batch_and_credit(views, seed=7)
    experience = experience_of(views, batch)
    diagnostics = Diagnostics(run_folder, config="run: {}\n", max_skipped_in_a_row=3)
    is_last = dist.get_rank() == dist.get_world_size() - 1
    before = weights_of(policy)
    step, said, after = -1, "", before
    for step, broken in enumerate([(True, True), (False, True), (True, True), (False, False)]):
        updates = [
            policy.update(
                views,
                experience.offsets,
                batch,
                credit,
                PlainLoss(root=is_broken and is_last),
                minibatch=0,
            )
            for is_broken in broken
        ]
        try:
            diagnostics.stop_if_stuck(step, experience, batch, credit, updates)
        except ValueError as error:
            said = str(error)
            break
        after = weights_of(policy)
    last = weights_of(policy)
    return {
        "step": step,
        "said": said,
        "learnt": any(not np.array_equal(before[name], after[name]) for name in before),
        "same": all(np.array_equal(after[name], last[name]) for name in after),
    }


def experience_of(views: list[View], batch: ResponseBatch) -> Experience:
    rollouts = [
        Rollout(
            prompt=Prompt(index=i, messages=({"content": f"{i} ="},), token_ids=view.prompt_ids),
            group_id=i // 2,
            sample=i % 2,
            token_ids=view.response_ids,
            logprobs=None,
            text="",
            finish_reason="stop",
            policy_version=0,
        )
        for i, view in enumerate(views)
    ]
    return Experience(
        rollouts=rollouts,
        verdicts=[Verdict(reward=math.inf)] * len(rollouts),
        batch=batch,
        offsets=offsets_of(views),
        student_views=views,
        metrics={},
    )


def mismatch_and_temperature(folder: Path) -> dict[str, Any]:
    """The loss with an engine whose log-probs differ, beside the scores it should follow from."""
    from dataclasses import replace

    policy = make_policy(folder, {"temperature": 0.7})
    policy.mismatch = MismatchConfig(level="token", clip=1.5)
    views = random_views(3, count=5, vocab=100)
    offsets = offsets_of(views)
    scores = policy.score(views, offsets)
    batch, credit = batch_and_credit(views, seed=1)
    shift = torch.linspace(-1.0, 1.0, len(batch.rollout_ids))
    batch = replace(batch, rollout_logprobs=scores.logprobs - shift)
    done = policy.update(views, offsets, batch, credit, PlainLoss(), minibatch=0)
    return {
        "loss": done.metrics["loss"],
        "logprobs": scores.logprobs,
        "entropy": scores.entropy,
        "shift": shift,
        "credit": tuple(credit[:3]),
    }


def spread_work(world_size: int, failing_rank: int | None) -> Any:
    """Two workers of all ranks square numbers; maybe one of them breaks."""
    from megasd.rollout.spread import Spread

    rank = dist.get_rank()
    spread = Spread(rank // 2 if rank % 2 == 0 else None, world_size // 2)

    def work(share: Any) -> list[tuple[int, int]]:
        if rank == failing_rank:
            raise KeyError("a verifier is missing")
        return [(rank, x * x) for x in share]

    return spread.map(list(range(7)), work)
