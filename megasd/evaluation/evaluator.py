"""When held-out evaluation is due, and on what."""

from collections.abc import Sequence
from pathlib import Path

from megasd.evaluation.config import EvaluationConfig
from megasd.evaluation.evaluate import evaluate
from megasd.evaluation.records import write_counts
from megasd.rewards.scorer import Scorer
from megasd.rollout.config import RolloutConfig
from megasd.rollout.fleet import Fleet
from megasd.rollout.spread import Spread
from megasd.types import Prompt


class Evaluator:
    """`evaluate()` is called by all ranks once the engines hold the weights to judge."""

    def __init__(
        self,
        config: EvaluationConfig,
        prompts: Sequence[Prompt],
        *,
        engines: Fleet,
        scorer: Scorer | None,
        spread: Spread,
        seed: int,
        rollout: RolloutConfig,
        success_threshold: float,
        run_folder: Path | None,
    ) -> None:
        self.config = config
        self.prompts = prompts
        self._engines = engines
        self._scorer = scorer
        self._spread = spread
        self._seed = seed
        self._rollout = rollout
        self._success_threshold = success_threshold
        self._run_folder = run_folder  # None: another rank writes

    @property
    def has_prompts(self) -> bool:
        return bool(self.prompts)

    def is_due(self, step: int) -> bool:
        """Before step `step`: the first, then every `evaluation.every`."""
        every = self.config.every
        return self.has_prompts and (step == 0 or (every > 0 and step % every == 0))

    def evaluate(self, step: int) -> dict[str, float]:
        """The figures of the weights before step `step`."""
        evaluation = evaluate(
            self._engines,
            self._scorer,
            self.prompts,
            self.config,
            seed=self._seed,
            rollout=self._rollout,
            success_threshold=self._success_threshold,
            spread=self._spread,
        )
        if self._run_folder is not None:
            write_counts(self._run_folder, step, evaluation.counts)
        return evaluation.metrics
