"""Whether a configuration can run: every check across sections, files and model, all at once.

Each `check_*` returns sentences "dotted.key: what is wrong; what to do", which also name the other
keys that are involved. `validate` puts the file in front that set the first key, and leaves out
sentences about keys that another fault already speaks of.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from megasd.configuration.load import Config, Loaded, is_within, keys_in
from megasd.metrics.run_folder import holds_a_run
from megasd.policy.checks import (
    check_cut,
    check_experts,
    check_fp8,
    check_fp8_cut,
    check_layers,
    check_layout,
    ranks_per_replica,
)

AT_LEAST_1 = (
    "run.steps",
    "model.max_context_tokens",
    "model.head_chunk_tokens",
    "data.max_prompt_tokens",
    "context.max_tokens",
    "teacher.every",
    "rollout.prompts_per_step",
    "rollout.group_size",
    "rollout.max_response_tokens",
    "rollout.batch_size",
    "rollout.vllm.tensor",
    "rollout.vllm.engines",
    "rollout.vllm.max_sequences",
    "rollout.vllm.start_timeout_seconds",
    "rollout.vllm.timeout_seconds",
    "rollout.sync.bucket_mib",
    "reward.workers",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.expert",
    "parallel.expert_tensor",
    "parallel.timeout_seconds",
    "optimizer.minibatches_per_step",
    "optimizer.max_tokens_per_microbatch",
    "checkpoint.keep",
    "evaluation.samples",
    "evaluation.max_prompts",
)
AT_LEAST_0 = (
    "run.seed",
    "rollout.top_k",
    "rollout.sync.checksum_every",
    "optimizer.lr",
    "optimizer.min_lr",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip_grad_norm",
    "optimizer.max_skipped_in_a_row",
    "checkpoint.every",
    "evaluation.every",
    "evaluation.temperature",
    "watchdog.factor",
)
ABOVE_0 = (
    "rollout.temperature",
    "rollout.top_p",
    "rollout.mismatch.clip",
    "rollout.vllm.kv_cache_gib",
    "rollout.sync.probe_gap",
    "reward.timeout_seconds",
    "optimizer.eps",
    "checkpoint.minutes",
    "watchdog.minimum_seconds",
    "watchdog.slow_seconds",
)
# What apply_chat_template is called with, or what would change more than the prompt's text.
NOT_TEMPLATE_OPTIONS = {
    *("add_generation_prompt", "continue_final_message", "conversation", "tokenize"),
    *("max_length", "padding", "truncation", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "return_dict", "return_tensors"),
}


def validate(
    loaded: Loaded, *, world_size: int, new_run: bool, will_run_here: bool = True
) -> list[str]:
    """Every fault of a configuration that could be read; `new_run`: its folder must not exist.

    `will_run_here` False: with other packages than this process has, as in a container.
    The sentences of `loaded.errors` are not repeated.
    """
    config = loaded.config
    if config is None:
        return []
    hf_config, model_faults = read_model(config.model.path)
    numbers = check_numbers(config)
    others = [
        *check_run(config, new_run=new_run),
        *model_faults,
        *check_data(config),
        *check_context(config),
        *check_teacher(config),
        *check_sampling(config),
        *check_batch(config, world_size),
        *check_schedule(config),
        *check_layout(config.parallel, world_size=world_size, device=config.run.device),
        *check_layers(
            config.model,
            config.parallel,
            hf_config,
            device=config.run.device,
            tokens=config.optimizer.max_tokens_per_microbatch,
            longest=longest_view(config, hf_config),
        ),
        *check_fp8(config.model, config.parallel, hf_config, device=config.run.device),
        *check_cut(config.parallel, hf_config),
        *check_experts(config.parallel, hf_config),
        *check_lengths(config, hf_config),
        *check_rollout(config, hf_config, world_size, will_run_here=will_run_here),
    ]
    out_of_range = {key for sentence in numbers for key in keys_in(sentence)}
    kept = [s for s in numbers if not _speaks_of(s, loaded.faulty)]
    kept += [s for s in others if not _speaks_of(s, loaded.faulty | out_of_range)]
    return [f"{loaded.source(sentence.partition(':')[0])}: {sentence}" for sentence in kept]


def _speaks_of(sentence: str, faulty: frozenset[str]) -> bool:
    return any(is_within(key, faulty) for key in keys_in(sentence))


def check_numbers(config: Config) -> list[str]:
    """Values out of their range, whatever the other keys say."""

    def values(keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        return ((key, value) for key in keys if (value := attrgetter(key)(config)) is not None)

    faults = [
        f"{key}: {value} is out of range; set it to {low} or more"
        for low, keys in ((1, AT_LEAST_1), (0, AT_LEAST_0))
        for key, value in values(keys)
        if not (math.isfinite(value) and value >= low)
    ]
    faults += [
        f"{key}: {value} is out of range; set it above 0"
        for key, value in values(ABOVE_0)
        if not (math.isfinite(value) and value > 0)
    ]
    if config.rollout.top_p > 1:
        faults.append(f"rollout.top_p: {config.rollout.top_p} is out of range; set it to 1 or less")
    decays = [("teacher.decay", config.teacher.decay)]
    decays += [("optimizer.betas", beta) for beta in config.optimizer.betas]
    return faults + [
        f"{key}: {value} is out of range; set it to 0 or more and below 1"
        for key, value in decays
        if not 0 <= value < 1
    ]


def check_run(config: Config, *, new_run: bool) -> list[str]:
    name = config.run.name
    if not re.fullmatch(r"[A-Za-z0-9_][\w.+=-]*", name):
        return [
            f"run.name: {name!r} is not a plain folder name; use letters, digits, '.', '_' and '-'"
        ]
    folder = run_folder(config)
    if folder.exists() and not folder.is_dir():
        return [f"run.name: {folder} is not a folder; choose another name"]
    if new_run and holds_a_run(folder):
        return [
            f"run.name: {folder} holds a run already; choose another name, "
            f"or continue that run with --resume {folder}"
        ]
    return []


def run_folder(config: Config) -> Path:
    return Path(config.run.directory) / config.run.name


def read_model(path: str) -> tuple[Mapping[str, Any] | None, list[str]]:
    """config.json of the Hugging Face folder (None if unusable), and what the folder lacks."""
    from megasd.data.tokenizer import check_tokenizer_files
    from megasd.policy.megatron.rope import rope_arguments
    from megasd.weights.hf_folder import HFFolder, read_hf_config
    from megasd.weights.tables import config_faults, table_for

    if not Path(path).is_dir():
        return None, [
            f"model.path: there is no folder {path}; download the model and give its local folder"
        ]
    faults = check_tokenizer_files(path)
    hf_config = None
    try:
        hf_config = read_hf_config(path)
        if asked := config_faults(hf_config, f"{path}/config.json"):
            return None, [*faults, *asked]
        table = table_for(hf_config)
        rope_arguments(hf_config)
    except ValueError as error:
        return None, [*faults, _about_model(error)]
    try:
        HFFolder(path).check(table)
    except ValueError as error:
        faults.append(_about_model(error))
    return hf_config, faults


def _about_model(error: ValueError) -> str:
    sentence = str(error)
    return sentence if sentence.startswith("model.path") else f"model.path: {sentence}"


def check_data(config: Config) -> list[str]:
    from megasd.data.sources import check_files
    from megasd.rewards.verifiers import check_answer_pattern, check_verifiers

    data = config.data
    faults = check_files(data.files)
    faults += check_files(config.evaluation.files, "evaluation.files")
    if data.files and data.reasoning_gym is not None:
        faults.append("data.files: data.reasoning_gym is set too; keep one of them")
    if not data.files and data.reasoning_gym is None:
        faults.append(
            "data.files: there are no data; name .jsonl or .parquet files, "
            "or a task in data.reasoning_gym"
        )
    if data.reasoning_gym is not None and data.reasoning_gym.size < 1:
        faults.append("data.reasoning_gym.size: there are no data; set it to 1 or more")
    empty = "is empty; give a file with rows"
    for key, files in (("data.files", data.files), ("evaluation.files", config.evaluation.files)):
        faults += [
            f"{key}: {name} {empty}"
            for name in files
            if Path(name).is_file() and os.path.getsize(name) == 0
        ]
    faults += [
        f"data.chat_template_options: `{name}` is not an option of a template; take it out"
        for name in sorted(NOT_TEMPLATE_OPTIONS & set(data.chat_template_options))
    ]
    faults += check_answer_pattern(data.answer_pattern)
    return faults + [f"data.verifier: {fault}" for fault in check_verifiers([data.verifier])]


def reads_siblings(config: Config) -> bool:
    """True if some role reads other rollouts of the group."""
    roles = config.algorithm.needs.teachers
    is_sibling = not {"sibling", "wrong_sibling"}.isdisjoint(config.context.sources)
    return ("teacher" in roles and is_sibling) or any(r.startswith("wrong[") for r in roles)


def needs_rewards(config: Config) -> bool:
    """True if rollouts must be judged: for the loss, or to know what a teacher may read."""
    needs = config.algorithm.needs
    reads_feedback = "teacher" in needs.teachers and "feedback" in config.context.sources
    return needs.rewards or reads_feedback or reads_siblings(config)


def needs_solutions(config: Config) -> bool:
    """True if a row without a solution could never be used."""
    needs, context = config.algorithm.needs, config.context
    is_only_source = context.sources == ["solution"] and not context.fall_back_to_answer
    return needs.solutions or ("teacher" in needs.teachers and is_only_source)


def check_context(config: Config) -> list[str]:
    if config.algorithm is None or "teacher" not in config.algorithm.needs.teachers:
        return []
    context, weights, faults = config.context, config.teacher.weights, []
    if "{context}" not in context.template:
        faults.append(
            "context.template: the teacher would read no privileged context; "
            "write {context} where it belongs"
        )
    if not context.sources and weights == "live":
        faults.append(
            "context.sources: without a source the teacher reads the plain prompt, and with "
            "teacher.weights: live it is the student itself; name a source, or other weights"
        )
    if reads_siblings(config) and config.rollout.group_size == 1 and not context.allow_self:
        faults.append(
            "rollout.group_size: with 1 rollout per prompt nobody has a sibling to read "
            "(context.sources); set it to 2 or more"
        )
    return faults


def check_teacher(config: Config) -> list[str]:
    """Whether the teacher's own model, if it has one, can stand beside the policy."""
    from megasd.data.tokenizer import vocabulary_difference

    teacher = config.teacher
    if teacher.weights != "checkpoint":
        if teacher.path is None:
            return []
        return [
            f"teacher.path: {teacher.path} is not read under teacher.weights: {teacher.weights}; "
            "leave it out, or set teacher.weights to checkpoint"
        ]
    if teacher.path is None:
        return ["teacher.path: missing; give the Hugging Face folder of the teacher"]
    other, faults = read_model(teacher.path)
    faults = [fault.replace("model.path", "teacher.path") for fault in faults]
    own, own_faults = read_model(config.model.path)
    if other is None or own is None or faults or own_faults:
        return faults
    if other["vocab_size"] != own["vocab_size"]:
        faults.append(
            f"teacher.path: {other['vocab_size']} rows of vocabulary (vocab_size), and model.path "
            f"has {own['vocab_size']}; choose a teacher of the same vocabulary"
        )
    else:
        try:
            difference = vocabulary_difference(config.model.path, teacher.path)
        except ValueError as error:
            faults.append(str(error))
        else:
            if difference:
                faults.append(
                    f"teacher.path: its vocabulary differs from that of model.path: {difference}; "
                    "choose a teacher of the same vocabulary"
                )
    cut = check_cut(config.parallel, other)
    cut += check_fp8_cut(config.model.fp8, config.parallel, other)
    faults += [fault.replace("model.path", "teacher.path") for fault in cut]
    return faults


