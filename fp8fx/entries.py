"""Which of fp8fx's entries a checkpoint lacks, and which are not this model's: for `load_state_dict` and `fp8fx.load`."""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import Tensor

from fp8fx.scaling import DUE, FIELDS, MEANING, is_scaling, meaning_of


def unmatched(state: Mapping[str, Tensor], modules: Container[str]) -> tuple[list[str], list[str]]:
    """(missing, unknown) keys of `state`, by what it says itself: `delayed` names every record that was saved.

    modules: the names of the model's modules; a record of a site that cannot be in it is unknown. An original checkpoint has no entries,
    and lacks none; a record of this model that was not saved is not missing either: nothing had been measured for it.
    """
    missing = ["stream"] * (bool(state) and "stream" not in state)
    entries = {key: value for key, value in state.items() if is_scaling(key)}
    if not entries:
        return missing, []
    names = meaning_of(entries).get("formats", {})
    wanted = {f"{name}.{field}" for name in names for field in FIELDS} | {MEANING, DUE}
    unknown = {key for key in entries if MEANING in entries and key not in wanted}
    unknown |= {key for key in entries if key not in (MEANING, DUE) and not _possible(key.rsplit(".", 2)[0], modules)}
    return missing + sorted(wanted - entries.keys()), sorted(unknown)


def _possible(site: str, modules: Container[str]) -> bool:
    """A site is a module, or a parameter or a functional operation of one."""
    return site in modules or site.rpartition(".")[0] in modules
