"""Schedules: which pruned weights a layer's statistics have seen.

walk       ──┤q k v├──┤o├──┤gate up├──┤down├──...            every node once
block      ──┤q k v───o───gate up───down├ prune, then again from q k v to the next block's q k v
one-shot   ──q k v───o───gate up───down───...├ prune
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the command line asks for the names of schedules, and does without torch
    from statprune.model.sites import InputGroup, LinearSite

Schedule = Literal["walk", "block", "one-shot"]
SCHEDULES = ("walk", "block", "one-shot")

BLOCK_BY_HOOKS = "block (module hooks)"
ONE_SHOT_BY_HOOKS = "one-shot (module hooks)"
"""What a report calls the schedules of a model without a graph."""

SEES_PRUNED = ("walk", "block", BLOCK_BY_HOOKS)
"""The schedules, as a report calls them, in which weights change before the last batch has run."""


def block_of(parameter: str) -> str:
    """The outermost numbered submodule that a parameter is in, such as `model.layers.3`; its own name outside of any."""
    path = parameter.split(".")
    number = next((index for index, part in enumerate(path) if part.isdecimal()), len(path))
    return ".".join(path[: number + 1])


def blocks(groups: "Sequence[InputGroup]") -> "list[list[InputGroup]]":
    """Neighbouring groups of one block: of one outermost numbered submodule, such as `model.layers.3` or `encoder.block.0`.

    A group outside of any, such as an embedding's projection, is a block of its own. Sites of one group that belong to several
    blocks (the keys of every decoder block read what the encoder gave) come with their own block, as a group for each.
    """
    found: list[tuple[str, list[InputGroup]]] = []
    waiting: dict[str, list[InputGroup]] = {}
    for group in groups:
        of_block: dict[str, list[LinearSite]] = {}
        for site in group.sites:
            of_block.setdefault(block_of(site.parameter), []).append(site)
        (block, part), *later = ((block, replace(group, sites=tuple(sites))) for block, sites in of_block.items())
        if not found or found[-1][0] != block:
            found.append((block, waiting.pop(block, [])))
        found[-1][1].append(part)
        for block, part in later:
            waiting.setdefault(block, []).append(part)
    return [*(members for _, members in found), *waiting.values()]