def check_sampling(config: Config) -> list[str]:
    """Sampling whose log-probs the trainer cannot reproduce, and groups that teach nothing."""
    if config.algorithm is None or config.algorithm.needs.solutions:
        return []  # nothing is sampled
    rollout, faults = config.rollout, []
    truncated = {
        "rollout.top_p": rollout.top_p < 1,
        "rollout.top_k": rollout.top_k > 0,
        "rollout.min_p": rollout.min_p > 0,
    }
    if rollout.mismatch.level != "off":
        faults += [
            f"{key}: truncated sampling makes the engine's log-probs incomparable with the "
            f"trainer's; leave it at {neutral}, or set rollout.mismatch.level to off"
            for (key, is_on), neutral in zip(truncated.items(), (1.0, 0, 0), strict=True)
            if is_on
        ]
    low_high = rollout.mismatch.reject
    if low_high is not None and rollout.mismatch.level == "off":
        faults.append(
            "rollout.mismatch.reject: is not looked at while rollout.mismatch.level is off; "
            "leave it out, or set the level to token or sequence"
        )
    if low_high is not None and not 0 <= low_high[0] <= 1 <= low_high[1]:
        faults.append(
            f"rollout.mismatch.reject: {list(low_high)} must hold 1, where trainer and engine "
            "agree, and be 0 or more; write [low, high] like [0.5, 2.0]"
        )
    needs = config.algorithm.needs
    if (needs.rewards or needs.groups) and rollout.group_size == 1:
        faults.append(
            "rollout.group_size: with 1 rollout per prompt every advantage over its group is 0 and "
            "nothing is learnt; set it to 2 or more"
        )
    return faults


