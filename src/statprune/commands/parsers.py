"""The parser of the command line, and what it says in a help and of a wrong option."""

import re
import shutil
import sys
import textwrap
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from inspect import Parameter
from string import Template
from typing import Any, NoReturn

import shtab
from docstring_parser import Docstring
from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser

from statprune.commands import COMMANDS, endings
from statprune.commands.option import Option, first_line, options_of
from statprune.errors import nearest
from statprune.methods.catalog import Entry, catalog
from statprune.presets import PRESETS
from statprune.versions import versions

TEACHING = """
What to try first, with no network and no file, in three minutes on two cores:

  statprune quickstart

Then with a model of your own, a folder as save_pretrained writes it or a name on the hub:

  statprune inspect MODEL         what could be pruned; what stays dense and why
  statprune prune MODEL --output sparse --dry-run               touches nothing
  statprune prune MODEL --output sparse --pattern 2:4 --calibration train.txt
  statprune verify sparse       whether the files keep what the record promises
  statprune evaluate sparse --text held-out.txt                      perplexity

Which method is best depends on the model: `statprune tune` finds out in as many minutes as you give it, and
`statprune compare` prints a table. `statprune COMMAND --help` explains a command, with examples.

Every command has --json, --quiet and --config. Several words stand one after the other (--text a.txt b.txt), or as a list
('["a.txt", "b.txt"]'). Where there is no terminal, progress is a line now and then.

To have commands, options and files completed when Tab is pressed, in bash (zsh and others likewise), put into ~/.bashrc:

  eval "$(statprune --print-completion bash)"
"""
"""Lines that begin with two spaces stay as they are, others are filled."""


def refuse(command: str | None, text: str) -> NoReturn:
    """Say what is wrong with a command line, below the usage of its command.

    Raises:
        UsageError: always.
    """
    parser = parser_of_all() if command is None else _parser_of(command)
    parser.print_usage(sys.stderr)
    print(f"tip: For details of accepted options run: {parser.prog} --help\nerror: {text}", file=sys.stderr)
    raise endings.UsageError(text)


class _Parser(ArgumentParser):
    """Says what is wrong in a line, in the words of the command line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        command = next((name for name in COMMANDS if parser.prog.split()[-1] == name), None)
        missing = re.findall(rf"\b({'|'.join(COMMANDS)})\.(\w+)", message) if "are required" in message else []
        if missing:
            command = missing[0][0]
            known = {option.name: option.word for option in options_of(COMMANDS[command])}
            refuse(command, f"the following arguments are required: {', '.join(known[name] for _, name in missing)}")
        refuse(command, _in_words(message, options_of(COMMANDS[command]) if command else []))


def _in_words(message: str, known: Sequence[Option]) -> str:
    """What the parser says, in a line and without Python's types."""
    about = re.match(r'Parser key "(?:\w+\.)?(\w+?)"', message)
    option = next((option for option in known if about and option.name == about[1]), None)
    if option is not None:
        values = re.findall(r"(?:Got|Given) value: (.*)", message)
        return f"{option.word} {values[-1] if values else ''}".rstrip() + f": expected {option.expected}."
    if "subcommand" in message:
        return f"expected a command: {', '.join(COMMANDS)}."
    if found := re.search(r"invalid choice: '(.*?)'.*choose from", message):
        return f"there is no command {found[1]!r}.{nearest(found[1], COMMANDS)} The commands are {', '.join(COMMANDS)}."
    text = " ".join(message.split())
    unknown = re.match(r"unrecognized arguments: (--[\w-]+)", text)
    return text + "." + nearest(unknown[1], [one.word for one in known]) if unknown and known else text


def parser_of_all() -> ArgumentParser:
    """Of the whole command line."""
    parser = _Parser(
        prog="statprune", usage="statprune [--help | --version] COMMAND ...", formatter_class=_HelpFormatter,
        description=_filled("Make trained language models sparse, without retraining, and prove what was done."),
        epilog=_filled(TEACHING.strip()), allow_abbrev=True,
    )  # fmt: skip
    parser.add_argument("--version", action=_Version, help="Show the versions of statprune and of what it stands on, and exit.")
    parser.add_argument(
        "--print-completion", action=_Completion, choices=shtab.SUPPORTED_SHELLS, metavar="SHELL",
        help=f"Print what makes a shell ({', '.join(shtab.SUPPORTED_SHELLS)}) complete commands and options, and exit.",
    )  # fmt: skip
    subcommands = parser.add_subcommands(required=True, title="commands", description=None, metavar="COMMAND", prog="statprune")
    for name, function in COMMANDS.items():
        subcommands.add_subcommand(name, _parser_of(name), help=_for_argparse(first_line(function)))
    return parser


class _Version(Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, SUPPRESS, nargs=0, default=SUPPRESS, help=settings["help"])

    def __call__(self, parser: Any, *_: Any) -> None:
        found = versions()
        shown = ", ".join(f"{package} {found[package]}" for package in ("torch", "transformers", "python"))
        print(f"statprune {found['statprune']} ({shown})")
        parser.exit()


