"""What only shows when sections, files and model are read together: all of it at once."""

import json
import shutil
from pathlib import Path

import pytest

from megasd.configuration.describe import plan, plan_ranks
from megasd.configuration.load import read_config
from megasd.configuration.validate import needs_rewards, needs_solutions, validate
from megasd.testing.tiny import QUICKSTART_STRINGS, tiny_qwen3, tiny_tokenizer
from tests.unit.workspace import QWEN3, edit_json, faults, make_model, make_workspace, write

FLOAT32_ON_A_GPU = [
    *("run.device=cuda", "model.dtype=float32"),
    "optimizer.max_tokens_per_microbatch=10000000",
]


@pytest.fixture(autouse=True)
def _inside_a_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_workspace(tmp_path))


def test_the_workspace_is_valid_on_several_layouts() -> None:
    assert faults() == []
    assert faults("parallel.tensor=2", "parallel.pipeline=2", world_size=8) == []
    assert faults("algorithm.name=sft", "rollout.group_size=1") == []
    assert faults(*FLOAT32_ON_A_GPU, "model.layers=local") == []
    short = "optimizer.max_tokens_per_microbatch=16384"
    assert faults(*FLOAT32_ON_A_GPU, short, "model.layers=transformer_engine") == []
    assert (
        faults("evaluation.temperature=0", "rollout.top_p=0.9", "rollout.mismatch.level=off") == []
    )


def test_float8_is_looked_at_with_the_rest() -> None:
    assert any("model.fp8: float8 layers run on GPUs only" in f for f in faults("model.fp8={}"))


