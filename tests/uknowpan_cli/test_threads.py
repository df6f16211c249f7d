"""Work in threads."""

from concurrent.futures import ThreadPoolExecutor

import torch

from uknowpan.threads import side_by_side


def test_cores_are_shared_and_given_back() -> None:
    """Kind of fault: after a run, new threads of the caller's program had one core in PyTorch."""

    def cores(item: int = 0) -> int:
        return torch.get_num_threads()

    before = cores()
    torch.set_num_threads(3)
    assert list(side_by_side(cores, range(5), 2, 4)) == [(item, 2) for item in range(5)]
    with ThreadPoolExecutor(1) as pool:
        assert (cores(), pool.submit(cores).result()) == (3, 3)
    torch.set_num_threads(before)
