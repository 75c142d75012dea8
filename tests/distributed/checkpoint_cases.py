"""What ranks run for the tests of checkpoints."""

import contextlib
import dataclasses
import gc
import io
import resource
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megasd.types import Prompt
from tests.distributed import policy_cases as cases


def _a_run(
    folder: Path, run_folder: Path, settings: Mapping[str, Any], **options: Any
) -> tuple[Any, Any, Any]:
    policy = cases.make_policy(folder, settings)
    from megasd.checkpoint.checkpoints import Checkpoints
    from megasd.checkpoint.config import CheckpointConfig
    from megasd.data.prompts import Prompts

    prompts = Prompts(
        [Prompt(index=i, messages=(), token_ids=np.array([i])) for i in range(7)], seed=0
    )
    config = CheckpointConfig(every=3, keep=2)
    return policy, prompts, Checkpoints(config, run_folder, policy, prompts, **options)


def _learn(policy: Any, prompts: Any, steps: range) -> list[Any]:
    views = cases.random_views(5, count=7, vocab=121)
    offsets = cases.offsets_of(views)
    seen = []
    for step in steps:
        batch, credit = cases.batch_and_credit(views, 100 + step, policy.backend.device.type)
        result = policy.update(views, offsets, batch, credit, cases.PlainLoss(), minibatch=0)
        policy.teacher.after_batch(step, updated=True)
        drawn = [prompt.index for prompt in prompts.next(3)]
        teacher = policy.score_teacher("teacher", views, offsets).logprobs.cpu().numpy().copy()
        seen.append((result.metrics, drawn, torch.rand(3).tolist(), teacher))
    return seen


def _everything(policy: Any, seen: list[Any]) -> dict[str, Any]:
    return {"seen": seen, "weights": cases.weights_of(policy), "version": policy.version}


@contextlib.contextmanager
def _slow_disk() -> Iterator[None]:
    """Not a byte of a checkpoint is written before the end of it."""
    from megasd.checkpoint import writer

    has_room, write = threading.Event(), writer._write

    def wait_and_write(*args: Any) -> Any:
        assert has_room.wait(60)
        return write(*args)

    writer._write = wait_and_write
    try:
        yield
    finally:
        has_room.set()
        writer._write = write


def save_in_the_middle(folder: Path, run_folder: Path, settings: Mapping[str, Any]) -> Any:
    """Written while the run goes on."""
    policy, prompts, checkpoints = _a_run(folder, run_folder, settings)
    _learn(policy, prompts, range(3))
    checkpoints.memory["seen"] = torch.arange(3.0)
    with _slow_disk():
        checkpoints.save_if_due(2, last=False)
        checkpoints.memory["seen"] += 1
        everything = _everything(policy, _learn(policy, prompts, range(3, 6)))
        checkpoints.save_if_due(3, last=False)
        assert not list(checkpoints.folder.glob("step_*"))
    checkpoints.close()
    return everything


def save_by_time(folder: Path, run_folder: Path) -> list[int]:
    """The steps that are saved, of steps that end at these seconds on the first rank's clock."""
    import torch.distributed as dist

    clock = [0.0]
    _, _, checkpoints = _a_run(
        folder, run_folder, {}, clock=lambda: clock[0] * 10 ** dist.get_rank()
    )
    checkpoints.config = dataclasses.replace(checkpoints.config, every=0, minutes=1.0, keep=9)
    for step, now in enumerate((59.0, 61.0, 90.0, 120.0, 122.0)):
        clock[0] = now
        checkpoints.save_if_due(step, last=False)
        if checkpoints._writing is not None:  # it would wait for a step after it
            checkpoints._settle(wait=True)
    from megasd.checkpoint.checkpoints import saved_steps

    return saved_steps(checkpoints.folder)