class _Completion(Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, SUPPRESS, **{**settings, "default": SUPPRESS})

    def __call__(self, parser: Any, namespace: Any, shell: Any, option: str | None = None) -> None:
        for name, command in _subparsers(parser).items():
            known = {option.name: option for option in options_of(COMMANDS[name])}
            for action in command._actions:
                action.choices = known[action.dest].choices if action.dest in known else None
                if action.dest in FILES:
                    action.complete = shtab.FILE
        print(shtab.complete(parser, shell))
        parser.exit()


def _subparsers(parser: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(action.choices for action in parser._actions if isinstance(action.choices, Mapping))
    return found


FILES = ("config", "recipe", "calibration", "text", "model", "folder", "adapter", "output")
"""Options whose words may be files or folders."""


class _HelpFormatter(RawDescriptionHelpFormatter):
    """Leaves the lines of a description and an epilog alone, and least-squares in one piece."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=_width())

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def _width() -> int:
    return min(110, shutil.get_terminal_size().columns) - 2


def _filled(text: str) -> str:
    paragraphs = text.split("\n\n")
    return "\n\n".join(one if one.startswith("  ") else textwrap.fill(" ".join(one.split()), _width()) for one in paragraphs)


def _parser_of(command: str) -> ArgumentParser:
    function = COMMANDS[command]
    known = options_of(function)
    needed = [one.word if one.is_positional else f"{one.word} {one.metavar}" for one in known if one.is_required]
    document = parse_docstring(function.__doc__ or "")
    texts = [document.short_description, *(document.long_description or "").split("\n\n")]
    parser = _Parser(
        prog=f"statprune {command}", usage=" ".join(["statprune", command, *needed, "[options]"]),
        formatter_class=_HelpFormatter,
        description=_filled("\n\n".join(text for text in texts if text)),
        epilog="\n\n".join([_examples(document), *_lists(known)]),
    )  # fmt: skip
    parser.add_argument(
        "--config", metavar="FILE", type=str,
        help="YAML file with any of these options, such as 'pattern: \"2:4\"' and 'calibration: [a.txt, b.txt]'; those on the "
        "command line win.",
    )  # fmt: skip
    groups: dict[str | None, Any] = {None: parser}
    for option in known:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        _add(groups[option.group], option)
    return parser


def _add(group: Any, option: Option) -> None:
    settings: dict[str, Any] = {"help": _for_argparse(_explained(option))}
    if option.is_positional:
        group.add_argument(option.name, metavar=option.metavar, type=str, **settings)
    elif option.kind is bool:
        group.add_argument(option.word, action="store_true", **settings)
    else:
        settings |= {"required": True} if option.is_required else {"default": option.default}
        settings |= {"nargs": "+"} if option.item is not None else {}
        group.add_argument(option.word, type=option.item or option.kind, metavar=option.metavar, **settings)


def _explained(option: Option) -> str:
    """The help with names from the registry in it, and what happens where the option is not given."""
    names = {"presets": ", ".join(PRESETS), **{name: ", ".join(entries) for name, entries in catalog().items()}}
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
    return "\n  ".join(["examples:", *(part for line in lines for part in _broken(line))])


def _broken(line: str) -> list[str]:
    """A command line as one or several that fit, broken before options as in a shell."""
    parts = re.split(r" (?=--\w)", line)
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + len("   \\") <= _width():
            lines[-1] += f" {part}"
        else:
            lines[-1] += " \\"
            lines.append(f"    {part}")
    return lines


def _lists(known: Sequence[Option]) -> Iterator[str]:
    """What there is for these options: each name with what it is, and with its settings or what it stands for."""
    names = {option.name for option in known}
    lists = {title: {name: _texts(entry) for name, entry in entries.items()} for title, entries in catalog().items()}
    presets = {name: [preset.summary.replace("`", ""), preset.spelled_out] for name, preset in PRESETS.items()}
    for title, rows in ({"presets": presets} | lists).items():
        if names & _LISTED_FOR[title]:
            yield "\n".join([f"{title}:", *(line for name, texts in rows.items() for line in _row(name, texts))])


def _texts(entry: Entry) -> list[str]:
    settings = " ".join(f"{key}={'...' if value is Parameter.empty else value}" for key, value in entry.settings.items())
    return [entry.summary.replace("`", "") or "no docstring", f"settings: {settings}" if settings else ""]


def _row(name: str, texts: Sequence[str]) -> list[str]:
    indent = " " * 20
    lines = [
        line
        for text in texts
        for line in textwrap.wrap(text, _width() - len(indent), break_on_hyphens=False, break_long_words=False)
    ]
    return [f"  {name:<{len(indent) - 2}}{lines[0]}", *(indent + line for line in lines[1:])]


_LISTED_FOR = {
    "presets": {"method", "methods"},
    "criteria": {"method", "methods"},
    "compensations": {"method", "methods"},
    "patterns": {"pattern", "patterns"},
    "allocations": {"allocation"},
    "targets": {"target"},
}
"""Options whose commands show a list of the registry."""
