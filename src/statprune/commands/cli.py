"""The command line: a subcommand for each function of `commands`, options for its arguments and for the fields of its options.

An argument of a simple type is one option, explained in the function's docstring. An argument whose type is a dataclass of
`options` stands for all of its fields, which are options of their own, explained under the field. The help of a command is the
function's docstring.
"""

import dataclasses
import math
import re
import shutil
import signal
import sys
import textwrap
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from inspect import Parameter, signature
from pathlib import Path
from string import Template
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import Docstring, parse_from_object
from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser

from statprune.commands import COMMANDS, display, endings, options
from statprune.methods.catalog import Entry, catalog

POSITIONAL = ("model", "folder", "name", "adapter", "repository")
"""Arguments that stand without an option's name."""

TEACHING = """
What to try first, with no network and no file, in three minutes on two cores:

  statprune quickstart

Then with a model of your own, a folder as save_pretrained writes it or a name on the hub:

  statprune inspect MODEL                            what could be pruned, and what stays dense and why
  statprune prune MODEL --output sparse --dry-run    what pruning would do; touches nothing
  statprune prune MODEL --output sparse --pattern 2:4 --calibration train.txt
  statprune verify sparse                            whether the files keep what the record promises
  statprune evaluate sparse --text held-out.txt      perplexity

Which method is best depends on the model: `statprune tune` finds out in as many minutes as you give it, and
`statprune compare` prints a table. `statprune COMMAND --help` explains a command, with examples.
"""


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
    with endings.stoppable() as signals:
        try:
            call = parse(words)
            as_json = call.show.json
            with display.showing(as_json=as_json, quiet=call.show.quiet):
                result = call.function(**call.given)
            if as_json:
                display.show_json(result)
            return 0
        except endings.UsageError as e:
            if as_json:
                display.show_json({"error": e.message, "kind": "UsageError"})
            raise
        except (Exception, KeyboardInterrupt) as e:
            endings.show_traceback(e)
            if signals or isinstance(e, KeyboardInterrupt):
                text, status = endings.stopped_by(signals[0] if signals else signal.SIGINT)
                display.show_end(text)
            else:
                text, status = endings.explain(e), endings.FAILED
                display.show_error(text)
            if as_json:
                display.show_json({"error": text, "kind": type(e).__name__})
            return status


def parse(words: Sequence[str]) -> Call:
    """The words of a command line as a call of a function of `commands`.

    Raises:
        SystemExit: they are none, which is explained on standard error; or they ask for help, which is printed.
        RecipeError: a criterion or compensation of another package cannot be loaded.
    """
    parsed = _parser().parse_args(_in_place(words))
    function, values = COMMANDS[parsed.subcommand], parsed[parsed.subcommand].as_dict()
    show = options.ShowOptions(**{field.name: values[field.name] for field in dataclasses.fields(options.ShowOptions)})
    return Call(function, _arguments(function, values), show)


@dataclasses.dataclass(frozen=True)
class _Option:
    """One word of the command line, or a name and one word or several."""

    name: str
    kind: Any
    default: Any
    """`Parameter.empty` where it must be given."""

    help: str
    group: str | None
    """The heading it stands under; None for a command's own."""

    @property
    def is_positional(self) -> bool:
        return self.name in POSITIONAL and self.kind is str

    @property
    def is_required(self) -> bool:
        return self.default is Parameter.empty

    @property
    def word(self) -> str:
        return self.name.upper() if self.is_positional else f"--{self.name.replace('_', '-')}"

    @property
    def item(self) -> Any:
        """The type of each word, where several may follow; else None."""
        lists = [kind for kind in (self.kind, *get_args(self.kind)) if get_origin(kind) is list]
        return get_args(lists[0])[0] if lists else None

    @property
    def metavar(self) -> str:
        kinds = [kind for kind in (self.item or self.kind, *get_args(self.item or self.kind)) if kind is not NoneType]
        choices = [get_args(kind) for kind in kinds if get_origin(kind) is Literal]
        if choices:
            return f"{{{','.join(choices[0])}}}"
        return "N" if {int, float} & {*kinds} else self.name.upper()

    @property
    def room(self) -> float:
        """How many words belong to it."""
        return 0 if self.kind is bool else 1 if self.item is None else math.inf


