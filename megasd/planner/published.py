"""Steps whose time others published, planned in the layouts that they were run in.

`megasd plan --published` prints the tables of docs/plan.md. All rows have the same assumptions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megasd.algorithms import load_algorithm
from megasd.configuration.load import Config
from megasd.data.config import DataConfig
from megasd.planner.duration import Duration, duration
from megasd.planner.hardware import Assumptions, parse_gpus
from megasd.planner.memory import Scenario, memory
from megasd.planner.model import Model
from megasd.planner.presets import full_name, preset
from megasd.policy.config import ModelConfig, OptimizerConfig, ParallelConfig
from megasd.rollout.config import RolloutConfig, VLLMConfig

# NVIDIA NeMo RL: docs/about/performance-summary.md of 0.5.0 (the 30B-A3B: of 0.6.0), GRPO on
# policy, bfloat16; recipes in examples/configs/recipes/llm/performance. 2,048 responses, four
# optimizer steps, log-probs of the old and of the reference policy (reference_policy_kl_penalty).
LONGEST = 4096  # tokens of a prompt and its response, and of a micro-batch
PROMPT = 256  # tokens at most: those of the data set are short


@dataclass(frozen=True, kw_only=True)
class Step:
    """What was run, and how many seconds a step of it took."""

    model: str
    gpus: int
    tokens: int  # of a prompt and its response, mean
    parallel: ParallelConfig
    engine: int  # GPUs of an engine
    seconds: float
    recompute: bool = False
    phases: dict[str, float] | None = None

    @property
    def layout(self) -> str:
        parallel = self.parallel
        parts = [("TP", parallel.tensor), ("PP", parallel.pipeline), ("EP", parallel.expert)]
        said = " ".join(f"{name}{ways}" for name, ways in parts if ways > 1) or "TP1"
        return f"{said}{', recompute' if self.recompute else ''}; engine TP{self.engine}"

    def scenario(self) -> Scenario:
        grpo = load_algorithm("grpo").cls
        vllm = VLLMConfig(tensor=self.engine)
        config = Config(
            model=ModelConfig(
                path=full_name(self.model), recompute="full" if self.recompute else "none"
            ),
            data=DataConfig(max_prompt_tokens=PROMPT),
            algorithm_name="grpo",
            algorithm=grpo(kl_coef=0.01),
            rollout=RolloutConfig(
                engine="vllm",
                prompts_per_step=64,
                group_size=32,
                max_response_tokens=LONGEST - PROMPT,
                vllm=vllm,
            ),
            parallel=self.parallel,
            optimizer=OptimizerConfig(minibatches_per_step=4, max_tokens_per_microbatch=LONGEST),
        )
        return Scenario(
            config=config,
            model=Model.of(preset(self.model)),
            machine=parse_gpus(f"H100:{self.gpus}"),
            assumed=replace(Assumptions(), mean_length=self.tokens / LONGEST),
        )

    def plan(self) -> Duration:
        scenario = self.scenario()
        return duration(scenario, memory(scenario))


STEPS = (
    Step(
        model="Llama-3.1-8B",
        gpus=16,
        tokens=1019,
        parallel=ParallelConfig(pipeline=2),
        engine=1,
        seconds=92.8,
        recompute=True,
    ),
    Step(
        model="30B-A3B",
        gpus=32,
        tokens=3203,
        parallel=ParallelConfig(expert=8),
        engine=2,
        seconds=192,
    ),
    Step(
        model="32B",
        gpus=32,
        tokens=3251,
        parallel=ParallelConfig(tensor=4, sequence=True, pipeline=4),
        engine=4,
        seconds=376,
    ),
)
# NeMo RL 0.3's announcement says where the seconds go (H100; tokens are of a response there, and
# the size of an engine is not said).
PHASES = (
    Step(
        model="Llama-3.1-8B",
        gpus=8,
        tokens=1019,
        parallel=ParallelConfig(),
        engine=1,
        seconds=112,
        phases={"sync": 5, "rollout": 58, "score": 18, "update": 28},
    ),
    Step(
        model="32B",
        gpus=64,
        tokens=3283,
        parallel=ParallelConfig(tensor=4, sequence=True, pipeline=2),
        engine=4,
        seconds=213,
        phases={"sync": 7, "rollout": 96, "score": 40, "update": 68},
    ),
    Step(
        model="30B-A3B",
        gpus=64,
        tokens=3251,
        parallel=ParallelConfig(tensor=2, sequence=True, expert=8),
        engine=4,
        seconds=167,
        phases={"sync": 12, "rollout": 78, "score": 23, "update": 50},
    ),
)
# The fourth row of that table: 235B-A22B on 128 GPUs, TP2 CP2 EP16 PP8, engines TP16, 395 s.
MISSING = (
    "| 235B-A22B, 128, TP2 CP2 EP16 PP8; engine TP16 | 395 | | | cannot be planned: no context "
    "parallelism, PP8 does not divide 94 layers, no engine over two nodes |"
)


def as_text() -> str:
    """In Markdown; both tables have one header."""
    lines = [
        "| model, H100 GPUs, layout | published s | plan s | ratio | sync / rollout / score / "
        "update of the plan |",
        "| --- | ---: | ---: | ---: | --- |",
        *(_row(step) for step in STEPS),
        MISSING,
        *(_row(step) for step in PHASES),
    ]
    return "\n".join(lines)


def _row(step: Step) -> str:
    time = step.plan()
    said = _seconds(time.phases)
    if step.phases is not None:
        said += f"; published {_seconds(step.phases)}"
    return (
        f"| {step.model}, {step.gpus}, {step.layout} | {step.seconds:g} | {time.total:.0f} | "
        f"{time.total / step.seconds:.2f} | {said} |"
    )


def _seconds(phases: Mapping[str, float]) -> str:
    return " / ".join(f"{seconds:.0f}" for seconds in phases.values())
