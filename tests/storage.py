"""Weights that are only there between `prepare` and `release`, as those in files are."""

import copy
from collections import Counter

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from statprune.model.schedule import block_of
from statprune.model.weights import named_tensors


class Storage:
    """A `Weights` that gives what was prepared and nothing else, and records what was there together."""

    is_in_place = True

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.there: set[str] = set()
        self.history: list[set[str]] = []
        """What was there behind each `prepare`."""
        self.reads: Counter[str] = Counter()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, name: str) -> torch.Tensor:
        assert name in self.there, f"{name} was not prepared"
        return self._tensors[name]

    def original(self, name: str) -> torch.Tensor:
        return self.get(name)

    def prepare(self, names, following=()):
        assert len(set(names)) == len(names)
        assert all(name in self._tensors for name in (*names, *following))
        self.reads.update(set(names) - self.there)
        self.there |= set(names)
        self.history.append(set(self.there))

    def put(self, site, pruned):
        site.view(self._tensors[site.parameter]).copy_(pruned.weight)

    def release(self, names):
        assert set(names) <= self.there
        self.there -= set(names)

    @property
    def most_blocks(self) -> int:
        """Of how many numbered blocks weights were there at once."""
        return max(len({block for name in held if (block := block_of(name)) != name}) for held in self.history)


def without_values(model: nn.Module) -> nn.Module:
    """A copy whose parameters hold no values, ties kept; buffers are real."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, nn.Parameter] = {}
    skeleton = copy.deepcopy(model)
    for module in skeleton.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in fakes:
                    fakes[id(parameter)] = nn.Parameter(mode.from_tensor(parameter.detach()), requires_grad=False)
                module._parameters[name] = fakes[id(parameter)]
    return skeleton
