"""statprune: make trained models sparse, without retraining and without gradients, and prove what was done.

What flows, which is also the order to read in (a map of the rooms is in README.md beside this file):

    batches -> InputMoments -> score -> keep mask -> corrected weight -> Weights.put -> perplexity -> checkpoint
               statistics      criteria  patterns     compensations       weights       perplexity    checkpoint
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from statprune.acceleration.accelerate import accelerate
    from statprune.api import PruningPlan, plan, prune
    from statprune.checkpoint import save
    from statprune.errors import StatpruneError
    from statprune.loading import load_model as load
    from statprune.methods.patterns import NM, Unstructured
    from statprune.methods.statistics import InputMoments
    from statprune.perplexity import Perplexity, evaluate
    from statprune.recipe import Recipe, Search
    from statprune.report import PruningReport
    from statprune.training.callback import StatisticalPruning
    from statprune.training.lora import merge_adapters
    from statprune.training.modules import CausalLM, TextData
    from statprune.training.trainer import PruningCallback
    from statprune.tuning.outcome import Tuned
    from statprune.tuning.tune import tune
    from statprune.verification import verify

__all__ = [
    "NM",
    "CausalLM",
    "InputMoments",
    "Perplexity",
    "PruningCallback",
    "PruningPlan",
    "PruningReport",
    "Recipe",
    "Search",
    "StatisticalPruning",
    "StatpruneError",
    "TextData",
    "Tuned",
    "Unstructured",
    "accelerate",
    "evaluate",
    "load",
    "merge_adapters",
    "plan",
    "prune",
    "save",
    "tune",
    "verify",
]

# Torch, Lightning and torchmetrics take seconds to import, and the command line needs none of them to explain itself.
_IMPORTED_AT_USE = {
    "NM": "methods.patterns:NM",
    "CausalLM": "training.modules:CausalLM",
    "InputMoments": "methods.statistics:InputMoments",
    "Perplexity": "perplexity:Perplexity",
    "PruningCallback": "training.trainer:PruningCallback",
    "PruningPlan": "api:PruningPlan",
    "PruningReport": "report:PruningReport",
    "Recipe": "recipe:Recipe",
    "Search": "recipe:Search",
    "StatisticalPruning": "training.callback:StatisticalPruning",
    "StatpruneError": "errors:StatpruneError",
    "TextData": "training.modules:TextData",
    "Tuned": "tuning.outcome:Tuned",
    "Unstructured": "methods.patterns:Unstructured",
    "accelerate": "acceleration.accelerate:accelerate",
    "evaluate": "perplexity:evaluate",
    "load": "loading:load_model",
    "merge_adapters": "training.lora:merge_adapters",
    "plan": "api:plan",
    "prune": "api:prune",
    "save": "checkpoint:save",
    "tune": "tuning.tune:tune",
    "verify": "verification:verify",
}


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_AT_USE:
        raise AttributeError(f"module 'statprune' has no attribute {name!r}")
    module, _, attribute = _IMPORTED_AT_USE[name].partition(":")
    return getattr(import_module(f"statprune.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