@pytest.mark.parametrize(
    ("overrides", "world_size", "fragments"),
    [
        (["run.name=a/b"], 1, ["run.name: 'a/b' is not a plain folder name; use letters"]),
        (["run.name=.."], 1, ["run.name: '..' is not a plain folder name"]),
        (["run.name=train.jsonl", "run.directory=."], 1, ["run.name: train.jsonl is not a folder"]),
        (["run.steps=0"], 1, ["run.steps: 0 is out of range; set it to 1 or more"]),
        (["rollout.group_size=-1"], 1, ["rollout.group_size: -1 is out of range"]),
        (["rollout.temperature=0"], 1, ["rollout.temperature: 0.0", "set it above 0"]),
        (["rollout.top_p=1.5"], 1, ["rollout.top_p: 1.5", "set it to 1 or less"]),
        (["optimizer.lr=-1e-6"], 1, ["optimizer.lr: -1e-06", "set it to 0 or more"]),
        (["optimizer.lr=.nan"], 1, ["optimizer.lr: nan is out of range"]),
        (["optimizer.clip_grad_norm=.inf"], 1, ["optimizer.clip_grad_norm: inf is out of range"]),
        (["optimizer.betas=[0.9, 1.0]"], 1, ["optimizer.betas: 1.0", "below 1"]),
        (["teacher.decay=1"], 1, ["teacher.decay: 1.0", "below 1"]),
        (["parallel.tensor=0"], 1, ["parallel.tensor: 0 is out of range; set it to 1 or more"]),
        (["optimizer.minibatches_per_step=0"], 1, ["optimizer.minibatches_per_step: 0 is out"]),
        (
            ["parallel.tensor=2", "parallel.pipeline=2"],
            6,
            ["parallel.tensor: 2 x parallel.pipeline = 2", "world size 6", "multiple of 4"],
        ),
        (["parallel.sequence=true"], 1, ["parallel.sequence: needs parallel.tensor above 1"]),
        (
            ["parallel.pipeline=3"],
            3,
            ["parallel.pipeline: 3 does not divide the 4 layers (num_hidden_layers) of model.path"],
        ),
        (
            ["parallel.tensor=4"],
            4,
            ["parallel.tensor: 4 does not divide the 2 key-value heads", "a divisor of 2"],
        ),
        (
            ["optimizer.minibatches_per_step=3"],
            1,
            ["rollout.prompts_per_step: 8 prompts", "optimizer.minibatches_per_step = 3"],
        ),
        ([], 3, ["rollout.prompts_per_step: 8 prompts", "3 data-parallel", "a multiple of 3"]),
        (
            ["rollout.max_response_tokens=413"],
            1,
            [
                "rollout.max_response_tokens: 413 response tokens",
                "data.max_prompt_tokens = 100 are more than the context of 512 tokens",
                "lower one of the two",
            ],
        ),
        (["model.max_context_tokens=199"], 1, ["more than the context of 199 tokens"]),
        (["model.max_context_tokens=513"], 1, ["model.max_context_tokens: 513", "512 positions"]),
        (
            ["context.template='{context}'", "optimizer.max_tokens_per_microbatch=258"],
            1,
            ["optimizer.max_tokens_per_microbatch: 258 is less than the 259 tokens", "259 or more"],
        ),
        (
            ["optimizer.max_tokens_per_microbatch=511", "context.max_tokens=4096"],
            1,
            ["optimizer.max_tokens_per_microbatch: 511 is less than the 512 tokens"],
        ),
        (
            ["algorithm.name=grpo", "optimizer.max_tokens_per_microbatch=199"],
            1,
            ["optimizer.max_tokens_per_microbatch: 199 is less than the 200 tokens"],
        ),
        (
            ["run.device=cpu", "model.layers=transformer_engine"],
            1,
            ["model.layers: transformer_engine runs on GPUs only; set it to auto or local"],
        ),
        (
            [*FLOAT32_ON_A_GPU, "model.layers=transformer_engine"],
            1,
            [
                "model.layers: Transformer Engine keeps 236 GiB",
                "model.dtype to bfloat16",
                "to local",
            ],
        ),
        (["optimizer.warmup_steps=11"], 1, ["optimizer.warmup_steps: 11", "10 optimizer steps"]),
        (
            ["optimizer.schedule=cosine", "optimizer.min_lr=1"],
            1,
            ["optimizer.min_lr: 1.0 is above optimizer.lr = 1e-06; lower it"],
        ),
        (
            ["rollout.group_size=1"],
            1,
            ["rollout.group_size: ", "every advantage over its group is 0", "2 or more"],
        ),
        (["rollout.top_p=0.9"], 1, ["rollout.top_p: truncated", "rollout.mismatch.level to off"]),
        (["rollout.top_k=5"], 1, ["rollout.top_k: truncated", "leave it at 0"]),
        (["context.template=look"], 1, ["context.template: ", "write {context} where"]),
        (
            ["data.chat_template_options.tokenize=false"],
            1,
            ["data.chat_template_options: `tokenize` is not an option of a template; take it out"],
        ),
        (["data.files=[]"], 1, ["data.files: there are no data; name .jsonl"]),
        (["data.files=[none.jsonl]"], 1, ["data.files: none.jsonl does not exist"]),
        (["data.files=[train.txt]"], 1, ["data.files: train.txt is neither .jsonl nor .parquet"]),
        (["data.reasoning_gym.task=chain_sum"], 1, ["data.files: data.reasoning_gym is set too"]),
        (["data.verifier=maths"], 1, ["data.verifier: no verifier is called 'maths'"]),
        (["data.answer_pattern=abc"], 1, ["data.answer_pattern: 'abc' has no group"]),
        (["data.answer_pattern='(a'"], 1, ["data.answer_pattern: ", "not a regular expression"]),
        (["evaluation.files=[no.jsonl]"], 1, ["evaluation.files: no.jsonl does not exist"]),
        (
            ["teacher.weights=checkpoint"],
            1,
            ["teacher.path: missing; give the Hugging Face folder"],
        ),
        (["teacher.path=model"], 1, ["teacher.path: model is not read under", "to checkpoint"]),
        (
            ["teacher.weights=checkpoint", "teacher.path=away"],
            1,
            ["teacher.path: there is no folder away"],
        ),
        (
            ["context.sources=[]", "teacher.weights=live"],
            1,
            ["context.sources: without a source", "it is the student itself; name a source"],
        ),
        (
            ["algorithm.name=distil", "rollout.group_size=1"],
            1,
            ["rollout.group_size: with 1 rollout per prompt nobody has a sibling to read"],
        ),
        (
            [
                "algorithm.name=distil_math",
                "algorithm.baseline=group_position",
                "rollout.group_size=1",
            ],
            1,
            ["rollout.group_size: with 1 rollout per prompt every advantage over its group is 0"],
        ),
        (
            ["rollout.mismatch.level=off", "rollout.mismatch.reject=[0.5, 2.0]"],
            1,
            ["rollout.mismatch.reject: is not looked at while rollout.mismatch.level is off"],
        ),
        (
            ["rollout.mismatch.reject=[1.5, 2.0]"],
            1,
            ["rollout.mismatch.reject: [1.5, 2.0] must hold 1", "like [0.5, 2.0]"],
        ),
        (["model.path=away"], 1, ["model.path: there is no folder away; download the model"]),
    ],
)
def test_a_bad_combination_is_one_sentence_with_keys_and_remedy(
    overrides: list[str], world_size: int, fragments: list[str]
) -> None:
    (fault,) = faults(*overrides, world_size=world_size)
    for fragment in fragments:
        assert fragment in fault


