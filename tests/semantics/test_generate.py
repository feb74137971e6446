"""Hugging Face's generate with a KV cache runs the compiled forward: its greedy tokens are those of a loop through the oracle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import Oracle, plain, sqnr
from semantics.harness import enter
from torch import Tensor, nn

import fp8fx
from fp8fx.clone import runtime_of

PROMPT = torch.tensor([[5, 9, 17, 3, 40, 8, 21], [11, 2, 33, 60, 7, 7, 50]])
NEW = 4


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2(**options: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=None, **options)
    return GPT2LMHeadModel(config)


def make(name: str) -> Any:
    """Larger weights than at initialization, so that logits are far apart and a greedy choice is no coin toss."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = {"llama": llama, "gpt2": gpt2}[name](attn_implementation="sdpa")
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.mul_(4)
    return model.eval()


def greedy(model: Any, **options: Any) -> Tensor:
    mask = torch.ones_like(PROMPT)
    tokens: Tensor = model.generate(PROMPT, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)
    return tokens


def logits_of_steps(forward: Any, sequence: Tensor, cache: Any) -> Tensor:
    """Logits [2, NEW, 64] of each step of generation along `sequence`: the prompt, then one token at a time."""
    found, start = [], 0
    for end in range(PROMPT.shape[1], PROMPT.shape[1] + NEW):
        positions = torch.arange(start, end).unsqueeze(0).expand(2, -1)
        output = forward(input_ids=sequence[:, start:end], past_key_values=cache, position_ids=positions, use_cache=True)
        found.append(output.logits[:, -1])
        start = end
    return torch.stack(found, 1)


def static_cache(model: Any) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=PROMPT.shape[1] + NEW)


def dynamic_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


CACHES = {"dynamic": dynamic_cache, "static": static_cache}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_tokens_are_the_oracles(name: str, cache: str) -> None:
    model = make(name)
    fast: Any = enter(model)
    options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    tokens = greedy(fast, **options)
    assert tokens.shape == (2, PROMPT.shape[1] + NEW)
    oracle = Oracle(plain(model, torch.float32), "hybrid", fp8fx.plan(fast), dtype=None)
    with torch.no_grad():
        rounded = logits_of_steps(oracle, tokens, CACHES[cache](model))
        ours = logits_of_steps(fast, tokens, CACHES[cache](model))
        exact = logits_of_steps(model, tokens, CACHES[cache](model))
    assert torch.equal(rounded.argmax(-1), tokens[:, PROMPT.shape[1] :])  # each token is the oracle's choice after the ones before
    assert sqnr(rounded, ours) > 70
    assert 10 < sqnr(exact, rounded) < 40
    assert len(fp8fx.plan(fast).fp8) >= 5


@pytest.mark.parametrize("name", ["llama"])
def test_the_cache_changes_only_what_is_scaled_together(name: str) -> None:
    """A tensor's scale depends on what is in it, so that a token alone is rounded otherwise than among others. With a scale per row
    it is not, and tokens with and without a cache are the same."""
    fast = enter(make(name), "rowwise")
    with_cache, without = greedy(fast), greedy(fast, use_cache=False)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("name", ["gpt2"])
def test_the_backend_gives_the_tokens_of_compile(name: str) -> None:
    """torch.compile's wrapper calls the model's own generate, which calls the plain forward: model.compile() is the way there."""
    expected = greedy(enter(make(name)))
    model = make(name)
    model.compile(backend="fp8fx", options={"recipe": "hybrid", "inner": "eager"})
    assert torch.equal(greedy(model), expected)


def test_a_copy_generates_too() -> None:
    fast = enter(make("gpt2"))
    expected = greedy(fast)
    assert torch.equal(greedy(copy.deepcopy(fast)), expected)


def test_few_graphs_serve_many_lengths() -> None:
    """Each new token does not cost a new capture."""
    fast: Any = enter(make("llama"))
    greedy(fast)
    before = len(runtime_of(fast).graphs)
    greedy(fast)
    assert len(runtime_of(fast).graphs) == before <= 6
