"""One thread for tiny models, and other packages' warnings passed over: those of fp8fx stay errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

import fp8fx


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", fp8fx.FP8Warning)
        yield
    torch.set_num_threads(threads)
