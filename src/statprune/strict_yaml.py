"""YAML of small files that people write: nothing is guessed, no code runs, and no text brings the reader down.

A key that is there twice is an error, where YAML lets the last one win without a word. So are nesting and repetition (aliases)
that are there to harm. What cannot be read is always a yaml.YAMLError, which has the line.
"""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

DEEPEST = 32
"""How deep lists and mappings may be nested."""

LARGEST = 100_000
"""How many values a text may hold, those that an alias repeats counted each time."""

_MERGE = "tag:yaml.org,2002:merge"

_Read = TypeVar("_Read")


class YamlLoader(yaml.SafeLoader):
    """Strict YAML, in which 1e-8 is a number; YAML 1.1 asks for a dot, 1.0e-8, and reads the rest as text."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """A node and what is in it."""
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {DEEPEST} levels", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> Node | None:
        """The whole document."""
        node = super().get_single_node()
        if node is not None:
            _size(node, {})
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, each of whose keys is there once."""
        seen: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, MappingNode) else ():
            if not isinstance(key_node, ScalarNode):
                continue  # no key can be a list or a mapping, and the loader says so
            key = _MERGE if key_node.tag == _MERGE else self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is there twice; leave one out", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class YamlDumper(yaml.SafeDumper):
    """Quotes the text that YamlLoader would take for a number."""


for _kind in (YamlLoader, YamlDumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def _unless(tag: str, construct: Callable[[YamlLoader, Any], _Read]) -> Callable[[YamlLoader, Any], _Read]:
    """The constructor, whose own complaint about a text (`2026-99-99` is no day) becomes one that has the line."""

    def constructed(loader: YamlLoader, node: Node) -> _Read:
        try:
            return construct(loader, node)
        except (ValueError, OverflowError, LookupError, AttributeError) as e:  # a tag such as !!timestamp on any text, too
            shown = str(node.value)[:40]
            raise yaml.constructor.ConstructorError(None, None, f"{shown!r} is no {tag}: {e}", node.start_mark) from e

    return constructed


for _tag in ("int", "float", "timestamp", "bool", "binary"):
    _full = f"tag:yaml.org,2002:{_tag}"
    YamlLoader.add_constructor(_full, _unless(_tag, YamlLoader.yaml_constructors[_full]))


def load(text: str) -> Any:
    """The plain data that a YAML text stands for; None for an empty one.

    Raises:
        yaml.YAMLError: it is no YAML of one document, a key is there twice, it is nested deeper than `DEEPEST`, refers to
            itself or repeats itself beyond `LARGEST` values, or asks for an object of Python. The message has the line.
    """
    return yaml.load(text, Loader=YamlLoader)


def problem(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML text, and in which line, in one line."""
    text = getattr(error, "problem", None) or next((line for line in str(error).splitlines() if line.strip()), "no YAML")
    mark = getattr(error, "problem_mark", None)
    return f"{text}, line {mark.line + 1}" if mark is not None else text


def _size(node: Node, known: dict[Node, int | None]) -> int:
    """How many values there are in it, aliases written out."""
    if node in known:
        size = known[node]
        if size is None:
            raise yaml.composer.ComposerError(None, None, "a value that holds itself", node.start_mark)
        return size
    known[node] = None
    children = (
        [part for pair in node.value for part in pair]
        if isinstance(node, MappingNode)
        else node.value
        if isinstance(node, SequenceNode)
        else []
    )
    size = 1 + sum(_size(child, known) for child in children)
    if size > LARGEST:
        raise yaml.composer.ComposerError(None, None, f"more than {LARGEST:,} values, aliases written out", node.start_mark)
    known[node] = size
    return size