def give_a_step_up(folder: Path, run_folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Asked to stop when prompts were drawn for the step after the third."""
    policy, prompts, checkpoints = _a_run(folder, run_folder, settings)
    checkpoints.save_last_step()
    assert not checkpoints.folder.exists(), "nothing was done"
    _learn(policy, prompts, range(3))
    checkpoints.memory["seen"] = torch.arange(3.0)
    checkpoints.config = dataclasses.replace(checkpoints.config, every=0)
    checkpoints.save_if_due(2, last=False)
    position = prompts.position
    prompts.next(5)
    checkpoints.save_last_step()
    written = (checkpoints.folder / "step_000003").stat().st_mtime_ns
    checkpoints.save_last_step()
    assert (checkpoints.folder / "step_000003").stat().st_mtime_ns == written, "it is saved already"
    assert prompts.position == position
    return _everything(policy, _learn(policy, prompts, range(3, 6)))


def resume(
    folder: Path, run_folder: Path, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What came after, and the notes that restoring printed."""
    torch.manual_seed(12345)  # the saved state must win
    policy, prompts, checkpoints = _a_run(folder, run_folder, settings)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        checkpoints.restore()
    assert checkpoints.next_step == 3
    assert checkpoints.memory["seen"].tolist() == [0, 1, 2], "what the algorithm remembers"
    return _everything(policy, _learn(policy, prompts, range(3, 6))), _sentences(said)


def save_as_it_was_with_a_scheduler(
    folder: Path, run_folder: Path, settings: Mapping[str, Any]
) -> list[float]:
    """After three steps, with what checkpoints held when Megatron's scheduler counted them."""
    policy, prompts, checkpoints = _a_run(folder, run_folder, settings)
    from megasd.checkpoint import checkpoints as module

    rates = [metrics["lr"] for metrics, *_ in _learn(policy, prompts, range(3))]
    real = module.sharded_state
    old = {"num_steps": 3, "lr_decay_steps": 3, "max_lr": 1.0, "lr_decay_style": "constant"}
    module.sharded_state = lambda *args, **kwargs: {**real(*args, **kwargs), "scheduler": old}
    try:
        checkpoints.save(3)
    finally:
        module.sharded_state = real
    return rates


def save_a_moving_average_whole(
    folder: Path, run_folder: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """After three steps, as when every data-parallel rank kept all of it; then the run goes on."""
    policy, prompts, checkpoints = _a_run(folder, run_folder, settings)
    _learn(policy, prompts, range(3))
    from megasd.checkpoint import model_state

    def whole(policy: Any, model: dict[str, Any], *, loading: bool) -> dict[str, Any]:
        tensors = {
            name: tensor
            for bucket, kept in zip(policy.teacher.buckets, policy.teacher.kept, strict=True)
            for name, _, tensor in dataclasses.replace(bucket, data=bucket.data.float()).views(
                dataclasses.replace(bucket, data=bucket.data.float()).gather(kept)
            )
        }
        shards = {
            name: dataclasses.replace(
                shard,
                data=tensors[name],
                **({"dtype": torch.float32} if hasattr(shard, "dtype") else {}),
            )
            for name, shard in model.items()
            if name in tensors
        }
        model_state.add_prefix_for_sharding(shards, "teacher.")
        return shards

    checkpoints.memory["seen"] = torch.arange(3.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_state, "_average", whole)
        checkpoints.save(3)
    return _everything(policy, _learn(policy, prompts, range(3, 6)))


def resume_with_other_settings(
    folder: Path, run_folder: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What of the optimizer's groups is this run's, and the rates of the steps that are left."""
    policy, prompts, checkpoints = _a_run(folder, run_folder, settings)
    groups = policy.state.optimizer.param_groups
    own = {"max_lr": 7.0, "min_lr": 5.0, "betas": (0.5, 0.75), "eps": 0.25, "weight_decay": 0.125}
    for group in groups:
        group.update(own)
    checkpoints.restore()
    left = range(3, settings["total_steps"])
    return {
        "own": all(
            {name: group[name] for name in own} == own
            for group in policy.state.optimizer.param_groups
        ),
        "steps": {
            float(state["step"])
            for part in policy.state.optimizer.chained_optimizers
            for state in part.optimizer.state.values()
        },
        "rates": [metrics["lr"] for metrics, *_ in _learn(policy, prompts, left)],
    }


class AdamWithoutState(torch.optim.Optimizer):
    """What Transformer Engine's FusedAdam keeps, and when: of each parameter nothing before its
    first step, after it both moments; the number of steps in the param groups."""

    def __init__(self, params: Any, *, adam_w_mode: bool, **defaults: Any) -> None:
        assert adam_w_mode
        super().__init__(params, {"bias_correction": True, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (first, second), step = group["betas"], group["step"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    if name not in state:
                        state[name] = torch.zeros_like(parameter)
                state["exp_avg"].lerp_(parameter.grad, 1 - first)
                state["exp_avg_sq"].lerp_(parameter.grad**2, 1 - second)
                scale = (state["exp_avg_sq"] / (1 - second**step)).sqrt_() + group["eps"]
                change = state["exp_avg"] / (1 - first**step) / scale
                parameter.sub_(group["lr"] * (change + group["weight_decay"] * parameter))


@contextlib.contextmanager
def _an_adam_without_state() -> Iterator[None]:
    """Megatron's optimizers are made as where Transformer Engine is installed."""
    from megasd.policy import backend

    backend.start("cpu")
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
        patch.setattr(optimizer, "Adam", AdamWithoutState)
        patch.setattr(distrib_optimizer, "Adam", AdamWithoutState)
        patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
        patch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
        yield


def save_before_the_first_step(
    folder: Path, run_folder: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The first step is skipped, and what comes is saved; then the run goes on."""
    policy, prompts, checkpoints = _a_run(folder, run_folder, settings)
    views = cases.random_views(5, count=7, vocab=121)
    batch, credit = cases.batch_and_credit(views, 99, policy.backend.device.type)
    credit = credit._replace(advantages=torch.full_like(credit.advantages, float("nan")))
    offsets = cases.offsets_of(views)
    done = policy.update(views, offsets, batch, credit, cases.PlainLoss(), minibatch=0)
    assert done.skipped
    checkpoints.save(1)
    return _everything(policy, _learn(policy, prompts, range(1, 3)))


def resume_before_the_first_step(
    folder: Path, run_folder: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    policy, prompts, checkpoints = _a_run(folder, run_folder, settings)
    checkpoints.restore()
    return _everything(policy, _learn(policy, prompts, range(1, 3)))


def save_before_the_first_step_of_another_adam(*arguments: Any) -> dict[str, Any]:
    with _an_adam_without_state():
        return save_before_the_first_step(*arguments)


def resume_before_the_first_step_of_another_adam(*arguments: Any) -> dict[str, Any]:
    with _an_adam_without_state():
        return resume_before_the_first_step(*arguments)


def resume_what_is_not_this_run(folder: Path, run_folder: Path) -> str:
    _, _, checkpoints = _a_run(folder, run_folder, {})
    with pytest.raises(ValueError, match="resume") as failure:
        checkpoints.restore()
    return str(failure.value)


def save_three(folder: Path, run_folder: Path) -> list[float]:
    """After the first, second and third step; a weight at each."""
    policy, prompts, checkpoints = _a_run(folder, run_folder, {})
    checkpoints.config = dataclasses.replace(checkpoints.config, keep=3)
    seen = []
    for step in range(3):
        _learn(policy, prompts, range(step, step + 1))
        checkpoints.save(step + 1)
        seen.append(_some_weight(policy))
    return seen


def _some_weight(policy: Any) -> float:
    return float(policy.state.gpt.decoder.layers[0].mlp.linear_fc1.weight.detach()[0, 0])


def restore(folder: Path, run_folder: Path) -> tuple[int, float, list[str], str]:
    """The step and the weight it goes on from, what was printed, and the sentence of a refusal."""
    policy, _, checkpoints = _a_run(folder, run_folder, {})
    refusal = ""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            checkpoints.restore()
        except ValueError as error:
            refusal = str(error)
    return checkpoints.next_step, _some_weight(policy), _sentences(said), refusal


def _sentences(said: io.StringIO) -> list[str]:
    """What megasd printed, without the warnings of libraries."""
    return [line for line in said.getvalue().splitlines() if line.startswith("megasd: ")]


def restore_and_save(folder: Path, run_folder: Path) -> None:
    _, _, checkpoints = _a_run(folder, run_folder, {})
    checkpoints.restore()
    checkpoints.save(checkpoints.next_step + 1)


def save_on_a_disk_that_is_full_for_a_while(folder: Path, run_folder: Path) -> list[str]:
    """What the first rank prints in three steps, the first two of which find no room."""
    import torch.distributed as dist

    _, _, checkpoints = _a_run(folder, run_folder, {})
    from megasd.checkpoint.checkpoints import SaveError

    checkpoints.config = dataclasses.replace(checkpoints.config, every=4)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        with _full_disk(dist.get_rank() == 1):
            checkpoints.save_if_due(3, last=False)
            checkpoints.close()
            checkpoints.save_if_due(4, last=False)
            checkpoints.close()
        checkpoints.save_if_due(5, last=False)
        checkpoints.close()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_000006"]
    checkpoints.save_if_due(6, last=False)
    with _full_disk(dist.get_rank() == 1):
        for step in range(7, 10):
            checkpoints.save_if_due(step, last=False)
            checkpoints.close()
        with pytest.raises(SaveError, match="step_000010 could not be written"):
            checkpoints.save_if_due(10, last=False)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_000006"]
    return _sentences(said)


@contextlib.contextmanager
def _full_disk(is_full: bool) -> Iterator[None]:
    """This rank cannot write files of more than 10 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if is_full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def _copies() -> Iterator[list[Any]]:
    """Weak references to the copies in host memory that saves make."""
    from megasd.checkpoint import checkpoints

    copies, stage = [], checkpoints.stage

    def remember(*arguments: Any, **options: Any) -> Any:
        staged = stage(*arguments, **options)
        for _, _, (_, tensors) in staged.buckets:
            copies.extend(weakref.ref(tensor) for _, tensor in tensors)
        return staged

    checkpoints.stage = remember
    try:
        yield copies
    finally:
        checkpoints.stage = stage


def restore_weights(policy: Any, run_folder: Path) -> None:
    """The weights of the newest checkpoint by Megatron's own loader, whatever their layout was."""
    from megatron.core import dist_checkpointing

    from megasd.checkpoint.checkpoints import newest

    model = policy.state.gpt.sharded_state_dict()
    saved: Any = dist_checkpointing.load({"model": model}, str(newest(run_folder / "checkpoints")))
    policy.state.gpt.load_state_dict(saved["model"], strict=False)


def read_weights_in_another_layout(
    folder: Path, run_folder: Path, settings: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    policy = cases.make_policy(folder, settings)
    restore_weights(policy, run_folder)
    return cases.weights_of(policy)


def weights_after_three_steps(folder: Path, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    policy, prompts, _ = _a_run(folder, folder, settings)
    _learn(policy, prompts, range(3))
    return cases.weights_of(policy)


def fail_to_save(folder: Path, run_folder: Path, failing_rank: int) -> list[int]:
    """One rank has a full disk: every rank hears of it."""
    import torch.distributed as dist

    _, _, checkpoints = _a_run(folder, run_folder, {})
    from megasd.checkpoint.checkpoints import SaveError, saved_steps

    checkpoints.save(1)
    # Where the limit is met decides which of torch's layers words the cause.
    cause = rf"rank {failing_rank}: .*\w"
    sentence = rf"step_000002 could not be written \(.*{cause}.*free.*\[1\].*--resume"
    gc.disable()
    with _copies() as copies:
        with pytest.raises(SaveError, match=sentence), _full_disk(dist.get_rank() == failing_rank):
            checkpoints.save(2)
        assert copies
        assert not [copy for copy in copies if copy() is not None], "without a garbage collector"
    gc.enable()
    checkpoints.restore()  # the earlier one is still good
    assert checkpoints.next_step == 1
    checkpoints.save(2)  # and with room again, saving works
    return saved_steps(run_folder / "checkpoints")


def megatron_faults(folder: Path, run_folder: Path) -> dict[str, bool]:
    """Whether each fault that policy/megatron/fixes.py mends is still there."""
    policy, prompts, checkpoints = _a_run(folder, run_folder, {})
    from megatron.core import dist_checkpointing
    from megatron.core.optimizer import get_megatron_optimizer

    from megasd.checkpoint.model_state import sharded_state

    _learn(policy, prompts, range(1))
    checkpoints.save(1)
    found = {}
    bare: Any = get_megatron_optimizer(
        policy.state.optimizer.config, [policy.state.ddp], use_gloo_process_groups=False
    )
    found["no state before the first step"] = not bare.chained_optimizers[0].optimizer.state
    parameter = next(iter(bare.chained_optimizers[0].model_param_group_index_map))
    adam = policy.state.optimizer.chained_optimizers[0]
    with_step = type(adam)._get_main_param_and_optimizer_states(adam, parameter)
    found["step among the parameter's tensors"] = "step" in with_step
    state: Any = dist_checkpointing.load(
        sharded_state(policy, loading=True), str(run_folder / "checkpoints" / "step_000001")
    )
    with torch.no_grad():
        policy.state.optimizer.load_state_dict(state["optimizer"])
    steps = [s["step"] for s in adam.optimizer.state.values()]
    found["one step for all parameters"] = len({step.data_ptr() for step in steps}) < len(steps)
    return found
