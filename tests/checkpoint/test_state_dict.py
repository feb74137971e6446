"""A plain state_dict is checked for its structure only; what it lacks or has too much of fp8fx's entries is said."""

from __future__ import annotations

import pytest
import torch
from checkpoint.test_load import compiled, make, train
from torch import nn

import fp8fx


def trained(recipe: str = "delayed") -> nn.Module:
    fast = compiled(0, recipe)
    train(fast, torch.optim.SGD(fast.parameters(), 0.1))
    return fast


def said(fast: nn.Module, state: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    result = fast.load_state_dict(state, strict=False)
    return result.missing_keys, result.unexpected_keys


def test_whole_and_original_states_lack_nothing() -> None:
    for recipe in ("delayed", "hybrid"):
        for fast in (compiled(1, recipe), trained(recipe)):
            assert said(fast, trained(recipe).state_dict()) == ([], [])
            assert said(fast, compiled(2, recipe).state_dict()) == ([], [])  # of a model that never ran
            assert said(fast, make().state_dict()) == ([], [])


def test_missing_entries_are_missing_keys() -> None:
    state = trained().state_dict()
    keys = ["_fp8fx.0.input.history", "_fp8fx.2.weight.scale", "_fp8fx.stream"]
    for fast in (compiled(1), trained()):
        for key in keys:
            partial = {name: value for name, value in state.items() if name != key}
            assert said(fast, partial) == ([key], [])
    fast = compiled(1)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "_fp8fx\.stream"'):
        fast.load_state_dict(partial, strict=True)


def test_entries_of_another_model_are_unexpected_keys_and_left_out() -> None:
    """`delayed` names every record that was saved; a record it does not name, or of a layer that is not here, is not taken."""
    state = trained().state_dict()
    renamed = {key.replace("_fp8fx.2.", "_fp8fx.head.3."): value for key, value in state.items()}
    fast = compiled(1)
    missing, unexpected = said(fast, renamed)
    assert "_fp8fx.head.3.input.scale" in unexpected
    assert "_fp8fx.2.input.scale" in missing
    assert not any("head" in key for key in fp8fx.state_dict(fast))
    assert torch.equal(fp8fx.state_dict(fast)["_fp8fx.0.input.history"], state["_fp8fx.0.input.history"])


def test_inside_another_module() -> None:
    outer, source = nn.ModuleDict({"net": compiled(1)}), nn.ModuleDict({"net": trained()})
    state = source.state_dict()
    del state["net._fp8fx.0.input.scale"]
    state["net._fp8fx.9.input.scale"] = torch.tensor(1.0)
    assert said(outer, state) == (["net._fp8fx.0.input.scale"], ["net._fp8fx.9.input.scale"])


def test_fp8fx_load_state_dict_refuses_both() -> None:
    fast, state = compiled(1), fp8fx.state_dict(trained())
    state["_fp8fx.9.input.scale"] = state.pop("_fp8fx.0.input.scale")
    before = fp8fx.state_dict(fast)
    with pytest.raises(fp8fx.ModelError, match=r"lacks '_fp8fx\.0\.input\.scale' and has '_fp8fx\.9\.input\.scale'"):
        fp8fx.load_state_dict(fast, state)
    assert fp8fx.state_dict(fast).keys() == before.keys()
