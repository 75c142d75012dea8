"""Memory that is lent out comes back as it was, under every view of it."""

from types import SimpleNamespace
from typing import Any

import torch

from megasd.policy.parking import Parking, optimizer_state


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.flatten().view(torch.uint8).tolist()


def test_what_is_kept_comes_back_to_the_bit_and_what_is_dropped_as_zeros() -> None:
    """Blocks of 10 bytes: tensors begin and end anywhere in them."""
    draw = torch.Generator().manual_seed(1)
    kept = [torch.randn(n, generator=draw).to(t) for n, t in ((7, torch.float32), (3, torch.half))]
    kept.append(torch.tensor(float("nan")))
    whole, dropped = torch.arange(5.0), torch.ones(4)
    first, last = whole[:2], whole[3:]
    before = [bits(one) for one in kept]
    parking = Parking(pinned=False, block_bytes=10)
    for _ in range(2):
        freed = parking.park([*kept, first, last], drop=[dropped, dropped[1:], whole])
        assert freed == 7 * 4 + 3 * 2 + 4 + 5 * 4 + 4 * 4, "each storage once, and whole"
        assert parking.is_full
        for one in (*kept, whole, dropped):
            assert one.untyped_storage().nbytes() == 0
        parking.restore()
        assert not parking.is_full
        assert [bits(one) for one in kept] == before
        assert whole.tolist() == [0, 1, 2, 3, 4], "kept, where one asks to keep and one to drop"
        assert dropped.tolist() == [0] * 4
        first[0], dropped[0] = 0.0, 1.0
        assert first.data_ptr() == whole.data_ptr(), "a view is still one"


def test_host_memory_is_asked_for_once() -> None:
    parking, tensor = Parking(pinned=False, block_bytes=8), torch.ones(9)
    blocks = []
    for _ in range(3):
        parking.park([tensor])
        blocks.append([block.data_ptr() for block in parking._blocks])
        parking.restore()
    assert blocks == [blocks[0]] * 3
    assert len(blocks[0]) == 5


def test_the_optimizers_state_is_masters_and_moments_and_never_the_weights() -> None:
    """In float32 its masters are views of the weights, which are sent and read meanwhile."""
    weights = torch.nn.Parameter(torch.ones(6))
    of_weights = torch.nn.Parameter(weights.detach()[2:5])
    master = torch.nn.Parameter(torch.ones(3))
    adams = [torch.optim.AdamW([one]) for one in (of_weights, master)]
    for adam, parameter in zip(adams, (of_weights, master), strict=True):
        parameter.grad = torch.ones(3)
        adam.step()
    parts = [*(SimpleNamespace(optimizer=adam) for adam in adams), SimpleNamespace(optimizer=None)]
    state: Any = SimpleNamespace(
        gpt=SimpleNamespace(parameters=lambda: [weights]),
        optimizer=SimpleNamespace(chained_optimizers=parts),
        device=torch.device("cpu"),
    )
    found = {tensor.data_ptr() for tensor in optimizer_state(state)}
    moments = {value for adam in adams for of in adam.state.values() for value in of.values()}
    assert found == {master.data_ptr(), *(value.data_ptr() for value in moments)}