def test_longest_sequence_that_fits_the_micro_batch_is_accepted() -> None:
    """100 + 100 tokens, and for the teacher 50 of context and 9 bytes of template."""
    assert faults("context.template='{context}'", "optimizer.max_tokens_per_microbatch=259") == []
    assert faults("algorithm.name=grpo", "optimizer.max_tokens_per_microbatch=200") == []


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (lambda: Path("model/config.json").unlink(), ["config.json does not exist"]),
        (lambda: write("model/config.json", "{"), ["config.json is not valid JSON"]),
        (lambda: edit_json("model/config.json", model_type="bert"), ["'bert'", "supported are"]),
        (lambda: edit_json("model/config.json", hidden_size=None), ["config.json lacks `hidden"]),
        (lambda: edit_json("model/config.json", hidden_size=17), ["has shape"]),
        (lambda: Path("model/model.safetensors").unlink(), ["neither model.safetensors nor"]),
        (lambda: write("model/model.safetensors", "cut"), ["is cut short or damaged"]),
        (
            lambda: write(
                "model/model.safetensors.index.json", json.dumps({"weight_map": {"a": "b.st"}})
            ),
            ["b.st does not exist although", "copy the folder again"],
        ),
        (lambda: Path("model/tokenizer.json").unlink(), ["holds no tokenizer"]),
        (lambda: Path("model/tokenizer_config.json").unlink(), ["no chat template"]),
        (lambda: shutil.rmtree("model"), ["there is no folder model"]),
    ],
)
def test_a_wrong_or_partial_model_folder_is_one_sentence(spoil, fragments: list[str]) -> None:
    spoil()
    (fault,) = faults()
    assert fault.startswith("config.yaml: model.path: ")
    for fragment in fragments:
        assert fragment in fault


def test_an_empty_data_file_is_named() -> None:
    write("train.jsonl", "")
    assert faults() == ["config.yaml: data.files: train.jsonl is empty; give a file with rows"]


def test_a_run_that_exists_is_not_overwritten_but_may_be_resumed() -> None:
    Path("runs/tried").mkdir(parents=True)
    assert faults() == []
    write("runs/tried/config.yaml", "")
    assert faults() == [], "it was stopped before it had done anything"
    write("runs/tried/metrics.jsonl", '{"step": 0}\n')
    (fault,) = faults()
    assert fault.startswith("config.yaml: run.name: runs/tried holds a run already; choose another")
    assert "--resume runs/tried" in fault
    assert faults(new_run=False) == []


def test_every_fault_is_found_at_once_and_names_the_file_where_its_key_stands() -> None:
    write("base.yaml", "parallel: {tensor: 4}\nteacher: {every: 0}\nmodel: {dtype: fp8}\n")
    Path("config.yaml").write_text("extends: base.yaml\n" + Path("config.yaml").read_text())
    found = faults("data.answer_pattern=x", "rollout.group_size=1", "run.seed=a", world_size=4)
    assert [fault.split(": ")[:2] for fault in found] == [
        ["base.yaml", "model.dtype"],
        ["command line", "run.seed"],
        ["base.yaml", "teacher.every"],
        ["command line", "data.answer_pattern"],
        ["command line", "rollout.group_size"],
        ["base.yaml", "parallel.tensor"],
    ]


def test_a_fault_is_not_the_cause_of_a_second_sentence() -> None:
    """No talk of 0 ranks, of a model at "", or of heads that a misspelt size would not divide."""
    text = Path("config.yaml").read_text().replace("model: {path: model}", "model: {pth: model}")
    write("other.yaml", text)
    loaded = read_config("other.yaml", ["parallel.tensor=0", "run.steps=x"])
    found = loaded.errors + validate(loaded, world_size=1, new_run=True)
    assert sorted(fault.split(": ")[1] for fault in found) == [
        "model.path",
        "model.pth",
        "parallel.tensor",
        "run.steps",
    ]


WITH_EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}


