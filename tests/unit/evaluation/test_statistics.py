import math
from itertools import combinations, product

import numpy as np
import pytest

from megasd.evaluation.statistics import average_at_k, bootstrap, pass_at_k


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_draws_of_k_that_hold_a_right_response(samples: int) -> None:
    for right, k in product(range(samples + 1), range(1, samples + 1)):
        responses = [True] * right + [False] * (samples - right)
        draws = [any(draw) for draw in combinations(responses, k)]
        expected = sum(draws) / len(draws)
        assert pass_at_k([right], [samples], k, seed=0).mean == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_stays_exact_where_binomials_overflow_a_float() -> None:
    expected = 1 - math.comb(9_000, 4_000) / math.comb(10_000, 4_000)
    assert pass_at_k([1_000], [10_000], 4_000, seed=0).mean == pytest.approx(expected)
    rare = 1 - (9_999 / 10_000) * (9_998 / 9_999)  # one right response, two draws
    assert pass_at_k([1], [10_000], 2, seed=0).mean == pytest.approx(rare)


def test_every_prompt_weighs_the_same_however_many_of_its_responses_were_judged() -> None:
    assert average_at_k([1, 0, 4], [1, 4, 8], seed=0).mean == pytest.approx((1 + 0 + 0.5) / 3)


def test_prompts_without_enough_judged_responses_are_left_out() -> None:
    assert average_at_k([3, 0], [4, 0], seed=0).mean == 0.75
    assert pass_at_k([1, 1], [2, 1], 2, seed=0).mean == 1.0
    assert all(math.isnan(value) for value in average_at_k([0], [0], seed=0))


def test_the_interval_is_the_exact_bootstrap_quantile_of_two_prompts() -> None:
    # Resampling {0, 1} twice: mean 0 and 1 with chance 1/4 each, so 95% covers both ends;
    # of {0} * 199 + {1} the chance of no 1 is (199/200)^200 = 0.37, of four or more 0.02.
    assert bootstrap([0.0, 1.0], seed=3)[1:] == (0.0, 1.0)
    assert bootstrap([0.0] * 199 + [1.0], seed=3)[1:] == pytest.approx((0.0, 3 / 200))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    truth, prompts, trials = 0.6, 60, 200
    covered = 0
    for trial in range(trials):
        values = generator.beta(3, 2, size=prompts)  # mean 3 / 5
        _, low, high = bootstrap(values, seed=trial, resamples=400)
        covered += low <= truth <= high
    assert 0.90 <= covered / trials <= 0.99


def test_the_seed_alone_decides_the_interval() -> None:
    successes, samples = list(range(9)) * 3, [8] * 27
    assert average_at_k(successes, samples, seed=1) == average_at_k(successes, samples, seed=1)
    assert average_at_k(successes, samples, seed=1) != average_at_k(successes, samples, seed=2)
