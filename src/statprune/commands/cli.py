"""The command line: a subcommand for each function of `commands`, its options read, and its end told."""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple, get_type_hints

from statprune.commands import COMMANDS, console, endings, options, processes
from statprune.commands.command_line import in_place
from statprune.commands.parsers import parser_of_all, refuse


class Call(NamedTuple):
    """What a command line asks for."""

    function: Callable[..., dict[str, Any]]
    """Of `commands`."""

    given: dict[str, Any]
    """What to call it with."""

    show: options.ShowOptions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit status.

    0; 1 for an error, which is explained; 2 for a wrong option; 130 where Ctrl-C ended it and 143 where SIGTERM did.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in words
    with endings.stoppable() as signals, processes.one_voice() as speaks:
        try:
            call = parse(words)
            as_json = call.show.json
            with (
                console.showing(as_json=as_json, quiet=call.show.quiet or not speaks),
                processes.joined(call.function.__name__, call.given) as given,
            ):
                result = call.function(**given)
            if as_json:
                console.show_json(result)
            return 0
        except endings.UsageError as e:
            if as_json:
                console.show_json({"error": e.message, "kind": "UsageError"})
            raise
        except (Exception, KeyboardInterrupt) as e:
            endings.show_traceback(e)
            if signals or isinstance(e, KeyboardInterrupt):
                text, status = endings.stopped_by(signals[0] if signals else signal.SIGINT)
                console.show_end(text)
            else:
                text, status = endings.explain(e), endings.FAILED
                console.show_error(text)
            if as_json:
                with contextlib.suppress(OSError):  # where that is the error
                    console.show_json({"error": text, "kind": type(e).__name__})
            return status


def parse(words: Sequence[str]) -> Call:
    """The words of a command line as a call of a function of `commands`.

    Raises:
        SystemExit: they are none, which is explained on standard error; or they ask for help, which is printed.
        RecipeError: a criterion or compensation of another package cannot be loaded.
    """
    words = in_place(_without_nul(words))
    parsed = parser_of_all().parse_args(_without_nul(words))  # a file of options may have brought one
    function, values = COMMANDS[parsed.subcommand], parsed[parsed.subcommand].as_dict()
    show = options.ShowOptions(**{field.name: values[field.name] for field in dataclasses.fields(options.ShowOptions)})
    return Call(function, _arguments(function, values), show)


def _without_nul(words: Sequence[str]) -> Sequence[str]:
    """The words. No file can be called so, and each library says it in its own way."""
    if any("\0" in word for word in words):
        refuse(None, "a word with a NUL character: no file and no option has one.")
    return words


def _arguments(function: Callable[..., dict[str, Any]], values: Mapping[str, Any]) -> dict[str, Any]:
    """What to call a command with."""
    kinds = get_type_hints(function)
    return {
        name: kinds[name](**{field.name: values[field.name] for field in dataclasses.fields(kinds[name])})
        if dataclasses.is_dataclass(kinds[name])
        else values[name]
        for name in signature(function).parameters
    }  # fmt: skip
