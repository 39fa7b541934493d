"""What tests of the training share."""

from collections.abc import Iterator

import pytest
import torch.distributed


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """This process is all the ranks there are, and may call collectives."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
