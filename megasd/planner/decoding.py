"""Seconds in which engines sample a step's responses.

One step of an engine adds a token to every running sequence. It takes as long as reading the
weights and the caches of those sequences (or computing with them, where that is longer), and what
does not shrink with more GPUs: the engine's own program, and in each layer its kernels and the
all-reduces between its GPUs. The last sequences run in a small batch, so that a batch of responses
of unequal length lasts about as long as its longest: lengths are spread as `Lengths` says.
"""

from dataclasses import dataclass
from math import ceil, inf

from megasd.planner.memory import Scenario, cache_bytes, engine_weight_bytes

POINTS = 64  # of the integral over the positions of a response


@dataclass(frozen=True)
class Lengths:
    """How long responses are, as shares of the maximum: longer than x are 1 - x^k of them.

    k follows from the mean, k / (k + 1); some always reach the maximum.
    """

    mean: float

    @property
    def power(self) -> float:
        return self.mean / (1 - self.mean) if self.mean < 1 else inf

    def running(self, x: float) -> float:
        """Of sequences that started together: the share that is not done at x."""
        return 1 - x**self.power

    @property
    def mean_position(self) -> float:
        """Of a token in its response, over all tokens: half the mean square over the mean."""
        return 0.5 if self.mean >= 1 else self.power / (self.power + 2) / (2 * self.mean)


def points() -> list[float]:
    return [(n + 0.5) / POINTS for n in range(POINTS)]


@dataclass(frozen=True)
class Decoder:
    """One engine of `tensor` GPUs."""

    scenario: Scenario
    tensor: int
    is_hf: bool = False

    def step_seconds(self, running: float, context: float) -> float:
        """One token more of so many sequences of `context` tokens on average."""
        model, gpu, assumed = self.scenario.model, self.scenario.machine.gpu, self.scenario.assumed
        read = self._weights(running)
        read += running * context * cache_bytes(self.scenario, self.tensor)
        flops = 2 * running * (model.layers * model.active_weights + model.head_weights)
        work = max(
            read / (gpu.memory_bandwidth * assumed.decode_bandwidth),
            flops / (self.tensor * gpu.bf16_flops * assumed.prefill_flops),
        )
        return work + self._fixed_seconds(running)

    def _weights(self, running: float) -> float:
        """Bytes of the weights that a step reads on one GPU: of experts those that are chosen."""
        model, vllm = self.scenario.model, self.scenario.config.rollout.vllm
        weights = engine_weight_bytes(self.scenario)
        if not model.hf_config["tie_word_embeddings"]:  # of the embedding, a row for a sequence
            weights -= model.head_weights / self.tensor * self.scenario.dtype_bytes
        if model.experts:
            experts = model.layers * model.experts * model.ffn_weights / self.tensor
            experts *= 1 if vllm.quantization == "fp8" else self.scenario.dtype_bytes
            touched = 1 - (1 - model.experts_per_token / model.experts) ** running
            weights -= experts * (1 - touched)
        return weights

    def _fixed_seconds(self, running: float) -> float:
        model, machine, assumed = self.scenario.model, self.scenario.machine, self.scenario.assumed
        if self.is_hf:
            return model.layers * assumed.hf_layer_seconds
        layer = assumed.decode_layer_seconds * (2 if model.experts else 1)
        if self.tensor > 1:
            row = running * model.hidden * self.scenario.dtype_bytes
            moved = 2 * row * (self.tensor - 1) / self.tensor
            reached = machine.bandwidth(self.tensor) * assumed.collectives
            layer += 2 * (assumed.all_reduce_seconds + moved / reached)
        own = assumed.decode_step_seconds + running * assumed.decode_sequence_seconds
        return own + model.layers * layer


def rollout_seconds(scenario: Scenario, room: int) -> float:
    """Prompts once, then one token of every running sequence at a time; `room`: bytes of caches
    on each GPU of an engine."""
    config, machine = scenario.config, scenario.machine
    rollout, vllm = config.rollout, config.rollout.vllm
    is_hf = rollout.engine == "hf"
    if is_hf:
        engines, tensor = scenario.replicas, 1
    else:
        tensor = vllm.tensor
        engines = machine.count // tensor if scenario.has_vllm_here else vllm.engines
    sequences = scenario.rollouts / max(1, engines)
    decoder = Decoder(scenario, tensor, is_hf)
    decode = _batches(decoder, sequences) if is_hf else _continuous(decoder, room, sequences)
    prompts = rollout.prompts_per_step * scenario.mean_prompt / max(1, engines)
    active = scenario.model.layers * scenario.model.active_weights
    reached = scenario.assumed.prefill_flops
    return decode + 2 * prompts * active / (tensor * machine.gpu.bf16_flops * reached)


def _batches(decoder: Decoder, sequences: float) -> float:
    """One batch after the other, each as long as its longest sequence."""
    config = decoder.scenario.config.rollout
    running = max(1.0, min(config.batch_size, sequences))
    step = decoder.step_seconds(running, _context(decoder.scenario, 0.5))
    return ceil(sequences / running) * config.max_response_tokens * step


def _continuous(decoder: Decoder, room: int, sequences: float) -> float:
    """As many sequences as may run, with new ones where others end; then those that are left."""
    scenario = decoder.scenario
    longest, lengths = scenario.config.rollout.max_response_tokens, _lengths(scenario)
    cached = cache_bytes(scenario, decoder.tensor)
    # Of those that start together: where all their caches take most.
    peak = max(lengths.running(x) * _context(scenario, x) for x in points()) * cached
    running = min(sequences, scenario.config.rollout.vllm.max_sequences, room / max(1.0, peak))
    running = max(1.0, running)
    steady = decoder.step_seconds(running, _context(scenario, lengths.mean_position))
    replaced = (sequences - running) / running * scenario.mean_response * steady
    left = 0.0
    for x in points():
        still = max(1.0, running * lengths.running(x))
        left += decoder.step_seconds(still, _context(scenario, x)) * longest / POINTS
    return max(0.0, replaced) + left


def _lengths(scenario: Scenario) -> Lengths:
    return Lengths(min(1.0, scenario.assumed.mean_length))


def _context(scenario: Scenario, x: float) -> float:
    return scenario.mean_prompt + x * scenario.config.rollout.max_response_tokens
