"""Where a recipe was written: its plain data, and the line of every key for the error messages.

A recipe comes from a YAML file or from a dict. Either way `Source.data` holds dicts, lists and scalars only; `Source.lines`
maps a key path such as `("rules", 2, "input", "format")` to a line of the file. YAML is composed, not loaded: the node tree
has the line marks, and shows the duplicate keys that a load would drop without a word.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from fp8fx.errors import RecipeError

KeyPath = tuple[str | int, ...]

MAX_DEPTH = 40  # the grammar needs 6; a dict can contain itself
MAX_NODES = 200_000  # YAML aliases can double the tree at every level


@dataclass(frozen=True)
class Source:
    """One recipe as written. `label` names it in messages; `folder` is where a relative `extends` starts."""

    label: str
    data: dict[str, object]
    folder: Path
    lines: Mapping[KeyPath, int] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """`mine.yaml:7: rules[2].input.format`, with the line of the nearest key around `path` that has one."""
        written = self.written(path)
        path = written + _unwritten(path, written)
        text, line = key_text(path), self._line(path)
        where = self.label if line is None else f"{self.label}:{line}"
        return f"{where}: {text}" if text else where

    def entry(self, path: KeyPath) -> str:
        """`mine.yaml:7: rules[2]`, how a plan calls an entry of a list: `rules[2]` alone if it is not from a file, and `exempt` for
        every entry of a list of patterns, as a plan shows the pattern."""
        written, line = self.written(path), self._line(self.written(path))
        text = key_text(written if path[0] == "rules" else written[:1])
        return text if line is None else f"{self.label}:{line}: {text}"

    def _line(self, path: KeyPath) -> int | None:
        return next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), None)

    def error(self, path: KeyPath, problem: str) -> RecipeError:
        return RecipeError(f"{self.place(path)}: {problem}")

    def value(self, path: KeyPath) -> object:
        """What is written at `path`."""
        value: object = self.data
        for part in self.written(path):
            value = value[part]  # type: ignore[index]
        return value

    def written(self, path: KeyPath) -> KeyPath:
        """`path` without the indices of lists that the grammar made of a single value, and cut where nothing is written."""
        value: object = self.data
        kept: list[str | int] = []
        for part in path:
            if isinstance(value, list):
                if not (isinstance(part, int) and 0 <= part < len(value)):
                    break
                value = value[part]
            elif isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(part, int):
                continue
            else:
                break
            kept.append(part)
        return tuple(kept)


def _unwritten(path: KeyPath, written: KeyPath) -> KeyPath:
    """What is left of `path` after its written part."""
    rest = iter(path)
    for part in written:
        while next(rest) != part:
            pass
    return tuple(part for part in rest if isinstance(part, str))


def key_text(path: KeyPath) -> str:
    """`rules[2].input.format`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) and text else f".{part}"
    return text.removeprefix(".")


