"""Which sites a recipe prunes, and why the others stay dense."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from statprune.errors import SiteError, nearest
from statprune.methods.budget import Uniform
from statprune.methods.patterns import ModelPattern
from statprune.methods.statistics import Statistic
from statprune.model.sites import InputGroup, LeftOut, LinearSite
from statprune.recipe import Recipe, Search


@dataclass(frozen=True)
class Selection:
    """What a recipe makes of a model."""

    groups: tuple[InputGroup, ...]
    """With the sites to prune, in execution order."""

    left_out: tuple[LeftOut, ...]
    """Every other weight with two or more dimensions."""

    @property
    def sites(self) -> list[LinearSite]:
        """The sites to prune, in execution order."""
        return [site for group in self.groups for site in group.sites]


def select(groups: Sequence[InputGroup], left_out: Sequence[LeftOut], recipe: Recipe | Search) -> Selection:
    """Apply the `targets`, `ignore` and `on_indivisible` of a recipe, or of a search for one.

    Raises:
        SiteError: a glob matches no weight, or only weights that cannot be pruned; nothing is left to prune; a width
            that the pattern does not divide.
    """
    sites = [site for group in groups for site in group.sites]
    for key, patterns in (("targets", recipe.targets or ()), ("ignore", recipe.ignore)):
        for pattern in patterns:
            _check_glob(key, pattern, sites, left_out)
    pattern_object = recipe.build_pattern()
    kept_groups, excluded = [], list(left_out)
    for group in groups:
        chosen = []
        for site in group.sites:
            if reason := _exclusion(site, recipe, pattern_object):
                excluded.append(LeftOut(site.name, site.shape, reason))
            else:
                chosen.append(site)
        if chosen:
            kept_groups.append(replace(group, sites=tuple(chosen)))
    if not kept_groups:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in excluded[:5]) or "it has no weight matrices"
        raise SiteError(f"Nothing in this model is left to prune ({reasons}). Name layers in `targets` to prune them anyway.")
    return Selection(tuple(kept_groups), tuple(excluded))


def unfit_for_experts(selection: Selection, recipe: Recipe) -> str | None:
    """What a recipe asks for that a stack of matrices (experts) among the weights cannot have; None where there is nothing."""
    stack = next((site for site in selection.sites if len(site.shape) > 2), None)
    wants = []
    if Statistic.CURVATURE in recipe.needs:
        wants.append(f"the method {recipe.method}, which needs gradients of single layers' outputs")
    if not isinstance(recipe.build_allocation(), Uniform):
        wants.append(f"the allocation {recipe.allocation}")
    if stack is None or not wants:
        return None
    return (
        f"{stack.name} is a stack of {stack.num_matrices} matrices (experts), which cannot have {' or '.join(wants)}. Take "
        "another method or the allocation uniform, or leave experts dense with `ignore`."
    )


def refuse_unfit_for_experts(selection: Selection, recipe: Recipe) -> None:
    """Raise SiteError, before a weight changes, where there is something that experts cannot have."""
    if problem := unfit_for_experts(selection, recipe):
        raise SiteError(f"{problem} Nothing was changed.")


def _exclusion(site: LinearSite, recipe: Recipe | Search, pattern: ModelPattern) -> str | None:
    if any(_matches(pattern, name) for pattern in recipe.ignore for name in _all_names(site)):
        return "ignored by the recipe"
    if recipe.targets is not None and not any(_matches(pattern, site.name) for pattern in recipe.targets):
        return "not among the recipe's targets"
    if recipe.targets is None and site.default_exclusion:
        return site.default_exclusion
    if not pattern.fits(site.shape[-1]):
        reason = f"{pattern} does not divide its width of {site.shape[-1]}"
        if recipe.on_indivisible == "error":
            raise SiteError(
                f"{site.name}: {reason}. Leave such layers dense with on_indivisible: skip, name them in `ignore`, "
                "or choose another pattern. Nothing was changed."
            )
        return reason
    return None


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(f"{name}.weight", pattern)


def _all_names(site: LinearSite) -> list[str]:
    """The site's name, and those of the other modules that its weight is tied to."""
    return [site.name, *(alias.removesuffix(".weight") for alias in site.aliases)]


def _check_glob(key: str, pattern: str, sites: Sequence[LinearSite], left_out: Sequence[LeftOut]) -> None:
    if any(_matches(pattern, site.name) for site in sites):
        return
    # An alias is enough to ignore a weight. It is not enough to target it: 'model.*' does not mean the lm_head that is
    # tied to model.embed_tokens.
    tied = next((site for site in sites if any(_matches(pattern, name) for name in _all_names(site))), None)
    other = next((one for one in left_out if _matches(pattern, one.name)), None)
    if (tied or other) and key == "ignore":
        return
    if tied:
        raise SiteError(f"Recipe({key}=[{pattern!r}]): this is {tied.name}, {tied.default_exclusion}. Name it by that name.")
    if other:
        raise SiteError(f"Recipe({key}=[{pattern!r}]): {other.name} cannot be pruned: {other.reason}.")
    raise SiteError(
        f"Recipe({key}=[{pattern!r}]) matches no weight of this model.{nearest(pattern, [site.name for site in sites])} "
        "`statprune inspect` lists the names; '*' matches anything, dots included."
    )
