"""statprune: make trained models sparse, without retraining and without gradients, and prove what was done.

Reading order, which is also the direction of the imports and of the data:

    batches -> InputMoments -> score -> keep mask -> corrected weight -> model -> perplexity -> checkpoint
               statistics      criteria  patterns     compensation       transform  perplexity    checkpoint
"""

from statprune.compress import PruningPlan, plan, prune
from statprune.errors import StatpruneError
from statprune.patterns import NM, Unstructured
from statprune.recipe import Recipe
from statprune.report import PruningReport
from statprune.statistics import InputMoments

__all__ = [
    "NM",
    "InputMoments",
    "PruningPlan",
    "PruningReport",
    "Recipe",
    "StatpruneError",
    "Unstructured",
    "plan",
    "prune",
]