def shorten(value: object, length: int = 60) -> str:
    """A repr that fits in a message."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def from_file(path: Path, label: str | None = None) -> Source:
    """Read a YAML file."""
    label = label or os.fspath(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{label}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null character in the path
        raise RecipeError(f"{label}: cannot be read: {error}") from None
    return from_text(text, label, path.parent)


def from_text(text: str, label: str, folder: Path) -> Source:
    """Read YAML text."""
    reader = _Reader(label)
    data = reader.read(text)
    if data is None:
        raise RecipeError(f"{label}: is empty; the shortest recipe is `extends: hybrid`")
    if not isinstance(data, dict):
        raise RecipeError(f"{label}: a recipe is a mapping of keys such as `extends: hybrid`, got {shorten(data)}")
    return Source(label, data, folder, reader.lines)


def from_dict(data: Mapping[object, object], label: str = "<dict>") -> Source:
    """Copy a dict into plain dicts and lists."""
    plain = _plain(data, label, ())
    assert isinstance(plain, dict)  # a mapping stays one; for the type checker
    return Source(label, plain, Path())


def _plain(value: object, label: str, path: KeyPath) -> object:
    if len(path) > MAX_DEPTH:
        raise RecipeError(f"{label}: {key_text(path[:3])}...: nested more than {MAX_DEPTH} levels deep, or holds itself")
    if isinstance(value, Mapping):
        return {_checked_key(key, label, path): _plain(item, label, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, label, (*path, index)) for index, item in enumerate(value)]
    return value


def _checked_key(key: object, label: str, path: KeyPath, line: int | None = None) -> str | int:
    if isinstance(key, str) or (isinstance(key, int) and not isinstance(key, bool)):
        return key
    where = label if line is None else f"{label}:{line}"
    where = f"{where}: {key_text(path)}" if path else where
    hint = " (YAML reads on, off, yes and no as booleans; quote the key)" if isinstance(key, bool) else ""
    raise RecipeError(f"{where}: a key is a word or a number, got {shorten(key)}{hint}")


class _Reader:
    """YAML text to plain data, noting lines."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.lines: dict[KeyPath, int] = {}
        self._count = 0

    def read(self, text: str) -> object:
        loader = None
        try:
            loader = yaml.SafeLoader(text)
            node = loader.get_single_node()
            return None if node is None else self._build(loader, node, ())
        except RecipeError:  # is a ValueError too
            raise
        except yaml.MarkedYAMLError as error:
            raise self._not_yaml(error, text) from None
        except (yaml.YAMLError, ValueError, OverflowError, AttributeError) as error:  # the last three: scalars such as 2026-99-99
            raise RecipeError(f"{self.label}: is not YAML: {error}") from None
        except RecursionError:
            raise RecipeError(f"{self.label}: nested too deep") from None
        finally:
            if loader is not None:
                loader.dispose()

    def _not_yaml(self, error: yaml.MarkedYAMLError, text: str) -> RecipeError:
        mark = error.problem_mark or error.context_mark
        where = self.label if mark is None else f"{self.label}:{mark.line + 1}"
        lines = text.splitlines()
        line = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
        hint = "; YAML indents with spaces, and this line has a tab" if "\t" in line else ""
        begun = error.context_mark
        # PyYAML notices an open quote or bracket where the text ends: where it began is what to look at.
        context = f" ({error.context}, from line {begun.line + 1} on)" if begun and error.problem and error.context else ""
        return RecipeError(f"{where}: is not YAML: {error.problem or error.context}{context}{hint}")

    def _build(self, loader: yaml.SafeLoader, node: yaml.Node, path: KeyPath) -> object:
        self._count += 1
        if len(path) > MAX_DEPTH or self._count > MAX_NODES:
            raise RecipeError(f"{self.label}:{node.start_mark.line + 1}: nested too deep, or an alias that repeats itself")
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(loader, node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            items = []
            for index, item in enumerate(node.value):
                self.lines[(*path, index)] = item.start_mark.line + 1
                items.append(self._build(loader, item, (*path, index)))
            return items
        if isinstance(node, yaml.ScalarNode):
            return loader.construct_object(node)
        raise RecipeError(f"{self.label}:{node.start_mark.line + 1}: {node.tag} has no meaning in a recipe")

    def _mapping(self, loader: yaml.SafeLoader, node: yaml.MappingNode, path: KeyPath) -> dict[str | int, object]:
        found: dict[str | int, object] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise RecipeError(f"{self.label}:{line}: YAML merge keys (<<) are not part of the grammar; use `extends`")
            key = _checked_key(self._build(loader, key_node, path), self.label, path, line)
            here = (*path, key)
            if key in found:
                first = self.lines[here]
                raise RecipeError(f"{self.label}:{line}: {key_text(here)}: written twice, first on line {first}; keep one")
            self.lines[here] = line
            found[key] = self._build(loader, value_node, here)
        return found