@cache
def _options(function: Callable[..., dict[str, Any]]) -> list[_Option]:
    """All options of a command, in the order of its arguments."""
    helps = {parameter.arg_name: parameter.description for parameter in parse_docstring(function.__doc__ or "").params}
    kinds = get_type_hints(function)
    found: list[_Option] = []
    for name, parameter in signature(function).parameters.items():
        if dataclasses.is_dataclass(kinds[name]):
            found += _fields(kinds[name], parameter.default)
        else:
            text = helps.get(name) or _shared_helps()[name]
            found.append(_Option(name, kinds[name], parameter.default, text, None))
    return [*found, *_fields(options.ShowOptions, Parameter.empty)]


def _fields(kind: Any, default: Any) -> Iterator[_Option]:
    """The fields of a dataclass of options, its own before those that it inherits."""
    kinds = get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind)}
    owners: list[Any] = [owner for owner in kind.__mro__ if dataclasses.is_dataclass(owner)]
    for owner in owners:
        helps = _helps_of_fields(owner)
        for name in owner.__annotations__:
            usual = Parameter.empty if known[name].default is dataclasses.MISSING else known[name].default
            value = usual if default is Parameter.empty else getattr(default, name)
            yield _Option(name, kinds[name], value, helps[name], _first_line(owner))


@cache
def _helps_of_fields(kind: type) -> dict[str, str]:
    """What is written under the fields that a dataclass itself declares."""
    return {parameter.arg_name: parameter.description or "" for parameter in parse_from_object(kind).params}