def test_a_model_with_experts_is_valid_on_several_layouts() -> None:
    make_model(Path("model"), **WITH_EXPERTS)
    assert faults("parallel.expert=8", world_size=8) == []
    tensor = ("parallel.tensor=2", "parallel.sequence=true")
    assert faults(*tensor, world_size=2) == []
    assert faults(*tensor, "parallel.expert=4", "parallel.pipeline=2", world_size=8) == []
    assert faults(*tensor, "parallel.expert=2", "parallel.expert_tensor=2", world_size=4) == []


@pytest.mark.parametrize(
    ("overrides", "world_size", "fragments"),
    [
        (["parallel.expert=0"], 1, ["parallel.expert: 0 is out of range; set it to 1 or more"]),
        (["parallel.expert_tensor=0"], 1, ["parallel.expert_tensor: 0 is out of range"]),
        (
            ["parallel.expert=3"],
            3,
            ["parallel.expert: 3 does not divide the 8 experts", "choose a divisor of 8"],
        ),
        (
            ["parallel.expert=4", "parallel.expert_tensor=2"],
            4,
            ["parallel.expert: 4 x parallel.expert_tensor = 2", "the 4 ranks of a pipeline stage"],
        ),
        (
            ["parallel.expert_tensor=8"],
            8,
            ["parallel.expert_tensor: 8 does not divide the 12 columns of an expert"],
        ),
        (
            ["parallel.tensor=2"],
            2,
            ["parallel.sequence: a model with experts needs it when parallel.tensor is above 1"],
        ),
        (
            ["parallel.expert_tensor=2", "run.device=cpu"],
            2,
            ["parallel.expert_tensor: ", "unequal numbers of tokens, which gloo on a CPU cannot"],
        ),
    ],
)
def test_a_cut_of_experts_that_cannot_be_made_is_refused(
    overrides: list[str], world_size: int, fragments: list[str]
) -> None:
    make_model(Path("model"), **WITH_EXPERTS)
    found = faults(*overrides, world_size=world_size)
    assert any(all(fragment in fault for fragment in fragments) for fault in found), found


def test_a_router_that_could_not_learn_is_refused() -> None:
    make_model(Path("model"), **WITH_EXPERTS | {"num_experts_per_tok": 1})
    (fault,) = faults()
    assert "leaves the router without a gradient; choose a model" in fault
    edit_json("model/config.json", num_experts_per_tok=None)
    (fault,) = faults()
    assert "config.json lacks `num_experts_per_tok`; add it" in fault


def test_a_dense_model_has_no_experts_to_cut() -> None:
    first, second = faults("parallel.expert=2", "parallel.expert_tensor=1", world_size=2)
    assert "parallel.expert: cuts experts, and model.path (qwen3) has none; leave it out" in first
    assert "parallel.expert_tensor: cuts experts" in second


def test_rope_that_megatron_cannot_compute_is_found_with_everything_else() -> None:
    make_model(Path("model"), rope_scaling={"rope_type": "yarn", "factor": 4.0})
    (fault,) = faults()
    assert "model.path: config.json asks for RoPE of type 'yarn'" in fault


def test_the_plan_says_which_experts_a_rank_holds_and_counts_their_parameters() -> None:
    hf_config = {**QWEN3, **WITH_EXPERTS}
    make_model(Path("model"), **WITH_EXPERTS)
    cut = ("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2")
    config = read_config("config.yaml", [*cut, "parallel.expert=4"]).config
    assert config is not None
    ranks = list(plan_ranks(config, hf_config, 16))
    # Within a stage expert parallelism counts up first, across tensor and data parallel ranks.
    assert [r.ep for r in ranks] == [0, 1, 2, 3] * 4
    assert [r.experts for r in ranks[:4]] == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    hidden, vocabulary = 16, 36 // 2 * 16  # 35 rows padded to 36
    attention = hidden * 8 * (4 + 2 + 2 + 4) // 2 + 2 * hidden + 2 * 8
    experts = 8 * hidden + 2 * 3 * hidden * 12
    stage = 2 * (attention + experts) + vocabulary
    assert [r.parameters for r in ranks] == [stage] * 8 + [stage + hidden] * 8
    text = plan(config, 16)
    assert "4 data x 2 pipeline x 2 tensor; experts over 4 expert x 1 expert-tensor" in text
    *_, header, first = text.splitlines()[:-15]
    assert " ".join(header.split()) == (
        "rank dp pp tp ep layers vocabulary heads / kv experts prompts parameters"
    )
    assert first.split() == [
        *("0", "0", "0", "0", "0", "0-1", "0-17", "2", "/", "1", "0-1", "0-1", f"{stage:,}")
    ]


