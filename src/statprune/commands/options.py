"""What several commands do in the same way."""

from typing import Any

from statprune.commands import display
from statprune.errors import RecipeError


def read_recipe(path: str | None, **options: Any) -> Any:
    """The recipe of a file, or of single options; RecipeError where both are given."""
    from statprune.recipe import Recipe

    given = {key: value for key, value in options.items() if value is not None}
    if path is None:
        return Recipe.from_dict(given)
    if given:
        raise RecipeError(
            f"--recipe {path} and --{', --'.join(given)} were both given: expected a recipe file or single options."
        )
    return Recipe.from_yaml(path)


def survey_model(model: Any, recipe: Any) -> Any:
    """What the recipe makes of the model."""
    from statprune.model.survey import survey

    return survey(model, recipe)


def calibrate(model: Any, tokenizer: Any, sources: list[str], samples: int, seqlen: int, seed: int) -> Any:
    """Calibration windows [samples, seqlen], with a progress bar; CalibrationError where they cannot be had."""
    from statprune.data import calibration_windows

    with display.progress("calibration windows") as progress:
        return calibration_windows(
            sources, tokenizer=tokenizer, model=model, samples=samples, seqlen=seqlen, seed=seed,
            progress=progress,
        )  # fmt: skip
