"""Recipes: which layers run in FP8, and how, as data.

    values, grammar   what may be written        match     patterns against names, types, ops and sizes
    source, load      files, lines, `extends`    resolve   sites in, one decision per site out
    merge, checks     presets; contradictions    recipe    the public class

`docs/recipes.md` teaches the grammar; each module here says its part of it.
"""

from fp8fx.recipe.match import Site
from fp8fx.recipe.recipe import Recipe
from fp8fx.recipe.resolve import Decision, Resolution, Unmatched

__all__ = ["Decision", "Recipe", "Resolution", "Site", "Unmatched"]
