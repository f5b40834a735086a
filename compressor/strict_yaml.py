"""Read and write the small, safe part of YAML 1.2 that recipes use.

Invariant: whatever the bytes, `parse` returns within a second or two and never raises, never expands an alias, never
builds anything but None, bool, int, float, str, list and dict; what it refuses is listed in `Document.faults`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
    StreamStartEvent,
)

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
# PyYAML's pure Python scanner takes about 25 us an event. libyaml is faster but words its errors differently, and
# builds without it exist: one parser everywhere keeps messages and tests the same.
MAX_NODES = 20_000
MAX_FAULTS = 50
MAX_DIGITS = 18  # every such integer fits 64 bits

KeyPath: TypeAlias = tuple[str | int, ...]

# YAML 1.2.2, section 10.3.2, the core schema. PyYAML's own resolver is YAML 1.1, where `no` is false, `1e-3` a string
# and `12:30:00` the number 45000.
_NULL = re.compile(r"(null|Null|NULL|~|)\Z")
_TRUE = re.compile(r"(true|True|TRUE)\Z")
_FALSE = re.compile(r"(false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?[0-9]+\Z")
_OCTAL = re.compile(r"0o[0-7]+\Z")
_HEX = re.compile(r"0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_INF = re.compile(r"[-+]?(\.inf|\.Inf|\.INF)\Z")
_NAN = re.compile(r"(\.nan|\.NaN|\.NAN)\Z")

_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_PATH_TOKEN = re.compile(
    r'\.?(?P<name>[A-Za-z_][A-Za-z0-9_-]*)|\[(?P<index>[0-9]{1,9})\]|\[(?P<quoted>"(?:[^"\\]|\\.)*")\]'
)


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: its line (from 1), the key path it stands under, and what to do about it."""

    line: int
    path: KeyPath
    text: str


@dataclass(frozen=True)
class Document:
    """Plain data, the line of every key and list item, and what was refused (left out of `value`)."""

    value: object
    lines: Mapping[KeyPath, int]
    faults: tuple[Fault, ...]


class _StopError(Exception):
    """Nothing after this point can be read; the fault is already noted."""


def format_path(path: KeyPath) -> str:
    """Write a key path the way recipes, errors and `--set` spell it: `stages[1].widths["block1.*"]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _PLAIN_NAME.fullmatch(part):
            text += f".{part}" if text else part
        else:
            text += f"[{json.dumps(part)}]"
    return text


def parse_path(text: str) -> KeyPath:
    """Read what `format_path` writes.

    Raises:
        ValueError: The text is not a key path.
    """
    path: list[str | int] = []
    at = 0
    while at < len(text) or not path:
        match = _PATH_TOKEN.match(text, at)
        dotted = match is not None and match.group().startswith(".")
        if match is None or (match["name"] is not None and dotted != bool(path)):
            raise ValueError(f"{text!r} is not a key path such as stages[1].epochs")
        if match["name"] is not None:
            path.append(match["name"])
        elif match["index"] is not None:
            path.append(int(match["index"]))
        else:
            path.append(str(json.loads(match["quoted"])))
        at = match.end()
    return tuple(path)


def resolve_scalar(text: str) -> bool | int | float | str | None:
    """Return the value of an unquoted scalar by YAML 1.2's core schema.

    Raises:
        ValueError: A number too long to mean anything.
    """
    if _NULL.match(text):
        return None
    if _TRUE.match(text) or _FALSE.match(text):
        return text[0] in "tT"
    for pattern, base in ((_INT, 10), (_OCTAL, 8), (_HEX, 16)):
        if pattern.match(text):
            if len(text.lstrip("+-")) > MAX_DIGITS:
                raise ValueError(f"an integer of {len(text)} digits; the limit is {MAX_DIGITS}")
            return int(text, base)
    if _FLOAT.match(text):
        return float(text)
    if _INF.match(text):
        return float(text.replace(".", ""))
    return float("nan") if _NAN.match(text) else text


def parse(data: bytes | str) -> Document:
    """Parse one YAML document, noting every fault rather than stopping at the first where that is possible."""
    if len(data) > MAX_BYTES:
        return _refused(1, f"is larger than {MAX_BYTES // 1024} KiB, the limit for a recipe")
    try:
        # A surrogate in a str comes from undecodable bytes on the command line.
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data.encode().decode()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        return _refused(line, "is not UTF-8 text; save it as UTF-8")
    except UnicodeEncodeError:
        return _refused(1, "is not valid Unicode text")
    return _Parser(text).document()


def dump(value: object) -> str:
    """Write plain data as block YAML that `parse` reads back as equal data."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _refused(line: int, text: str) -> Document:
    return Document(None, {}, (Fault(line, (), text),))


def _line(event: Event) -> int:
    return event.start_mark.line + 1 if event.start_mark is not None else 1


