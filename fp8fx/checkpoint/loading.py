"""`fp8fx.load`: verify the file, check every part against what it is to be loaded into, and only then change anything.

What is left after that is what a user's own code may do (hooks, an optimizer of theirs), or an interrupt: then everything is put back.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any, overload

import torch

from fp8fx.checkpoint import apply
from fp8fx.checkpoint.check import check_gradients, check_model, check_optimizers, check_stateful
from fp8fx.checkpoint.migrate import Difference, FP8Plan, plan_part
from fp8fx.checkpoint.parts import LOADS, Model, find, listed, model_and_path
from fp8fx.checkpoint.read import Contents, read
from fp8fx.errors import CheckpointError, FP8Error

LOG = logging.getLogger("fp8fx")


@dataclass
class Restored:
    """What `fp8fx.load` did besides putting things in place.

    extra: what was given to save as `extra`. migrated: one line per change that was migrated. unused: parts of the file that were not
    asked for. recipes: recipe names, by the prefix of the compiled part. fp8fx, torch: the versions that wrote the file.
    """

    path: str
    extra: Any
    migrated: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    recipes: dict[str, str] = field(default_factory=dict)
    fp8fx: str = ""
    torch: str = ""

    def __str__(self) -> str:
        lines = [f"{self.path} (fp8fx {self.fp8fx}, torch {self.torch})"]
        lines += [f"  migrated: {line}" for line in self.migrated]
        return "\n".join(lines + [f"  not loaded: {name}" for name in self.unused])


@overload
def load(
    fast: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    optimizer: Any = None,
    scaler: Any = None,
    scheduler: Any = None,
    migrate: bool = False,
) -> Restored: ...
@overload
def load(
    path: str | os.PathLike[str],
    fast: torch.nn.Module,
    *,
    optimizer: Any = None,
    scaler: Any = None,
    scheduler: Any = None,
    migrate: bool = False,
) -> Restored: ...
def load(
    *fast_and_path: Any,
    optimizer: Any = None,
    scaler: Any = None,
    scheduler: Any = None,
    migrate: bool = False,
    **named: Any,
) -> Restored:
    """load(fast, path, ...): take what `fp8fx.save` wrote, all of it or nothing: the file is verified and every part is checked before
    anything is changed.

    fast: a compiled model of the same structure; it need not have been called before (what torch.compile(backend="fp8fx") returned must).
    path: of the file. The two may stand in either order, and be named fast= and path=.
    optimizer, scheduler, scaler: as given to save; the optimizer's parameters are matched by name. A part of the file that is not asked for
    is left out, and named in the result. Gradients become those of the file, or None.
    migrate: allow the recipe, its delayed scaling, the model's dtype or the loss scaler to be another than in the file, by the rules in
    docs/checkpoints.md. The result lists what was done.

    Nothing in the file is unpickled. Raises CheckpointError (the file is damaged, foreign, newer, or does not fit) and ModelError (not a
    compiled model); both leave model, FP8 state, gradients, optimizer, scheduler and scaler as they were.
    """
    fast, path = model_and_path(LOADS, fast_and_path, named)
    model = find(fast, LOADS)
    with torch.inference_mode(False), torch.no_grad():
        contents = read(path)
        try:
            actions, differences = _checked(contents, model, optimizer, scaler, scheduler)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            reason = str(error) if isinstance(error, FP8Error) else f"its parts are not of the form that fp8fx.save gives them: {error!r}"
            raise CheckpointError(f"{contents.path!r} cannot be loaded: {reason}") from error
        if differences and not migrate:
            raise CheckpointError(refusal(repr(contents.path), differences, "fp8fx.load(..., migrate=True)"))
        apply.run(actions, contents.path)
    return _report(contents, differences, optimizer, scaler, scheduler)


def _checked(contents: Contents, model: Model, optimizer: Any, scaler: Any, scheduler: Any) -> tuple[list[apply.Action], list[Difference]]:
    parts = contents.parts
    entries, differences = check_model(parts["model"], model)
    plans: dict[str, FP8Plan] = {}
    recipes, states = contents.about["recipes"], parts["fp8"]
    for prefix, runtime in model.runtimes.items():
        plans[prefix], found = plan_part(prefix, runtime, recipes.get(prefix), states.get(prefix, {}), model.modules(prefix))
        differences += found
    for prefix in states.keys() - model.runtimes.keys():
        what = f"{prefix.removesuffix('.') or 'the whole model'!r} was compiled when this was saved, and is not here"
        differences.append(Difference(what, "its FP8 state is dropped"))
    gradients = check_gradients(parts["gradients"] or {}, model)
    actions: list[apply.Action] = [apply.ModelAction(model, entries, plans, gradients)]
    for kind, given in (("optimizer", optimizer), ("scaler", scaler), ("scheduler", scheduler)):
        if given is None:
            continue
        if parts[kind] is None:
            raise CheckpointError(f"{contents.path!r} holds no {kind}: it was saved without one. Leave out {kind}= to load the rest")
        there, objects = parts[kind], listed(given, kind, LOADS)
        if len(there) != len(objects):
            raise CheckpointError(f"{contents.path!r} holds {len(there)} {kind}(s), and {len(objects)} were passed")
        if kind == "optimizer":
            actions += check_optimizers(there, objects, model)
        else:
            made, found = check_stateful(there, objects, kind)
            actions += made
            differences += found
    return actions, differences


def refusal(path: str, differences: list[Difference], call: str, outcome: str = "nothing was loaded") -> str:
    lines = "\n".join(f"  - {difference.what}\n    with migrate=True: {difference.rule}" for difference in differences)
    return f"{path} was saved under another setup, and {outcome}:\n{lines}\nCompile the model as it was then, or pass {call}"


def _report(contents: Contents, differences: list[Difference], optimizer: Any, scaler: Any, scheduler: Any) -> Restored:
    given = {"optimizer": optimizer, "scaler": scaler, "scheduler": scheduler}
    unused = [kind for kind, value in given.items() if value is None and contents.parts[kind] is not None]
    about = contents.about
    names = {prefix: saved["name"] for prefix, saved in about["recipes"].items()}
    made = Restored(contents.path, contents.parts["extra"], [str(d) for d in differences], unused, names, about["fp8fx"], about["torch"])
    for line in made.migrated:
        LOG.warning("fp8fx.load migrated %s", line)
    if unused:
        LOG.info("fp8fx.load left out what was not asked for: %s", ", ".join(unused))
    return made