def weights(hf_config: dict, *, norms: bool = True) -> int:
    """Parameters of a Qwen3 by the text book."""
    hidden, head, layers = 16, 8, hf_config["num_hidden_layers"]
    matrices = hidden * head * (4 + 2 + 2 + 4) + 3 * hidden * 24
    vectors = 2 * hidden + 2 * head
    heads = 1 if hf_config["tie_word_embeddings"] else 2
    total = layers * matrices + heads * hf_config["vocab_size"] * hidden
    return total + (layers * vectors + hidden if norms else 0)


@pytest.mark.parametrize("tie", [True, False])
def test_the_plan_follows_megatrons_order_and_counts_parameters_exactly(tie: bool) -> None:
    make_model(Path("model"), tie_word_embeddings=tie)
    hf_config = {**QWEN3, "tie_word_embeddings": tie}

    def planned(world_size: int, *overrides: str) -> list:
        config = read_config("config.yaml", overrides).config
        assert config is not None
        return list(plan_ranks(config, hf_config, world_size))

    (alone,) = planned(1)
    assert alone.parameters == weights(hf_config)
    assert (alone.layers, alone.vocabulary, alone.prompts) == (range(4), range(35), range(8))

    ranks = planned(8, "parallel.tensor=2", "parallel.pipeline=2")
    assert [(r.tp, r.dp, r.pp) for r in ranks] == [
        (tp, dp, pp) for pp in (0, 1) for dp in (0, 1) for tp in (0, 1)
    ]
    assert [r.layers for r in ranks[::4]] == [range(2), range(2, 4)]
    assert ranks[1].vocabulary == range(18, 36)  # 35 rows padded to 36
    assert [r.prompts for r in ranks] == [range(4), None, range(4, 8), None, *[None] * 4]
    one_replica = sum(r.parameters for r in ranks if r.dp == 0)
    norms = weights(hf_config) - weights(hf_config, norms=False)
    # One row of padding for the embedding; the last stage holds a padded copy of it if tied, else
    # the head's own row of padding.
    extra_rows = 1 + (36 if tie else 1)
    assert one_replica == weights(hf_config) + norms + extra_rows * 16


def test_a_teacher_of_its_own_must_speak_the_policys_vocabulary_token_by_token() -> None:
    tiny_qwen3("policy")
    tiny_qwen3("same", hidden=48, layers=4)
    tiny_qwen3("larger", vocab=200)
    tiny_qwen3("other", tokenizer=tiny_tokenizer([" ++ ", *QUICKSTART_STRINGS[1:]]))
    own = ("model.path=policy", "teacher.weights=checkpoint")
    assert faults(*own, "teacher.path=same") == []
    (fault,) = faults(*own, "teacher.path=larger")
    assert "teacher.path: 200 rows of vocabulary (vocab_size), and model.path has" in fault
    (fault,) = faults(*own, "teacher.path=other")
    assert "teacher.path: its vocabulary differs from that of model.path: token " in fault
    assert "' ++ ' in the other; choose a teacher of the same vocabulary" in fault
    assert faults(*own, "teacher.path=same", "parallel.pipeline=2", world_size=2) == []
    float8 = faults(*own, "teacher.path=same", "model.fp8.first_last_bf16=2")
    assert any("2 layers at either end of the 4 of teacher.path leave none in" in f for f in float8)
    (fault,) = faults(*own, "teacher.path=same", "parallel.pipeline=4", world_size=4)
    assert "parallel.pipeline: 4 does not divide the 2 layers" in fault


@pytest.mark.parametrize(
    ("overrides", "rewards", "solutions"),
    [
        ([], True, False),
        (["algorithm.name=opsd"], False, True),
        (["algorithm.name=opsd", "context.fall_back_to_answer=true"], False, False),
        (["algorithm.name=opsd", "context.sources=[solution, answer]"], False, False),
        (["algorithm.name=sdpo"], True, False),
        (["algorithm.name=distil_code"], True, False),
        (["algorithm.name=sft", "rollout.group_size=1"], False, True),
    ],
)
def test_rewards_and_solutions_are_asked_for_where_loss_or_teacher_needs_them(
    overrides: list[str], rewards: bool, solutions: bool
) -> None:
    config = read_config("config.yaml", overrides).config
    assert config is not None
    assert (needs_rewards(config), needs_solutions(config)) == (rewards, solutions)