class _Parser:
    """Builds the data from parse events, so that nothing is ever composed, constructed or expanded by PyYAML."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines: dict[KeyPath, int] = {}
        self.faults: list[Fault] = []
        self.nodes = 0

    def document(self) -> Document:
        value: object = None
        try:
            self.events: Iterator[Event] = yaml.parse(self.text, Loader=yaml.SafeLoader)
            value = self._document()
        except _StopError:
            pass
        except yaml.reader.ReaderError as error:
            line = self.text[: error.position].count("\n") + 1
            self.faults.append(Fault(line, (), f"holds the control character {error.character!r}; is it a text file?"))
        except yaml.MarkedYAMLError as error:
            self.faults.append(_syntax_fault(error))
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a %YAML version with thousands of digits
            self.faults.append(Fault(1, (), f"is not YAML: {error}"[:200]))
        return Document(value, self.lines, tuple(self.faults))

    def _document(self) -> object:
        value: object = None
        documents, empty = 0, True
        for event in self.events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self._stop(event, (), "holds a second document (`---`); one recipe per file")
                if event.version not in (None, (1, 2)) or event.tags:
                    self._note(event, (), "holds a %TAG or %YAML 1.1 directive; remove it")
                content = next(self.events)
                empty = isinstance(content, ScalarEvent) and not content.value and content.style is None
                value = self._node(content, (), 1)
            elif isinstance(event, StreamEndEvent) and empty and not self.faults:
                self._stop(event, (), "is empty", line=1)
            elif not isinstance(event, StreamStartEvent):
                continue
        return value

    def _note(self, event: Event, path: KeyPath, text: str, line: int | None = None) -> None:
        self.faults.append(Fault(line or _line(event), path, text))
        if len(self.faults) >= MAX_FAULTS:
            raise _StopError

    def _stop(self, event: Event, path: KeyPath, text: str, line: int | None = None) -> None:
        self._note(event, path, text, line)
        raise _StopError

    def _node(self, event: Event, path: KeyPath, depth: int) -> object:
        """Build the node that `event` starts; the faults noted for it tell the caller to leave it out."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            self._stop(event, (), f"holds more than {MAX_NODES} values, the limit for a recipe")
        if depth > MAX_DEPTH:
            self._stop(event, path[:3], f"is nested deeper than {MAX_DEPTH} levels, the limit for a recipe")
        if isinstance(event, AliasEvent):
            hint = f"write the value out, or quote it if '*{event.anchor}' is meant as text"
            self._note(event, path, f"found the alias *{event.anchor}, which recipes do not allow; {hint}")
            return None
        assert isinstance(event, ScalarEvent | SequenceStartEvent | MappingStartEvent)
        if event.anchor is not None:
            self._note(event, path, f"found the anchor &{event.anchor}, which recipes do not allow; remove it")
        if event.tag is not None:
            self._note(event, path, f"found the tag {event.tag!r:.60}, which recipes do not allow; remove it")
        if isinstance(event, ScalarEvent):
            return self._scalar(event, path)
        if isinstance(event, SequenceStartEvent):
            return self._sequence(path, depth)
        return self._mapping(path, depth)

    def _scalar(self, event: ScalarEvent, path: KeyPath) -> object:
        text: str = event.value
        if event.style is not None:
            return text
        try:
            return resolve_scalar(text)
        except ValueError as error:
            self._note(event, path, f"found {error}")
            return None

    def _sequence(self, path: KeyPath, depth: int) -> list[object]:
        items: list[object] = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            here = (*path, len(items))
            self.lines[here] = _line(event)
            items.append(self._node(event, here, depth + 1))
        return items

    def _mapping(self, path: KeyPath, depth: int) -> dict[str, object]:
        mapping: dict[str, object] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            key = self._key(event, path, depth)
            if key is None or key in mapping:
                here = path if key is None else (*path, key)
                if key is not None:
                    first = self.lines[here]
                    self._note(event, here, f"found a second time, first on line {first}; keep one of the two")
                # The value still has to be read past, but its lines must not displace those of what is kept.
                kept, self.lines = self.lines, {}
                self._node(next(self.events), here, depth + 1)
                self.lines = kept
            else:
                here = (*path, key)
                self.lines[here] = _line(event)
                mapping[key] = self._node(next(self.events), here, depth + 1)
        return mapping

    def _key(self, event: Event, path: KeyPath, depth: int) -> str | None:
        """Return a key as text (`no` and `1` are text here), or None with a fault noted."""
        if not isinstance(event, ScalarEvent) or event.anchor is not None or event.tag is not None:
            kept, self.lines = self.lines, {}
            self._node(event, path, depth + 1)
            self.lines = kept
            if isinstance(event, SequenceStartEvent | MappingStartEvent):
                self._note(event, path, "found a list or mapping as a key; keys are plain text")
            return None
        key: str = event.value
        if event.style is None and key == "<<":
            self._note(event, path, "found the merge key <<, which recipes do not allow; use `extends` or write it out")
            return None
        if event.style is None and not key:
            self._note(event, path, "found an empty key")
            return None
        return key


def _syntax_fault(error: yaml.MarkedYAMLError) -> Fault:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark is not None else 1
    words = ", ".join(part for part in (error.context, error.problem) if part)
    if "'\\t'" in words:
        words += "; indent with spaces, not tabs"
    elif "alias" in words:
        words += "; quote a value that starts with *"
    elif "anchor" in words:
        words += "; quote a value that starts with &"
    elif "mapping values are not allowed" in words:
        words += "; is a line indented wrongly, or does a value with ': ' need quotes?"
    return Fault(line, (), f"is not YAML: {words}")


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what YAML 1.2 would read as something else (PyYAML writes the string `1e-3` bare)."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        ambiguous = not isinstance(resolve_scalar(text), str)
    except ValueError:
        ambiguous = True
    # Line breaks of Unicode (U+0085, U+2028, ...) are folded to a space unless they are escaped.
    quote = "'" if ambiguous else None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=quote)


_Dumper.add_representer(str, _represent_str)
