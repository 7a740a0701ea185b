"""The words of a command line as the parser takes them: names in full, lists as words, a file's options among the others."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml

from statprune import strict_yaml
from statprune.commands import COMMANDS
from statprune.commands.option import Option, options_of
from statprune.commands.parsers import refuse
from statprune.errors import first_line, nearest

CONFIG = "--config"


def in_place(words: Sequence[str]) -> list[str]:
    """--batch-size for --batch_size, a list's words, the options of --config, and MODEL first where an option has swallowed it.

    `--text a.txt MODEL` reads as two texts and no model. Where nothing else is MODEL, the last word of an option of several
    words is; where that could be one of several words, the one that is a model's folder.

    Raises:
        UsageError: a file of options cannot be used.
    """
    if not words or words[0] not in COMMANDS:
        return list(words)
    command, *rest = words
    known = options_of(COMMANDS[command])
    rest, files = _split_off_files(_lists_as_words(_in_full(rest, known), known))
    in_files: dict[str, list[str]] = {}
    for file in files:
        in_files |= _words_of_file(file, known, partial(refuse, command))
    named = {word.partition("=")[0] for word in rest if word.startswith("--")}
    positional = [option for option in known if option.is_positional]
    rest = _swallowed_first(rest, known, [one.name for one in positional if one.word not in in_files])
    end = rest.index("--") if "--" in rest else len(rest)
    others = [word for name, given in in_files.items() if name.startswith("--") and name not in named for word in given]
    rest[end:end] = others
    if len(_stand_alone(rest[: end + len(others)], known)) + len(rest[end + len(others) + 1 :]) < len(positional):
        rest[:0] = [word for option in positional for word in in_files.get(option.word, ())]
    return [command, *rest]


def _in_full(words: Sequence[str], known: Sequence[Option]) -> list[str]:
    """Options by their whole name: with dashes, and where only its beginning was given."""
    names = [CONFIG, *(option.word for option in known if not option.is_positional)]
    full: list[str] = []
    for index, word in enumerate(words):
        if word == "--":
            return [*full, *words[index:]]
        name, equals, value = word.partition("=")
        if word.startswith("--") and name not in names:
            name = name.replace("_", "-")
            found = [name] if name in names else [one for one in names if one.startswith(name)]
            word = (found[0] if len(found) == 1 else name) + equals + value
        full.append(word)
    return full


def _lists_as_words(words: Sequence[str], known: Sequence[Option]) -> list[str]:
    """The words of a list that stands as one, such as `'["energy:column", "least-squares"]'`. A glob such as `[ab]*` stays."""
    several = {option.word: option for option in known if option.item is not None}
    found: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in several and _list(value, several[name]) is not None:
            found.append(name)
            word = value
        option = several.get(found[-1]) if found else None
        items = _list(word, option) if option is not None else None
        found += [word] if items is None else [item if isinstance(item, str) else json.dumps(item) for item in items]
    return found


def _list(word: str, option: Option) -> list[Any] | None:
    is_list = word.startswith("[") and word.endswith("]") and ("'" in word or '"' in word or str not in option.kinds)
    try:
        items = strict_yaml.load(word) if is_list else None
    except yaml.YAMLError:
        return None
    return items if isinstance(items, list) else None


def _split_off_files(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the other words, the files of options)"""
    others: list[str] = []
    files: list[str] = []
    is_file = False
    for index, word in enumerate(words):
        if word == "--":
            return [*others, *words[index:]], files
        if is_file and not word.startswith("--"):
            files.append(word)
            is_file = False
        elif word.startswith(f"{CONFIG}="):
            files.append(word.partition("=")[2])
        else:
            is_file = word == CONFIG and index + 1 < len(words) and not words[index + 1].startswith("--")
            others += [] if is_file else [word]
    return others, files


def _stand_alone(words: Sequence[str], known: Sequence[Option]) -> list[int]:
    """Where words stand that belong to no option."""
    rooms = {option.word: option.room for option in known if not option.is_positional}
    alone: list[int] = []
    room = 0.0
    for index, word in enumerate(words):
        if word.startswith("--"):
            name, equals, _ = word.partition("=")
            room = 0 if equals else rooms.get(name, 0)
        elif room > 0:
            room -= 1
        else:
            alone.append(index)
    return alone


def _swallowed_first(words: list[str], known: Sequence[Option], needed: Sequence[str]) -> list[str]:
    """With a positional argument that an option of several words has swallowed in the first place, if it can be told."""
    end = words.index("--") if "--" in words else len(words)
    missing = len(needed) - len(_stand_alone(words[:end], known)) - len(words[end + 1 :])
    if missing != 1:
        return words
    several = {option.word for option in known if option.item is not None}
    starts = [index for index in range(end) if words[index] in several]
    ends = [next((after for after in range(start + 1, end) if words[after].startswith("--")), end) - 1 for start in starts]
    last = [index for start, index in zip(starts, ends, strict=True) if index - start >= 2]
    if len(last) > 1:
        last = [index for index in last if Path(words[index], "config.json").is_file()]
    if len(last) != 1:
        return words
    return [words[last[0]], *words[: last[0]], *words[last[0] + 1 :]]


def _words_of_file(path: str, known: Sequence[Option], refuse: Callable[[str], NoReturn]) -> dict[str, list[str]]:
    """The options of a file as words, by the option that they begin with (a positional argument: by its word)."""
    try:
        data = strict_yaml.load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as e:
        refuse(f"--config {path} cannot be read: {strict_yaml.problem(e)}")
    except (OSError, UnicodeDecodeError) as e:
        refuse(f"--config {path} cannot be read: {first_line(e)}")
    if not isinstance(data, Mapping):
        refuse(f"--config {path} holds {type(data).__name__}: expected options, such as 'pattern: \"2:4\"'.")
    by_name = {option.name: option for option in known}
    found = {}
    for key, value in data.items():
        option = by_name.get(str(key).replace("-", "_"))
        if option is None:
            refuse(f"--config {path}: there is no option {key!r}.{nearest(str(key), by_name)}")
        if value is not None and value != []:
            found[option.word] = _words_of(option, value, partial(_refuse_key, refuse, f"--config {path}: {key}: "))
    return found


def _refuse_key(refuse: Callable[[str], NoReturn], where: str, text: str) -> NoReturn:
    refuse(where + text)


def _words_of(option: Option, value: Any, refuse: Callable[[str], NoReturn]) -> list[str]:
    if option.kind is bool:
        if not isinstance(value, bool):
            refuse(f"{value}: expected true or false.")
        return [option.word] if value else []
    if isinstance(value, list) and option.item is None:
        refuse(f"{value}: expected {option.expected}, and not a list.")
    words = [_word(option, item, refuse) for item in (value if isinstance(value, list) else [value])]
    if option.is_positional:
        return words
    return [f"{option.word}={words[0]}"] if len(words) == 1 and words[0].startswith("-") else [option.word, *words]


def _word(option: Option, value: Any, refuse: Callable[[str], NoReturn]) -> str:
    if isinstance(value, Mapping | list):
        if isinstance(value, list) or not any("dict" in str(kind) for kind in option.kinds):
            refuse(f"{value}: expected {option.expected}.")
        return json.dumps(value)
    if not isinstance(value, str) and ({int, float}.isdisjoint(option.kinds) or isinstance(value, bool)):
        hint = "" if isinstance(value, bool) else ": an unquoted 2:4 is the number 124 to YAML"
        refuse(f"{value} is no text, but {type(value).__name__} to YAML{hint}. Quote it, as in 'pattern: \"2:4\"'.")
    return str(value)
