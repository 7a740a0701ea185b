"""Presets: names that stand where a method can stand, for a whole recipe: method, schedule, target and allocation.

Plain data, which the help shows without importing torch. Adding a preset is a line in `PRESETS`, and one in `RESERVED` of
`methods/registry`, so that no package gives a criterion its name.
"""

from dataclasses import dataclass

from statprune.model.schedule import Schedule


@dataclass(frozen=True)
class Preset:
    """What a name stands for; the texts are those of a recipe. What a user gives beside it wins."""

    summary: str
    """A sentence for the help."""

    method: str
    schedule: Schedule = "walk"
    target: str = "pruned"
    allocation: str = "uniform"
    """With N:M patterns, of which every layer can be pruned alike."""

    unstructured_allocation: str = "uniform"
    """With patterns that leave each layer a sparsity of its own."""

    uses_gradients: bool = False
    """Whether the dense model goes backward once: it then needs a loss, and memory for the activations of a batch."""

    @property
    def spelled_out(self) -> str:
        """What it stands for, in a line."""
        allocations = dict.fromkeys((self.allocation, self.unstructured_allocation))
        beside = [f"target {self.target}", f"allocation {' or, where the pattern is unstructured, '.join(allocations)}"]
        return ", ".join([self.method, f"schedule {self.schedule}", *beside])


DEFAULT = "default"
"""The preset of a recipe that names no method."""

PRESETS: dict[str, Preset] = {
    DEFAULT: Preset(
        "The best that needs no gradients and costs no more than SparseGPT.",
        "optimal-brain+least-squares:steps=6,iterations=2",
    ),
    "best": Preset(
        "The best there is; with gradients of the dense model, for three to four times SparseGPT's time.",
        "optimal-brain+loss-aware:steps=9,iterations=4",
        target="dense",
        unstructured_allocation="curves",
        uses_gradients=True,
    ),
    "fast": Preset(
        "Most of what `best` gives, without gradients, for half of its time.",
        "optimal-brain+least-squares:steps=6,iterations=2",
        target="dense",
    ),
    "paper": Preset(
        "The paper's method, CVR and EC, with its settings.",
        "cvr+energy",
    ),
}
"""By name, in the order of the help."""

USUAL_CRITERION = PRESETS[DEFAULT].method.partition("+")[0]
"""What a compensation goes with that is given alone."""
