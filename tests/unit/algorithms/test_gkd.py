import dataclasses

import pytest
import torch

from megasd.algorithms.gkd import GKD
from megasd.losses.config import DivergenceConfig
from tests.unit.cases import VOCABULARY, random_case

CONFIGS = [
    {"kind": "forward_kl"},
    {"kind": "reverse_kl"},
    {"kind": "jsd", "alpha": 0.5},
    {"kind": "jsd", "alpha": 0.1},
]


def full_and_top(seed: int, **config):
    """Loss and gradient by the logits: over the whole vocabulary, and on the case's K ids."""
    case = random_case(seed)
    for support in ("full", "student"):
        algorithm = GKD(divergence=DivergenceConfig(support=support, **config))
        batch = case.batch(algorithm.needs)
        student = case.student(batch)
        loss = algorithm.token_loss(student, batch, algorithm.assign_credit(batch, 0)).loss
        assert student.logits is not None
        (gradient,) = torch.autograd.grad(loss.sum(), student.logits)
        yield loss.detach(), gradient


def test_every_response_is_learnt_from_without_rewards():
    batch = random_case(0).batch(GKD().needs)
    teacher = batch.teachers["teacher"]
    teacher = dataclasses.replace(teacher, has_context=torch.ones_like(teacher.has_context))
    batch = dataclasses.replace(batch, teachers={"teacher": teacher})
    credit = GKD().assign_credit(batch, 0)
    assert torch.equal(credit.token_weights > 0, batch.response_mask)
    assert not GKD().needs.rewards


@pytest.mark.parametrize("config", CONFIGS)
def test_on_as_many_ids_as_the_vocabulary_has_it_is_the_full_divergence(config):
    seeds = [seed for seed in range(20) if len(random_case(seed).ids[0]) == VOCABULARY]
    assert len(seeds) > 3
    for seed in seeds:
        (full, full_gradient), (top, top_gradient) = full_and_top(seed, **config)
        torch.testing.assert_close(top, full, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(top_gradient, full_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS)
def test_one_bucket_for_the_rest_never_exceeds_the_full_divergence(config):
    for seed in range(12):
        (full, _), (top, _) = full_and_top(seed, **config)
        assert (top <= full * (1 + 1e-4) + 1e-4).all()


def test_the_teacher_is_another_model_that_reads_the_plain_prompt():
    assert GKD.section_defaults["teacher"] == {"weights": "checkpoint"}
    assert GKD.section_defaults["context"] == {"sources": []}
