"""statprune: make trained models sparse, without retraining and without gradients, and prove what was done.

What flows, which is also the order to read in (a map of the rooms is in README.md beside this file):

    batches -> InputMoments -> score -> keep mask -> corrected weight -> Weights.put -> perplexity -> checkpoint
               statistics      criteria  patterns     compensations       weights       perplexity    checkpoint
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from statprune.api import PruningPlan, plan, prune
from statprune.errors import StatpruneError
from statprune.methods.patterns import NM, Unstructured
from statprune.methods.statistics import InputMoments
from statprune.recipe import Recipe, Search
from statprune.report import PruningReport

if TYPE_CHECKING:
    from statprune.checkpoint import save
    from statprune.loading import load_model as load
    from statprune.perplexity import Perplexity, evaluate
    from statprune.training.callback import StatisticalPruning
    from statprune.training.lora import merge_adapters
    from statprune.training.modules import CausalLM, TextData
    from statprune.tuning.outcome import Tuned
    from statprune.tuning.tune import tune
    from statprune.verification import verify

__all__ = [
    "NM",
    "CausalLM",
    "InputMoments",
    "Perplexity",
    "PruningPlan",
    "PruningReport",
    "Recipe",
    "Search",
    "StatisticalPruning",
    "StatpruneError",
    "TextData",
    "Tuned",
    "Unstructured",
    "evaluate",
    "load",
    "merge_adapters",
    "plan",
    "prune",
    "save",
    "tune",
    "verify",
]

# Lightning and torchmetrics take seconds to import, and `prune` needs neither.
_IMPORTED_AT_USE = {
    "CausalLM": ("training.modules", "CausalLM"),
    "Perplexity": ("perplexity", "Perplexity"),
    "StatisticalPruning": ("training.callback", "StatisticalPruning"),
    "TextData": ("training.modules", "TextData"),
    "Tuned": ("tuning.outcome", "Tuned"),
    "evaluate": ("perplexity", "evaluate"),
    "load": ("loading", "load_model"),
    "merge_adapters": ("training.lora", "merge_adapters"),
    "save": ("checkpoint", "save"),
    "tune": ("tuning.tune", "tune"),
    "verify": ("verification", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_AT_USE:
        raise AttributeError(f"module 'statprune' has no attribute {name!r}")
    module, attribute = _IMPORTED_AT_USE[name]
    return getattr(import_module(f"statprune.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
