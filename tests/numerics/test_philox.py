"""Philox against the published vectors, an independent integer form, and the committed golden vectors."""

from __future__ import annotations

import json

import pytest
import torch
from numerics import golden_stochastic as golden

from fp8fx.numerics import encode, philox_bits, producer_key, round_to_format
from fp8fx.numerics.philox import _CHUNK, philox_block

pytestmark = pytest.mark.core

MASK = 0xFFFFFFFF
KNOWN = [  # Random123's kat_vectors, philox4x32 10: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert philox_block(counter, key) == words  # type: ignore[arg-type]
    tensors = philox_block(tuple(torch.tensor(word) for word in counter), tuple(torch.tensor(word) for word in key))  # type: ignore[arg-type]
    assert tuple(int(word) for word in tensors) == words
    assert tuple(golden.philox(list(counter), list(key))) == words


def test_the_eager_path_reproduces_the_known_answer() -> None:
    assert philox_bits((4,), 0, 0, 0, 0).tolist() == list(KNOWN[0][2])


def test_golden_vectors_are_what_the_definition_gives() -> None:
    assert json.loads(golden.PATH.read_text()) == json.loads(json.dumps(golden.vectors()))


@pytest.mark.parametrize("case", json.loads(golden.PATH.read_text())["cases"], ids=lambda case: f"seed{case['seed']}")
def test_golden_bits_and_codes(case: dict) -> None:
    assert producer_key(case["name"], case["role"]) == case["key"]
    words = philox_bits((8, 8), case["seed"], case["key"], case["step"], case["call"])
    assert words.flatten().tolist() == case["bits"]
    x = torch.tensor(golden.inputs()).reshape(8, 8)
    for name in ("e4m3fn", "e5m2"):
        codes = encode(round_to_format(x, name, "stochastic", random_bits=words), name)
        assert codes.view(torch.uint8).flatten().tolist() == case[name]


def test_every_word_is_its_own_function_of_the_element_index() -> None:
    """Across the seams of the eager path's pieces, and whatever the shape."""
    case = golden.CASES[1]
    key = producer_key(case["name"], case["role"])
    count = 4 * _CHUNK + 4 * _CHUNK // 2 + 3
    words = philox_bits((count,), case["seed"], key, case["step"], case["call"])
    for start in (0, 4 * _CHUNK - 32, count - golden.COUNT):
        assert words[start : start + golden.COUNT].tolist() == golden.bits(case, start)
    assert torch.equal(philox_bits((3, 5), case["seed"], key, 7, 0).flatten(), words[:15])


def test_shapes() -> None:
    assert philox_bits((), 1, 2).shape == ()
    assert philox_bits((0, 3), 1, 2).shape == (0, 3)
    bits = philox_bits((1000, 100), 1, 2)
    assert bits.dtype == torch.int64
    assert 0 <= int(bits.min()) <= int(bits.max()) <= MASK


def test_seed_step_and_call_may_be_tensors_and_trace() -> None:
    expected = philox_bits((5, 7), 2**40 + 11, 99, 3, 2)
    words = torch.tensor(2**40 + 11), torch.tensor(3), torch.tensor(2)
    assert torch.equal(philox_bits((5, 7), words[0], 99, words[1], words[2]), expected)
    compiled = torch.compile(lambda seed, step, call: philox_bits((5, 7), seed, 99, step, call), fullgraph=True, dynamic=False)
    assert torch.equal(compiled(*words), expected)


def test_every_part_of_key_and_counter_matters() -> None:
    base = philox_bits((64,), 1, 2, 3, 4)
    for other in ((2, 2, 3, 4), (1 + 2**32, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5)):
        assert int((philox_bits((64,), *other) == base).sum()) == 0


def test_producer_keys_are_stable_32_bit_numbers() -> None:
    assert producer_key("fc", "input") == producer_key("fc", "input")
    keys = {producer_key(f"layer.{i}", role) for i in range(100) for role in ("input", "weight")}
    assert len(keys) == 200
    assert all(0 <= key <= MASK for key in keys)


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1"])
@pytest.mark.parametrize("fraction", [0.001, 0.25, 0.5, 0.9])
def test_stochastic_rounding_is_unbiased(name: str, fraction: float) -> None:
    """n draws at `fraction` of a step: the share rounded up has deviation sqrt(f (1 - f) / n). Bound: 5 of them (1 in 1.7 million)."""
    n, step = 2**17, {"e4m3fn": 0.125, "e5m2": 0.25, "e2m1": 0.5}[name]
    bound = 5 * (fraction * (1 - fraction) / n) ** 0.5
    bits = philox_bits((n,), 5, producer_key(name, "input"))
    smallest = {"e4m3fn": 2.0**-9, "e5m2": 2.0**-16, "e2m1": 0.5}[name]
    for low, width in ((1.0, step), (-1.0, -step), (0.0, smallest), (-0.0, -smallest)):  # normal and subnormal, both signs
        y = round_to_format(torch.full((n,), low + fraction * width), name, "stochastic", random_bits=bits)
        share = ((y - low) / width).mean().item()
        assert abs(share - fraction) <= bound + 1e-7, (low, share)
