"""What was asked, settled: a recipe, and whether it is for text or for a network in memory. Checked, then carried
out; the command line and recipe files share it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .modules.command import for_text
from .modules.names import is_network
from .modules.recipe import ModuleRecipe
from .progress import Progress
from .recipe import LEFT_OUT, Recipe
from .recipes.options import default, shortest

if TYPE_CHECKING:
    from .modules.report import ModuleReport
    from .report import Report

OF_THE_CALL = {"overwrite", "resume", "called"}
"""What belongs to one call and not to what is asked for."""


@dataclass
class Request:
    """model_options: for the factory of a vision library."""

    recipe: Recipe
    model_options: dict[str, Any]

    @property
    def vision(self) -> bool:
        """Whether it is for a network in memory."""
        return isinstance(self.recipe, ModuleRecipe)

    def options(self) -> dict[str, Any]:
        """Those of a recipe file that asks for the same, output and how it is computed included."""
        found = shortest(self.recipe.to_json(), self.vision, self.model_options)
        if self.recipe.wants_target:
            found["target"] = self.recipe.target
        for f in fields(self.recipe):
            value = getattr(self.recipe, f.name)
            if f.name in LEFT_OUT - OF_THE_CALL and value != default(f):
                found[f.name] = value
        return found

    def check(self) -> None:
        """Raises GrailError for a method or an option of it that there is not. Files are not looked at."""
        from .selectors import selector_class

        selector = selector_class(self.recipe.method).from_options(self.recipe.set)
        if self.vision:
            from .modules.compress import refuse_decoder_methods

            refuse_decoder_methods(selector)

    def carry_out(self, progress: Progress) -> Report | ModuleReport | None:
        """The one way to a compression. None in all but the main one of several processes."""
        if self.vision:
            from .modules.run import compress_named

            return compress_named(self.recipe, self.model_options, progress)
        from .run import run

        return run(self.recipe, progress)


def request(asked: dict[str, Any], model_options: dict[str, Any]) -> Request:
    """From options with underscores, of which `model` must be one. Raises GrailError for bad input."""
    if is_network(asked["model"]):
        return Request(ModuleRecipe(**asked), model_options)
    return Request(Recipe(**for_text(asked, model_options)), {})
