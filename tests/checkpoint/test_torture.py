"""A few of the kills and corruptions of tests/benchmarks/checkpoint_torture.py."""

from __future__ import annotations

from pathlib import Path

import torch
from benchmarks.checkpoint_torture import DAMAGES, corruptions, kills


def test_kills(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no other threads
    try:
        assert kills(4, tmp_path, seed=3) == []
    finally:
        torch.set_num_threads(threads)


def test_corruptions(tmp_path: Path) -> None:
    assert corruptions(2 * len(DAMAGES), tmp_path, seed=3) == []
