"""Modes as presets, and how one set of keys merges onto another.

    hybrid    forward E4M3 with a scale per tensor; gradients E5M2 with a scale per tensor
    direct    every tensor E5M2 without a scale; gradients rounded stochastically, for use under a loss scaler
    exempt    high precision

A mode resets all roles of a layer; keys beside it, or written later, change single roles.
"""

from __future__ import annotations

from typing import Any

from fp8fx.recipe.grammar import Accumulate, Gemms, Layer, Role
from fp8fx.spec import ROLES

FORWARD, GRADIENT = ROLES[:3], ROLES[3:]

_DIRECT = Role(format="e5m2", scaling="none", granularity="tensor", rounding="nearest_even", overflow="saturate")
_DIRECT_GRADIENT = Role(format="e5m2", scaling="none", granularity="tensor", rounding="stochastic", overflow="nonfinite")
_HYBRID = Role(format="e4m3fn", scaling="current", granularity="tensor", rounding="nearest_even", overflow="saturate")
# nonfinite: a true inf must stay visible to the user's own loss scaler; a gradient scaled by its amax does not overflow otherwise
_HYBRID_GRADIENT = Role(format="e5m2", scaling="current", granularity="tensor", rounding="nearest_even", overflow="nonfinite")

PRESETS: dict[str, dict[str, Role | None]] = {
    "direct": {**dict.fromkeys(FORWARD, _DIRECT), **dict.fromkeys(GRADIENT, _DIRECT_GRADIENT)},
    "hybrid": {
        "input": _HYBRID,
        "weight": _HYBRID,
        "output": None,
        "grad_output": _HYBRID_GRADIENT,
        "grad_input": None,
        "grad_weight": None,
    },
    "exempt": dict.fromkeys(ROLES),
}

# What a role that is none in the preset starts from when a rule writes some of its keys.
_START = {
    "direct": (_DIRECT, _DIRECT_GRADIENT),
    "hybrid": (_HYBRID, _HYBRID_GRADIENT),
    "exempt": (_HYBRID, _HYBRID_GRADIENT),
}


# Writing one of these takes back what only its former value read, unless that is written beside it.
_RESETS = {"scaling": ("max_value", "statistic", "percentile", "clip"), "statistic": ("percentile",)}


def preset(mode: str) -> Layer:
    """The layer that a mode alone makes."""
    return merge(Layer(), Layer(mode=mode))


def merge(layer: Layer, keys: Layer) -> Layer:
    """`layer` with the keys written in `keys` (a rule, or the defaults of an extending recipe).

    In this order: `mode` resets the roles, `rounding` and `overflow` go to all roles they concern, roles, everything else.
    """
    written = keys.model_fields_set
    new: dict[str, Any] = dict(layer)
    if "mode" in written:
        new |= {**PRESETS[keys.mode], "mode": keys.mode, "rounding": None, "overflow": None}
    for key, roles in (("rounding", ROLES), ("overflow", FORWARD)):
        if key in written:
            value = new[key] = getattr(keys, key)
            new |= {name: new[name].model_copy(update={key: value}) for name in roles if new[name] is not None}
    for name in ROLES:
        if name in written:
            new[name] = _merge_role(name, new, getattr(keys, name))
    for name, model in (("gemms", Gemms), ("accumulate", Accumulate)):
        if name in written:
            new[name] = model(**dict(new[name]) | getattr(keys, name).model_dump(exclude_unset=True))
    plain = written & Layer.model_fields.keys() - {*ROLES, "mode", "rounding", "overflow", "gemms", "accumulate"}
    new |= {name: getattr(keys, name) for name in plain}
    return Layer.model_construct(**{name: new[name] for name in Layer.model_fields})


def _merge_role(name: str, layer: dict[str, Any], keys: Role | None) -> Role | None:
    """Keys of a role go onto the role as it is; if it is none, onto the mode's preset, with the layer's rounding and overflow."""
    if keys is None:
        return None
    current: Role | None = layer[name]
    if current is None:
        current = PRESETS[layer["mode"]][name] or _START[layer["mode"]][name in GRADIENT]
        if layer["rounding"] is not None:
            current = current.model_copy(update={"rounding": layer["rounding"]})
        if layer["overflow"] is not None and name in FORWARD:
            current = current.model_copy(update={"overflow": layer["overflow"]})
    written = keys.model_fields_set
    dropped = {key for writer, gone in _RESETS.items() if writer in written for key in gone} - written
    update = {key: Role.model_fields[key].default for key in dropped}
    return current.model_copy(update=update | {key: getattr(keys, key) for key in written})
