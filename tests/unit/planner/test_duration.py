"""The planner's seconds: against steps that others published, and against sums done by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import megasd
from megasd.planner import published
from megasd.planner.decoding import Decoder, Lengths, rollout_seconds
from megasd.planner.duration import Duration, duration
from megasd.planner.memory import Scenario, memory
from megasd.planner.passes import Pass
from megasd.planner.published import PHASES, STEPS, Step
from megasd.planner.sync import reload_seconds

LLAMA, EXPERTS, DENSE = STEPS


def scenario(step: Step = LLAMA, **assumed: float) -> Scenario:
    found = step.scenario()
    return dataclasses.replace(found, assumed=dataclasses.replace(found.assumed, **assumed))


def changed(start: Scenario, section: str, **values: Any) -> Scenario:
    """`section`: of the configuration; `rollout.vllm` is one of its own."""
    config, (outer, _, inner) = start.config, section.partition(".")
    part = getattr(config, outer)
    if inner:
        values = {inner: dataclasses.replace(getattr(part, inner), **values)}
    config = dataclasses.replace(config, **{outer: dataclasses.replace(part, **values)})
    return dataclasses.replace(start, config=config)


def rollout(start: Scenario, *, room: int = 200 * 2**30) -> float:
    return rollout_seconds(start, room)


def timed(start: Scenario) -> Duration:
    return duration(start, memory(start), with_sync=False)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.model)
def test_a_step_takes_what_others_published_for_its_layout(step: Step) -> None:
    assert 0.8 <= step.plan().total / step.seconds <= 1.25


@pytest.mark.parametrize("step", PHASES[:2], ids=lambda step: step.model)
def test_where_the_seconds_of_a_dense_model_go_is_as_published(step: Step) -> None:
    """The sync is another program's: theirs moves the trainer's state to the CPU and back."""
    assert step.phases is not None
    time = step.plan().phases
    for phase in ("rollout", "score", "update"):
        assert time[phase] == pytest.approx(step.phases[phase], rel=0.2), phase


def test_balanced_experts_in_full_microbatches_train_as_fast_as_in_pretraining() -> None:
    """Megatron-LM publishes 234 to 241 TFLOP/s for 30B-A3B in bfloat16 on H100 (its Qwen3 MoE
    recipes, every token on its fair share of the experts); of a peak of 989."""
    found = timed(scenario(EXPERTS, expert_imbalance=1.0, packing=1.0))
    reached = found.mfu * found.update / (found.update - found.optimizer) * 989
    assert 210 < reached < 270


def test_the_page_shows_what_the_command_prints() -> None:
    page = (Path(megasd.__file__).parent / "docs" / "plan.md").read_text(encoding="utf-8")
    assert published.as_text() in page


def test_lengths_have_the_mean_that_is_asked_for() -> None:
    for mean in (0.2, 0.5, 0.78, 1.0):
        lengths = Lengths(mean)
        steps = [(n + 0.5) / 10_000 for n in range(10_000)]
        assert sum(map(lengths.running, steps)) / 10_000 == pytest.approx(mean, abs=1e-3)
        # Of the tokens: a response of length x has them at x / 2 on average.
        position = sum(x * lengths.running(x) for x in steps) / sum(map(lengths.running, steps))
        assert lengths.mean_position == pytest.approx(position, abs=2e-3)


def test_a_token_of_a_dense_model_is_its_weights_and_caches_and_what_no_gpu_makes_shorter() -> None:
    """Llama-3.1-8B, 8.03e9 parameters of which 128,256 x 4,096 are the embedding, in bfloat16 at
    60% of 3.35 TB/s; keys and values of 32 layers x 8 heads x 128."""
    weights = 2 * (8_030_261_248 - 128_256 * 4096)
    caches = 128 * 1000 * 32 * 2 * 8 * 128 * 2
    own = 2.5e-3 + 128 * 10e-6 + 32 * 15e-6
    found = Decoder(scenario(), tensor=1).step_seconds(128, 1000)
    assert found == pytest.approx((weights + caches) / (0.6 * 3.35e12) + own, rel=1e-3)
    # Four GPUs read a quarter each, and meet twice in a layer: a row of 4,096 for each sequence.
    meeting = 32 * 2 * (25e-6 + 128 * 8192 * 1.5 / (0.7 * 450e9))
    engine = changed(scenario(), "rollout.vllm", tensor=4)
    shared = Decoder(engine, tensor=4).step_seconds(128, 1000)
    reading = (weights + caches) / 4 / (0.6 * 3.35e12)
    assert shared == pytest.approx(reading + own + meeting, rel=2e-3)


def test_a_batch_lasts_as_long_as_its_longest_response() -> None:
    """With a tenth of the tokens it takes far more than a tenth of the time; none is free."""
    short, full = scenario(mean_length=0.1), scenario(mean_length=1.0)
    longest = 3840 * Decoder(short, tensor=1).step_seconds(1, 0)
    assert longest < rollout(short) < 0.5 * rollout(full)
    lengths = [rollout(scenario(mean_length=share / 10)) for share in range(1, 11)]
    assert lengths == sorted(lengths)


def test_what_does_not_run_at_once_comes_later() -> None:
    """Sequences are limited by a number, or by the room of their caches, and never for free."""
    whole = rollout(scenario())  # 128 on an engine
    limits = (256, 128, 127, 64, 32, 1)
    times = [rollout(changed(scenario(), "rollout.vllm", max_sequences=limit)) for limit in limits]
    assert times[0] == times[1] == whole
    assert times == sorted(times)
    assert times[2] < 1.02 * whole  # one sequence more is no second wave
    assert times[-1] > 10 * whole
    small = rollout(scenario(), room=2 * 2**30)
    assert times[2] < small < times[-1]


def test_more_gpus_in_an_engine_do_not_pay_for_a_small_model() -> None:
    """All of them take part in fewer engines, and each token waits for the others twice a layer."""
    start = scenario()
    times = [rollout(changed(start, "rollout.vllm", tensor=tensor)) for tensor in (1, 2, 4, 8)]
    assert times[3] > times[0]


def test_experts_wait_for_the_busiest_of_their_ranks() -> None:
    even, uneven = (timed(scenario(EXPERTS, expert_imbalance=share)) for share in (1.0, 2.0))
    assert uneven.communication == pytest.approx(2 * even.communication)
    assert even.update < uneven.update < 2 * even.update
    assert even.rollout == uneven.rollout
    assert timed(scenario(DENSE, expert_imbalance=2.0)) == timed(DENSE.scenario())


def test_the_products_of_a_pass_are_those_of_the_model() -> None:
    """6 for each weight that a token meets, as everyone counts; attention and head beside them."""
    start = DENSE.scenario()
    one = Pass.over(start, backwards=1)
    tokens = 2048 / 2 * 3251  # of one of two replicas
    layers = 31_206_298_624 - 64 * 2 * (5120 + 128) - 5120  # published, without embeddings; norms
    attention = 64 * 2 * 64 * 128 * 3251 / 2
    head = 5120 * 151_936 * 3840 / 4096  # of the tokens that are a response's
    assert one.model_flops() == pytest.approx(6 * tokens * (layers + attention + head), rel=1e-6)
    # The stage with the head computes a quarter of the layers, and all of the head once more.
    share = 4 * 989e12 * 0.45
    compute = 6 * tokens * ((layers + attention) / 4 / 0.9 + head * 4 / 3) / share
    assert one.compute_seconds(start) == pytest.approx(compute, rel=1e-6)
    again = Pass.over(start, forwards=2, backwards=1)
    more = 2 * tokens * (layers + attention) / 4 / 0.9 / share
    assert again.compute_seconds(start) == pytest.approx(compute + more, rel=1e-6)


def test_gradients_are_summed_beside_the_last_backward_pass_of_a_step() -> None:
    """4 bytes a parameter over 35 GB/s between the nodes; hidden as far as that pass lasts."""
    start = changed(LLAMA.scenario(), "parallel", pipeline=1)
    held = memory(start)
    share = 15 / 16 / (0.7 * 50e9)
    touched = (2 * held.optimizer + held.gradients) / (0.6 * 3.35e12)
    gathered = held.weights * share + touched
    backward = Pass.over(start, forwards=2, backwards=1).compute_seconds(start) / 2
    micro = backward / (4 * start.microbatches)
    found = duration(start, held, with_sync=False)
    assert micro < held.gradients * share
    assert found.optimizer == pytest.approx(4 * (held.gradients * share - micro + gathered))
    longer = changed(start, "optimizer", max_tokens_per_microbatch=20 * 4096)
    again = duration(longer, dataclasses.replace(held), with_sync=False)
    assert again.optimizer == pytest.approx(4 * gathered)


def test_an_engine_loads_stacks_of_experts_and_each_expert_into_its_stack() -> None:
    """30B-A3B: 435 tensors beside 3 stacks in each of 48 layers, of 128 experts each."""
    one = scenario(EXPERTS)

    def seconds(**vllm: Any) -> float:
        config = changed(one, "rollout.vllm", placement="server", **vllm).config
        return reload_seconds(one.model, config.rollout, one.assumed)

    calls, experts = (
        (435 + 144) * one.assumed.tensor_seconds,
        144 * 128 * one.assumed.expert_seconds,
    )
    assert seconds(tensor=4) == pytest.approx(calls + experts)
    assert seconds(tensor=4, expert_parallel=True) == pytest.approx(calls + experts / 4)
    assert seconds(tensor=4, quantization="fp8") == pytest.approx(2 * (calls + experts))
