"""Does a pattern match a site?

A bare pattern is a glob whose `*` crosses dots, and the name of a container selects its subtree: `layer1` matches
`layer1.0.conv1`. `re:` is a full match of the whole name, without subtrees. `type` is the name of any class in the MRO of the
site's module, or of a module around it when the modules of the model are known.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fp8fx.errors import nearest
from fp8fx.recipe.grammar import Match
from fp8fx.recipe.values import OPS

Modules = Mapping[str, tuple[str, ...]]  # module name -> class names of its MRO; the root is ''


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a recipe may look at.

    name: 'layer1.0.conv1', or 'blocks.0.attn.matmul_1' for a functional op. op: its kind. types: class names of the innermost
    module's MRO. numel: elements of the weight, 0 without one. aliases: its names where the model holds its module more than once.
    """

    name: str
    op: str
    types: tuple[str, ...] = ()
    numel: int = 0
    has_weight: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


@functools.lru_cache(maxsize=4096)
def name_regex(pattern: str) -> re.Pattern[str]:
    """A pattern as a regular expression for `fullmatch`."""
    if pattern.startswith("re:"):
        return re.compile(pattern[3:])
    return re.compile(rf"(?:{_glob(pattern)})(?:\..*)?", re.DOTALL)


def _glob(pattern: str) -> str:
    return fnmatch.translate(pattern).removesuffix(r"\Z").removesuffix(r"\z")


@functools.lru_cache(maxsize=4096)
def type_regex(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern[3:] if pattern.startswith("re:") else _glob(pattern), re.DOTALL)


def name_matches(pattern: str, name: str) -> bool:
    return name_regex(pattern).fullmatch(name) is not None


def type_matches(pattern: str, types: tuple[str, ...]) -> bool:
    regex = type_regex(pattern)
    return any(regex.fullmatch(name) for name in types)


def matches(match: Match, site: Site, types: tuple[str, ...]) -> bool:
    """All keys hold. `types` are the site's own classes and those of the modules around it."""
    return (
        (not match.op or site.op in match.op)
        and (match.min_numel is None or (site.has_weight and site.numel >= match.min_numel))
        and (match.max_numel is None or (site.has_weight and site.numel <= match.max_numel))
        and (not match.name or any(name_matches(pattern, name) for pattern in match.name for name in site.names))
        and (not match.type or any(type_matches(pattern, types) for pattern in match.type))
    )


def around(name: str) -> Iterator[str]:
    """The names of the modules around `name`, the root '' included, and `name` itself."""
    yield ""
    parts = name.split(".") if name else []
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])


def classes(name: str, modules: Modules, own: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Class names of the module called `name` and of those around it."""
    return (*own, *(type_ for module in around(name) for type_ in modules.get(module, ())))


_FUNCTIONAL = re.compile(rf"(?:{'|'.join(OPS)}|scaled_dot_product_attention)(?:_\d+)?")


def may_be_functional(pattern: str) -> bool:
    """Could it match a functional site such as `attn.matmul_1`, whose name is known only after capture?"""
    last = re.split(r"\\?\.", pattern.removeprefix("re:"))[-1]
    return any(_FUNCTIONAL.fullmatch(word) or _globs_an_op(word) for word in (last, last.lstrip("*")))


def _globs_an_op(word: str) -> bool:
    """`matmul*`, `matmul_?`, `(matmul|bmm)_\\d+`: an op kind is spelled out and wildcards follow or surround it."""
    return bool(re.search(r"[*?\[(|+\\]", word)) and any(re.search(rf"(?<![a-z0-9]){op}(?![a-z0-9])", word) for op in OPS)


def missing_name(pattern: str, modules: Modules) -> str:
    """`no module matches 'conv11'. Did you mean 'conv1'?`, or what modules there are."""
    bare = pattern.removeprefix("re:").replace("\\", "").strip("*.")
    close = nearest(bare, modules) or _nearest_ending(bare, modules) or _some_names(modules)
    return f"no module matches {pattern!r}.{close}"


def _some_names(modules: Modules, most: int = 8) -> str:
    """For a name unlike any: the innermost modules, at most so many of them."""
    inside = {name.rpartition(".")[0] for name in modules}
    names = [repr(name) for name in modules if name and name not in inside]
    return f" The modules are {', '.join(names[:most])}{' and more' if len(names) > most else ''}" if names else ""


def _nearest_ending(bare: str, modules: Modules) -> str:
    """For `*.dwn_proj`: the module whose last part is nearest."""
    endings = {name.rsplit(".", 1)[-1] for name in modules}
    return nearest(bare.rsplit(".", 1)[-1], sorted(endings))


def missing_type(pattern: str, modules: Modules) -> str:
    known = sorted({type_ for types in modules.values() for type_ in types})
    return f"no module has the type {pattern!r}.{nearest(pattern, known)}"


def describe(match: Match) -> str:
    """`'*.fc'`, or `{type: Embedding}`."""
    if match.model_fields_set <= {"name"} and len(match.name) == 1:
        return repr(match.name[0])
    parts = []
    for key in ("name", "type", "op", "min_numel", "max_numel"):
        value = getattr(match, key)
        if value not in ((), None):
            parts.append(f"{key}: {value if isinstance(value, int) else value[0] if len(value) == 1 else list(value)}")
    return f"{{{', '.join(parts)}}}"
