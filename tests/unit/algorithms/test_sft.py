import dataclasses

import pytest
import torch

from megasd.algorithms.base import Needs
from megasd.algorithms.sft import SFT
from tests.unit import cases
from tests.unit.cases import FakeStudent


def test_it_asks_for_solutions_and_nothing_else():
    assert SFT().needs == Needs(rewards=False, solutions=True)
    assert SFT.section_defaults == {"rollout": {"group_size": 1}}


def test_no_rollout_is_dropped():
    batch = cases.random_case(0).batch()
    assert SFT().rows_to_keep(batch.rewards, batch.group_ids, 0).all()


def test_loss_and_gradient_are_the_mean_negative_logprob_of_solution_tokens():
    algorithm = SFT()
    for seed in range(200):
        case = cases.random_case(seed)
        batch = dataclasses.replace(
            case.batch(), rollout_logprobs=None, old_logprobs=None, teachers={}
        )
        credit = algorithm.assign_credit(batch, 0)
        logprobs = torch.tensor(case.logprobs).requires_grad_()
        losses = algorithm.token_loss(FakeStudent(logprobs), batch, credit).loss
        total = (losses * cases.update_weights(algorithm.reduction, batch, credit)).sum()
        total.backward()
        used = [value for value, m in zip(case.logprobs, case.response_mask, strict=True) if m]
        share = 1 / max(len(used), 1)
        assert logprobs.grad is not None
        assert total.item() == pytest.approx(-sum(used) * share, rel=1e-5)
        assert logprobs.grad.tolist() == pytest.approx([-m * share for m in case.response_mask])