def check_rollout(
    config: Config,
    hf_config: Mapping[str, Any] | None,
    world_size: int,
    *,
    will_run_here: bool = True,
) -> list[str]:
    """Whether the engines can run; an algorithm that samples nothing may still be evaluated."""
    from megasd.policy.backend import device_type
    from megasd.rollout.checks import check_engines

    return check_engines(
        config.rollout,
        world_size=world_size,
        ranks_per_stage=max(1, world_size // max(1, config.parallel.pipeline)),
        is_cuda=device_type(config.run.device) == "cuda",
        dtype=config.model.dtype,
        hf_config=hf_config,
        max_tokens=longest_rollout(config),
        needs_vllm=will_run_here,
    )


def check_batch(config: Config, world_size: int) -> list[str]:
    prompts, minibatches = config.rollout.prompts_per_step, config.optimizer.minibatches_per_step
    faults = []
    if prompts % max(1, minibatches):
        faults.append(
            f"rollout.prompts_per_step: {prompts} prompts cannot be cut into "
            f"optimizer.minibatches_per_step = {minibatches} equal mini-batches; "
            "change one of them"
        )
    replicas, rest = divmod(world_size, ranks_per_replica(config.parallel))
    if replicas and not rest and prompts % replicas:
        faults.append(
            f"rollout.prompts_per_step: {prompts} prompts cannot be shared by {replicas} "
            f"data-parallel replicas; choose a multiple of {replicas}"
        )
    return faults


def check_schedule(config: Config) -> list[str]:
    optimizer, faults = config.optimizer, []
    steps = config.run.steps * optimizer.minibatches_per_step
    if optimizer.warmup_steps > steps:
        faults.append(
            f"optimizer.warmup_steps: {optimizer.warmup_steps} is more than the {steps} optimizer "
            "steps of the run (run.steps x optimizer.minibatches_per_step); lower it"
        )
    if optimizer.schedule != "constant" and optimizer.min_lr > optimizer.lr:
        faults.append(
            f"optimizer.min_lr: {optimizer.min_lr} is above optimizer.lr = {optimizer.lr}; lower it"
        )
    return faults


def context_length(config: Config, hf_config: Mapping[str, Any] | None) -> int | None:
    """Tokens that prompt and response may have together; None if only the model would know."""
    if config.model.max_context_tokens is not None:
        return config.model.max_context_tokens
    return None if hf_config is None else hf_config.get("max_position_embeddings")


def longest_rollout(config: Config) -> int:
    """Upper bound on the tokens of a prompt and its response: what an engine is made for."""
    return config.data.max_prompt_tokens + config.rollout.max_response_tokens


def longest_view(config: Config, hf_config: Mapping[str, Any] | None) -> int:
    """Upper bound on the tokens of one packed sequence, the teacher's included."""
    longest = longest_rollout(config)
    if config.algorithm is not None and "teacher" in config.algorithm.needs.teachers:
        # A token stands for at least one byte.
        longest += config.context.max_tokens + len(config.context.template.encode())
    context = context_length(config, hf_config)  # teacher views are cut to it
    return longest if context is None else min(longest, context)


def check_lengths(config: Config, hf_config: Mapping[str, Any] | None) -> list[str]:
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    context, faults = context_length(config, hf_config), []
    positions = None if hf_config is None else hf_config.get("max_position_embeddings")
    if context is not None and positions is not None and context > positions:
        faults.append(
            f"model.max_context_tokens: {context} is more than the {positions} positions "
            "(max_position_embeddings) of model.path; lower it"
        )
    elif context is not None and prompt + response > context:
        faults.append(
            f"rollout.max_response_tokens: {response} response tokens after "
            f"data.max_prompt_tokens = {prompt} are more than the context of {context} tokens "
            "(model.max_context_tokens, else max_position_embeddings of the model); "
            "lower one of the two"
        )
    budget, longest = config.optimizer.max_tokens_per_microbatch, longest_view(config, hf_config)
    if longest > budget:
        teachers = config.algorithm is not None and config.algorithm.needs.teachers
        extra = ", context.max_tokens and context.template" if teachers else ""
        faults.append(
            f"optimizer.max_tokens_per_microbatch: {budget} is less than the {longest} tokens that "
            f"one sequence may have (data.max_prompt_tokens, rollout.max_response_tokens{extra}); "
            f"set it to {longest} or more, or lower those"
        )
    return faults
