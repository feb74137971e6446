"""A plain state_dict is checked for its structure only; what it lacks or has too much of fp8fx's entries is said."""

from __future__ import annotations

import pytest
import torch
from checkpoint.small import compiled, make, train
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


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The records of layer 2 under the name of a layer that is not here, and `delayed` as it was."""
    return {key.replace("_fp8fx.2.", "_fp8fx.head.3."): value for key, value in state.items()}


def test_entries_of_another_model_are_unexpected_keys_and_left_out() -> None:
    """The state of a model with a layer more: whole, with records of a layer that is not here."""
    state = trained().state_dict()
    meaning = bytes(state["_fp8fx.delayed"].tolist()).decode().replace('"2.', '"head.3.')
    other = renamed(state) | {"_fp8fx.delayed": torch.tensor(list(meaning.encode()), dtype=torch.uint8)}
    fast = compiled(1)
    assert said(fast, other) == ([], sorted(key for key in other if "head" in key))
    assert not any("head" in key for key in fp8fx.state_dict(fast))
    assert torch.equal(fp8fx.state_dict(fast)["_fp8fx.0.input.history"], state["_fp8fx.0.input.history"])


def test_a_state_that_lacks_records_is_left_out_as_a_whole() -> None:
    """All weights and a part of the FP8 state: the rest may be in another file, and nothing is taken half."""
    state = trained().state_dict()
    for fast in (compiled(1), trained()):
        before = fp8fx.state_dict(fast)
        missing, unexpected = said(fast, renamed(state))
        assert "_fp8fx.head.3.input.scale" in unexpected  # `delayed` does not name it
        assert "_fp8fx.2.input.scale" in missing
        assert torch.equal(fast[0].weight, state["0.weight"])  # type: ignore[index]
        assert differing(before, fp8fx.state_dict(fast)) == []
        with pytest.warns(fp8fx.FP8Warning, match="only a part of the FP8 state, which is left out as a whole"):
            fast(torch.ones(2, 8))
        fast(torch.ones(2, 8))  # said once


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return sorted(a.keys() ^ b.keys()) + [key for key in a.keys() & b.keys() if not torch.equal(a[key], b[key])]


@pytest.mark.parametrize("recipe", ["delayed", "direct"])
@pytest.mark.parametrize("cut", ["weights", "one more", "half", "all but one"])
@pytest.mark.parametrize("backwards", [False, True])
def test_two_files_of_which_one_holds_all_weights(recipe: str, cut: str, backwards: bool) -> None:
    """The first file ends anywhere in or before the FP8 entries, and files are loaded in any order."""
    source = trained(recipe).state_dict()
    weights = sum("_fp8fx" not in key for key in source)
    place = {"weights": weights, "one more": weights + 1, "half": (weights + len(source)) // 2, "all but one": len(source) - 1}[cut]
    files = [dict(list(source.items())[:place]), dict(list(source.items())[place:])]
    for fast in (compiled(1, recipe), trained(recipe)):
        fast.load_state_dict(make(3).state_dict())
        for file in files[::-1] if backwards else files:
            fast.load_state_dict(file, strict=False)
        assert differing(fast.state_dict(), source) == []
        fast(torch.ones(2, 8))  # no warning: nothing is lacking
    fast.load_state_dict(fp8fx.strip(source))  # an original checkpoint after the model ran: what is kept stays
    assert fast.state_dict().keys() == source.keys()


def test_parts_of_two_checkpoints_are_not_mixed() -> None:
    """An entry that comes twice begins another checkpoint; the rest of the first does not complete it."""
    a, b = trained().state_dict(), compiled(5).state_dict()
    b |= {key: value * 2 for key, value in a.items() if key.endswith((".scale", ".history"))} | {"_fp8fx.delayed": a["_fp8fx.delayed"]}
    b |= {key: value for key, value in a.items() if key.endswith(".amax")}
    first_of_a = {key: value for key, value in a.items() if not key.startswith("_fp8fx.2.")}
    first_of_b = {key: value for key, value in b.items() if not key.startswith("_fp8fx.0.")}
    rest_of_b = {key: value for key, value in b.items() if key.startswith("_fp8fx.0.")}
    fast = compiled(1)
    for part in (first_of_a, first_of_b):
        before = fp8fx.state_dict(fast)
        fast.load_state_dict(part, strict=False)
        assert differing(before, fp8fx.state_dict(fast)) == []
    fast.load_state_dict(rest_of_b, strict=False)
    assert differing(fast.state_dict(), b) == []


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
