"""Rows that an engine writes into, pinned for a GPU: read right, and let go of before their memory is."""

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from paceline.target.engines.shared_rows import SharedRows

pytestmark = pytest.mark.gpu
NOT_REGISTERED = 713
"""cudaErrorHostMemoryNotRegistered"""


@pytest.fixture
def rows() -> Iterator[SharedRows]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        rows = SharedRows(Path(directory), "paceline-0123456789abcdef")
        yield rows
        rows.close()


def unregister(address: int) -> int:
    return int(torch.cuda.cudart().cudaHostUnregister(address))


def test_rows_are_copied_to_the_gpu_without_a_copy_in_between(rows: SharedRows):
    memory = rows.reserve((1000, 4, 256), torch.bfloat16, True)
    assert memory.label
    assert memory.states.is_pinned()
    memory.states.copy_(torch.randn(1000, 4, 256))
    received = memory.states.to("cuda:0", non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(received.cpu(), memory.states)


def test_memory_that_goes_is_let_go_of_by_the_gpu_first(rows: SharedRows):
    """Or the GPU would read what was there before from whatever gets its address next."""
    addresses = []
    for num_tokens in (1000, 2000):  # the first makes way
        memory = rows.reserve((num_tokens, 4, 256), torch.bfloat16, True)
        addresses.append(memory.states.data_ptr())
        del memory
        gc.collect()
    kept = rows.reserve((3000, 4, 256), torch.bfloat16, True)
    rows.close()
    assert kept.states.is_pinned(), "whoever has it may copy from it"
    addresses.append(kept.states.data_ptr())
    del kept
    gc.collect()
    assert [unregister(address) for address in addresses] == [NOT_REGISTERED] * 3
