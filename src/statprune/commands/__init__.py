"""What each subcommand of `statprune` does: a function each, thin over the library; its arguments are the options."""

from collections.abc import Callable

from statprune.commands.measurements import benchmark, compare, experiment, quickstart, tune
from statprune.commands.one_model import evaluate, inspect, merge, prune, push, verify

COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "prune": prune,
    "evaluate": evaluate,
    "inspect": inspect,
    "verify": verify,
    "push": push,
    "merge": merge,
    "compare": compare,
    "tune": tune,
    "experiment": experiment,
    "benchmark": benchmark,
}