@cache
def _shared_helps() -> dict[str, str]:
    """What is written under the fields of all options, for commands that have one of them alone."""
    kinds = [kind for kind in vars(options).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    return {name: text for kind in kinds for name, text in _helps_of_fields(kind).items()}


def _arguments(function: Callable[..., dict[str, Any]], values: Mapping[str, Any]) -> dict[str, Any]:
    """What to call a command with."""
    kinds = get_type_hints(function)
    return {
        name: kinds[name](**{field.name: values[field.name] for field in dataclasses.fields(kinds[name])})
        if dataclasses.is_dataclass(kinds[name])
        else values[name]
        for name in signature(function).parameters
    }  # fmt: skip


class _Parser(ArgumentParser):
    """Names what is missing as it is typed, below the usage of the command that misses it."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        missing = re.findall(rf"\b({'|'.join(COMMANDS)})\.(\w+)", message) if "are required" in message else []
        if missing:
            command = missing[0][0]
            known = {option.name: option.word for option in _options(COMMANDS[command])}
            names = ", ".join(known[name] for _, name in missing)
            _command_parser(command, COMMANDS[command]).error(f"the following arguments are required: {names}")
        try:
            super().error(message, ex)
        except SystemExit as e:
            raise endings.UsageError(message) from e


def _parser() -> ArgumentParser:
    parser = _Parser(
        prog="statprune", usage="statprune COMMAND ...", formatter_class=_HelpFormatter,
        description="Make trained language models sparse, without retraining, and prove what was done.", epilog=TEACHING,
    )  # fmt: skip
    subcommands = parser.add_subcommands(required=True, title="commands", metavar="COMMAND", prog="statprune")
    for name, function in COMMANDS.items():
        subcommands.add_subcommand(name, _command_parser(name, function), help=_for_argparse(_first_line(function)))
    return parser


class _HelpFormatter(RawDescriptionHelpFormatter):
    """Leaves the lines of a description and an epilog alone, and least-squares in one piece."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=_width())

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def _width() -> int:
    return min(110, shutil.get_terminal_size().columns) - 2


def _command_parser(name: str, function: Callable[..., dict[str, Any]]) -> ArgumentParser:
    known = _options(function)
    needed = [one.word if one.is_positional else f"{one.word} {one.metavar}" for one in known if one.is_required]
    document = parse_docstring(function.__doc__ or "")
    texts = [document.short_description, *(document.long_description or "").split("\n\n")]
    parser = ArgumentParser(
        prog=f"statprune {name}", usage=" ".join(["statprune", name, *needed, "[options]"]), formatter_class=_HelpFormatter,
        description="\n\n".join(textwrap.fill(" ".join(text.split()), _width()) for text in texts if text),
        epilog="\n\n".join([_examples(document), *_lists(known)]),
    )  # fmt: skip
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file with any of these options.")
    groups: dict[str | None, Any] = {None: parser}
    for option in known:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        _add(groups[option.group], option)
    return parser


def _add(group: Any, option: _Option) -> None:
    settings: dict[str, Any] = {"help": _for_argparse(_explained(option))}
    if option.is_positional:
        group.add_argument(option.name, metavar=option.metavar, type=str, **settings)
    elif option.kind is bool:
        group.add_argument(option.word, action="store_true", **settings)
    else:
        settings |= {"required": True} if option.is_required else {"default": option.default}
        settings |= {"nargs": "+"} if option.item is not None else {}
        group.add_argument(option.word, type=option.item or option.kind, metavar=option.metavar, **settings)


def _explained(option: _Option) -> str:
    """The help with names from the registry in it, and what happens where the option is not given."""
    names = {name: ", ".join(entries) for name, entries in catalog().items()}
    text = Template(" ".join(option.help.split())).substitute(names)
    if option.is_required:
        return text if option.is_positional else f"{text} Required."
    if option.default is None or option.default is False or "Default:" in text:
        return text
    default = option.default if isinstance(option.default, list) else [option.default]
    return f"{text} Default: {' '.join(map(str, default))}."


def _for_argparse(text: str) -> str:
    return text.replace("%", "%%")


def _examples(document: Docstring) -> str:
    lines = [line for example in document.examples for line in (example.description or "").splitlines()]
    return "\n  ".join(["examples:", *lines])


def _lists(known: Sequence[_Option]) -> Iterator[str]:
    """What the registry has for these options: each entry with the first line of its docstring, and with its settings."""
    names = {option.name for option in known}
    for title, entries in catalog().items():
        if names & _LISTED_FOR[title]:
            yield "\n".join([f"{title}:", *(line for name, entry in entries.items() for line in _entry(name, entry))])


def _entry(name: str, entry: Entry) -> list[str]:
    indent = " " * 20
    settings = " ".join(f"{key}={'...' if value is Parameter.empty else value}" for key, value in entry.settings.items())
    texts = [entry.summary.replace("`", "") or "no docstring", f"settings: {settings}" if settings else ""]
    lines = [line for text in texts for line in textwrap.wrap(text, _width() - len(indent))]
    return [f"  {name:<{len(indent) - 2}}{lines[0]}", *(indent + line for line in lines[1:])]


_LISTED_FOR = {
    "criteria": {"method", "methods"},
    "compensations": {"method", "methods"},
    "patterns": {"pattern", "patterns"},
    "allocations": {"allocation"},
}
"""Options whose commands show a list of the registry."""


def _in_place(words: Sequence[str]) -> list[str]:
    """The words as the parser takes them: --batch-size for --batch_size, and MODEL first where an option has swallowed it.

    `--text a.txt MODEL` reads as two texts and no model. Where nothing else is MODEL, the last word of an option of several
    words is; where that could be one of several words, the one that is a model's folder.
    """
    if not words or words[0] not in COMMANDS:
        return list(words)
    command, rest = words[0], list(words[1:])
    known = _options(COMMANDS[command])
    rooms = {option.word: option.room for option in known if not option.is_positional} | {"--config": 1}
    missing = [option.name for option in known if option.is_positional]
    last: list[int] = []  # where each option ends that has several words
    room, run = 0.0, 0
    for index, word in enumerate(rest):
        if word == "--":
            missing = missing[len(rest) - index - 1 :]
            break
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = name if name in rooms else _full(name.replace("_", "-"), rooms) or name
            rest[index] = name + equals + value
            room, run = 0 if equals else rooms.get(name, 0), 0
        elif run < room:
            run += 1
            if run == 2:
                last.append(index)
            elif run > 2:
                last[-1] = index
        else:
            missing = missing[1:]
    if len(missing) != 1 or _is_in_config(missing[0], rest):
        return [command, *rest]
    if len(last) > 1:
        last = [index for index in last if Path(rest[index], "config.json").is_file()]
    if len(last) == 1:
        rest.insert(0, rest.pop(last[0]))
    return [command, *rest]


def _full(name: str, rooms: Mapping[str, float]) -> str | None:
    """The option that begins like this, where it is the only one."""
    found = [name] if name in rooms else [one for one in rooms if one.startswith(name)]
    return found[0] if len(found) == 1 else None


def _is_in_config(name: str, words: Sequence[str]) -> bool:
    """Whether a file of options holds it. One that cannot be read is the parser's to explain."""
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == "--config" and (equals or index + 1 < len(words)):
            try:
                data = yaml.safe_load(Path(value if equals else words[index + 1]).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, yaml.YAMLError):
                continue
            if isinstance(data, Mapping) and name in data:
                return True
    return False


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").partition("\n")[0]
