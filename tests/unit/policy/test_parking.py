"""Memory that is lent out comes back as it was, under every view of it."""

import torch

from megasd.policy.parking import Parking


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
