"""statprune: make trained models sparse, without retraining and without gradients, and prove what was done.

Reading order, which is also the direction of the imports and of the data:

    batches -> InputMoments -> score -> keep mask -> corrected weight -> model -> perplexity -> checkpoint
               statistics      criteria  patterns     compensation       transform  perplexity    checkpoint
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from statprune.api import plan, prune
from statprune.engine import PruningPlan
from statprune.errors import StatpruneError
from statprune.methods.patterns import NM, Unstructured
from statprune.methods.statistics import InputMoments
from statprune.recipe import Recipe
from statprune.report import PruningReport

if TYPE_CHECKING:
    from statprune.perplexity import Perplexity
    from statprune.training.callback import StatisticalPruning
    from statprune.training.lora import merge_adapters
    from statprune.training.modules import CausalLM, TextData
    from statprune.tuning.outcome import Tuned
    from statprune.tuning.tune import tune

__all__ = [
    "NM",
    "CausalLM",
    "InputMoments",
    "Perplexity",
    "PruningPlan",
    "PruningReport",
    "Recipe",
    "StatisticalPruning",
    "StatpruneError",
    "TextData",
    "Tuned",
    "Unstructured",
    "merge_adapters",
    "plan",
    "prune",
    "tune",
]

# Lightning and torchmetrics take seconds to import, and `prune` needs neither.
_IMPORTED_AT_USE = {
    "StatisticalPruning": "training.callback",
    "CausalLM": "training.modules",
    "TextData": "training.modules",
    "Perplexity": "perplexity",
    "Tuned": "tuning.outcome",
    "merge_adapters": "training.lora",
    "tune": "tuning.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_AT_USE:
        raise AttributeError(f"module 'statprune' has no attribute {name!r}")
    return getattr(import_module(f"statprune.{_IMPORTED_AT_USE[name]}"), name)
