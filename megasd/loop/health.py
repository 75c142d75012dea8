"""What a run that goes on may be wasting its time with, in sentences: after a few such steps, and
at the end. Each is a metric too: 1 in a step that shows it, 0 in one that does not.
"""

import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PATIENCE = 3  # steps in a row, before it is said
MOSTLY = 0.5  # share of the rollouts whose verifier failed
NEARLY_ALL = 0.95  # share of the responses that were cut
SAME_LOGPROB = 1e-6  # nats
FP8_GAP = 0.1  # nats, a mean: half of the usual clip range of importance ratios

Values = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """Something that a healthy run does not show for long."""

    name: str  # of the metric, behind "health/"
    needs: str  # the metric without which a step says nothing of it
    shows: Callable[[Values], bool]
    what: str  # behind "for 3 steps"
    cause: Callable[[Values], str]  # and what to look at


def _why_no_gradient(values: Values) -> str:
    if values.get("reward/equal_groups") == 1:
        return _why_equal(values)
    if values.get("teacher/has_context") == 0:
        return (
            "no rollout had a privileged context: context.sources name something that the rows do "
            "not have, or that needs a right response where there is none"
        )
    return "the method gave no token a weight: see credit/... in the metrics, algorithm.*, reward.*"


def _why_equal(values: Values) -> str:
    return (
        f"reward/mean is {values['reward/mean']:.3g}: the prompts are all too hard or all "
        "mastered, or data.verifier says the same of everything; look at the responses, take "
        "other prompts, or a larger rollout.group_size"
    )


SIGNS = (
    Sign(
        name="no_gradient",
        needs="update/tokens_in_update",
        shows=lambda values: values.get("update/grad_norm", 0.0) == 0,
        what="nothing was learned, the gradient was 0",
        cause=_why_no_gradient,
    ),
    Sign(
        name="equal_rewards",
        needs="reward/equal_groups",
        shows=lambda values: values["reward/equal_groups"] == 1,
        what="all responses to a prompt had the same reward, for every prompt",
        cause=_why_equal,
    ),
    Sign(
        name="verifier_errors",
        needs="reward/errors",
        shows=lambda values: values["reward/errors"] > MOSTLY * values["rollout/sampled"],
        what="the verifier failed on most responses, which then teach nothing",
        cause=lambda values: (
            f"{values['reward/errors']:.0f} of {values['rollout/sampled']:.0f} in this step: mend "
            "data.verifier, or raise reward.timeout_seconds"
        ),
    ),
    Sign(
        name="responses_cut",
        needs="rollout/truncated",
        shows=lambda values: values["rollout/truncated"] >= NEARLY_ALL,
        what="nearly all responses were cut before their end",
        cause=lambda _: (
            "rollout.max_response_tokens is too small, or the model never ends a response: look at "
            "the chat template and the end-of-sequence ids of model.path"
        ),
    ),
    Sign(
        name="fp8_differs",
        needs="fp8/abs_mean",
        shows=lambda values: not values["fp8/abs_mean"] <= FP8_GAP,  # nor is it a number
        what="layers in float8 gave the student other log-probs than in bfloat16",
        cause=lambda values: (
            f"by {values['fp8/abs_mean']:.3g} in the mean, more than {FP8_GAP}: keep more layers "
            "in bfloat16 (model.fp8.first_last_bf16), take model.fp8.recipe: blockwise, or set "
            "model.fp8 to null"
        ),
    ),
    *(  # of whichever tokens it was measured on
        Sign(
            name="teacher_agrees",
            needs=gap,
            shows=lambda values, gap=gap: values[gap] < SAME_LOGPROB,
            what="the teacher gave every token the student's own log-prob",
            cause=lambda _: (
                "its context is probably not what it should be; look at context.sources and "
                "context.template, and whether data.max_prompt_tokens leaves room for the context"
            ),
        )
        for gap in ("teacher/gap_max", "update/teacher/gap_max")
    ),
)


class Health:
    """`watch` after every step, on every rank; the first one speaks, on stderr."""

    def __init__(self, *, speaks: bool) -> None:
        self._speaks = speaks
        self._in_a_row = dict.fromkeys((sign.name for sign in SIGNS), 0)
        self._said: dict[str, str] = {}  # by name: the last sentence
        self._steps = 0
        self._count = dict.fromkeys((sign.name for sign in SIGNS), 0)

    def watch(self, step: int, values: Values) -> dict[str, float]:
        """What to log of the step. Says each sign once for every time that it comes and stays."""
        self._steps += 1
        found = {}
        for sign in SIGNS:
            if sign.needs not in values:
                continue
            shows = sign.shows(values)
            found[f"health/{sign.name}"] = float(shows)
            self._count[sign.name] += shows
            self._in_a_row[sign.name] = self._in_a_row[sign.name] + 1 if shows else 0
            if self._in_a_row[sign.name] == PATIENCE:
                cause = sign.cause(values)
                self._said[sign.name] = f"{sign.what}; {cause}"
                self._say(f"step {step}: for {PATIENCE} steps {sign.what}. {cause}")
        return found

    def sum_up(self) -> None:
        """At the end: what was said, which scrolled away long ago."""
        for name, sentence in self._said.items():
            self._say(f"in {self._count[name]} of {self._steps} steps {sentence}")

    def _say(self, sentence: str) -> None:
        if self._speaks:
            with contextlib.suppress(OSError):  # nobody reads it any more
                print(f"megasd: warning: {sentence}", file=sys.stderr)
