"""The memory of networks is limited before it is allocated, over all tensors together."""

import pytest
import torch

from pyro_vae.core.allocation import MOST_TENSORS, AllocationLimit


def test_tensors_that_are_small_each_exceed_the_limit_together():
    with AllocationLimit(3 * 2**20) as limit:
        for _ in range(3):
            torch.zeros(2**18)
        assert limit.taken == limit.most
        with pytest.raises(MemoryError, match=r"its tensors take 0\.0 GiB of memory or more"):
            torch.zeros(1)


def test_results_are_counted_and_views_and_changes_in_place_are_not():
    with AllocationLimit(2**20) as limit:
        x = torch.zeros(1000, dtype=torch.float64)
        x.view(10, 100).add_(1).T[0].exp_()
        assert (limit.taken, limit.tensors) == (8000, 1)
        x + 1
        assert (limit.taken, limit.tensors) == (16000, 2)


def test_a_tensor_beyond_any_memory_is_refused_before_it_is_allocated():
    with AllocationLimit(2**40), pytest.raises(MemoryError, match=r"4096\.0 GiB of memory or more; the limit is 1024"):
        torch.empty(2**40)


def test_the_number_of_tensors_is_limited():
    with AllocationLimit(2**40) as limit:
        limit.tensors = MOST_TENSORS
        with pytest.raises(MemoryError, match="more than 10,000 tensors"):
            torch.zeros(1)
