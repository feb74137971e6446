"""Golden vectors of the random bits and of stochastic codes: `python tests/numerics/golden_stochastic.py` writes them again.

They pin the contract for every device: key (seed, producer), counter (index, step, call), and what the bits do to a value. Plain
Python integers and the executable specification make them, no tensor code.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fp8fx import formats
from fp8fx.numerics.specification import round_value

PATH = Path(__file__).parents[1] / "golden" / "philox.json"
MASK = 0xFFFFFFFF
COUNT = 64
CASES = (
    {"seed": 0, "name": "", "role": "input", "step": 0, "call": 0},
    {"seed": 1234, "name": "layers.0.fc", "role": "grad_output", "step": 7, "call": 0},
    {"seed": (1 << 63) - 25, "name": "layers.0.fc", "role": "grad_input", "step": (1 << 32) - 1, "call": 3},
)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as the paper writes it."""
    for _ in range(10):
        product0, product1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(product1 >> 32) ^ counter[1] ^ key[0], product1 & MASK, (product0 >> 32) ^ counter[3] ^ key[1], product0 & MASK]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return counter


def producer(name: str, role: str) -> int:
    return int.from_bytes(hashlib.blake2s(f"{name}\0{role}".encode(), digest_size=4).digest(), "little")


def bits(case: dict[str, Any], start: int = 0) -> list[int]:
    """The words of elements [start, start + COUNT)."""
    seed, hashed = case["seed"], producer(case["name"], case["role"])
    words = []
    for index in range(start, start + COUNT):
        block = index >> 2
        counter = [block & MASK, block >> 32, case["step"], case["call"]]
        words.append(philox(counter, [seed & MASK, (seed >> 32) ^ hashed])[index & 3])
    return words


def inputs() -> list[float]:
    """Exact in float16: a spread of binades with long tails of bits, saturating and subnormal ones among them."""
    return [(-1.0) ** i * (1.0 + (i * 389 % 1024) / 1024) * 2.0 ** (i % 30 - 14) for i in range(COUNT)]


def codes(words: list[int], name: str) -> list[int]:
    """Stochastic, saturating codes of `inputs` under the words."""
    table = [str(value) for value in formats.get(name).codes()]
    values = zip(inputs(), words, strict=True)
    return [table.index(str(round_value(value, name, "stochastic", "saturate", word))) for value, word in values]


def vectors() -> dict[str, Any]:
    cases = [
        {
            **case,
            "key": producer(case["name"], case["role"]),
            "bits": bits(case),
            "e4m3fn": codes(bits(case), "e4m3fn"),
            "e5m2": codes(bits(case), "e5m2"),
        }
        for case in CASES
    ]
    return {"inputs": inputs(), "cases": cases}


if __name__ == "__main__":
    PATH.write_text(json.dumps(vectors()) + "\n")
