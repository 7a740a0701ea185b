"""What each subcommand of `statprune` does: a function each, thin over the library; its arguments are the options.

It shows people what it does with `console` and `display`, and returns the same as plain data, which is what --json prints.
"""

from collections.abc import Callable
from typing import Any

from statprune.commands.measurements import accelerate, benchmark, compare, experiment, quickstart, tune
from statprune.commands.one_model import evaluate, inspect, merge, push, report, verify
from statprune.commands.pruning import prune

COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "quickstart": quickstart,
    "prune": prune,
    "evaluate": evaluate,
    "inspect": inspect,
    "verify": verify,
    "report": report,
    "push": push,
    "merge": merge,
    "compare": compare,
    "tune": tune,
    "experiment": experiment,
    "benchmark": benchmark,
    "accelerate": accelerate,
}
