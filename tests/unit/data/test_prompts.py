from collections import Counter

import numpy as np
import pytest

from megasd.data.prompts import Prompts
from megasd.types import Prompt


def rows(count: int, answer: str = "2") -> list[Prompt]:
    return [
        Prompt(
            index=index,
            messages=({"role": "user", "content": "?"},),
            token_ids=np.array([index], dtype=np.int64),
            answer=answer,
        )
        for index in range(count)
    ]


def draw(stream: Prompts, count: int) -> list[int]:
    return [prompt.index for prompt in stream.next(count)]


def test_every_epoch_holds_every_row_once_in_an_order_of_its_own():
    stream = Prompts(rows(10), seed=3)
    drawn = draw(stream, 4) + draw(stream, 13) + draw(stream, 13)
    epochs = [drawn[0:10], drawn[10:20], drawn[20:30]]
    assert all(Counter(epoch) == Counter(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert stream.epoch == 3.0


def test_the_order_depends_on_the_seed_and_on_nothing_else():
    first = draw(Prompts(rows(50), seed=3), 120)
    assert draw(Prompts(rows(50), seed=3), 120) == first
    assert draw(Prompts(rows(50), seed=4), 120) != first


def test_without_shuffling_the_rows_come_in_file_order():
    assert draw(Prompts(rows(3), seed=0, shuffle=False), 7) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("position", [0, 4, 10, 17])
def test_a_resumed_stream_continues_as_if_it_had_never_stopped(position):
    stream = Prompts(rows(10), seed=3)
    stream.next(position)
    state = stream.state_dict()
    resumed = Prompts(rows(10), seed=3)
    resumed.load_state_dict(state)
    assert draw(resumed, 25) == draw(stream, 25)


@pytest.mark.parametrize("changed", [rows(9), rows(10, answer="3"), rows(10)[::-1]])
def test_resuming_on_changed_data_is_refused(changed):
    state = Prompts(rows(10), seed=3).state_dict()
    with pytest.raises(ValueError, match=r"data\.files: .*other data"):
        Prompts(changed, seed=3).load_state_dict(state)


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match=r"data\.files"):
        Prompts([], seed=0)
