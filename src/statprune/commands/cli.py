"""The command line: a subcommand for each function of `commands`, an option for each of its arguments."""

import sys
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser

from statprune.commands import COMMANDS, display
from statprune.errors import StatpruneError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 for an error that statprune explains, 2 for a wrong option."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    name = parsed.subcommand
    options = {key: value for key, value in parsed[name].as_dict().items() if key != "config"}
    try:
        COMMANDS[name](**options)
    except StatpruneError as e:
        display.show_error(e)
        return 1
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="statprune", description="Make trained language models sparse, and prove what was done.")
    subcommands = parser.add_subcommands(required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        summary = parse_docstring(function.__doc__ or "").short_description or ""
        subparser = ArgumentParser(description=summary)
        subparser.add_argument("--config", action="config", help="YAML file with any of these options.")
        _add_arguments(subparser, function)
        subcommands.add_subcommand(name, subparser, help=summary)
    return parser


def _add_arguments(parser: ArgumentParser, function: Callable[..., None]) -> None:
    """A function's parameters as options: the model, folder or adapter by position, lists as several words."""
    helps = {parameter.arg_name: parameter.description for parameter in parse_docstring(function.__doc__ or "").params}
    types = get_type_hints(function)
    for name, parameter in signature(function).parameters.items():
        option = f"--{name.replace('_', '-')}"
        settings: dict[str, Any] = {"help": helps[name]}
        if name in ("model", "folder", "name", "adapter") and types[name] is str:
            parser.add_argument(name, metavar=name.upper(), type=str, **settings)
        elif types[name] is bool:
            parser.add_argument(option, action="store_true", **settings)
        else:
            is_required = parameter.default is parameter.empty
            settings |= {"required": True} if is_required else {"default": parameter.default}
            items = [kind for kind in (types[name], *get_args(types[name])) if get_origin(kind) is list]
            if items:
                settings |= {"nargs": "+", "metavar": name.upper()}
            parser.add_argument(option, type=get_args(items[0])[0] if items else types[name], **settings)


if __name__ == "__main__":
    sys.exit(main())
