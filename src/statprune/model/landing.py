"""Which `Weights` a model asks for, by where its weights lie."""

from torch import Tensor, nn

from statprune.model.dispatched import Dispatched, DispatchedTwin
from statprune.model.sharded import Sharded, ShardedTwin
from statprune.model.storage import is_dispatched, is_sharded
from statprune.model.weights import InPlace, Twin, Weights
from statprune.ranks import ProcessGroup


def in_place(model: nn.Module, process_group: ProcessGroup = None) -> Weights:
    """Weights that are read from the model and written into it, each where it lies."""
    if is_sharded(model):
        return Sharded(model, process_group)
    return Dispatched(model) if is_dispatched(model) else InPlace(model)


def aside(model: nn.Module, process_group: ProcessGroup = None) -> Twin | ShardedTwin | DispatchedTwin:
    """Weights of which the pruned ones are kept aside, in `pruned`."""
    if is_sharded(model):
        return ShardedTwin(model, process_group)
    return DispatchedTwin(model) if is_dispatched(model) else Twin(model)


def pruned_aside(weights: Weights) -> dict[str, Tensor]:
    """What was put and has not landed, by parameter name as the parameter is stored; nothing where weights land at once."""
    return weights.pruned if isinstance(weights, Twin | ShardedTwin | DispatchedTwin) else {}
