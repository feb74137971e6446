from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    """torch.compile keeps at most 8 entries for the forward of a class, over all of a file's tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
