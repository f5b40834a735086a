"""The YAML reader: what it reads, what it refuses, and that nothing makes it slow or raises."""

import functools
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.strict_yaml import MAX_BYTES, MAX_DEPTH, MAX_NODES, dump, format_path, parse, parse_path

TIMES = 3  # "rejected fast": of what the largest allowed document takes here and now, slow machine and coverage or not


@functools.cache
def longest_s() -> float:
    """Processor seconds of reading a document with as many values as are allowed."""
    started = time.process_time()
    assert parse("[" + "1," * (MAX_NODES - 1) + "]").faults == ()
    return time.process_time() - started


def value_of(text: str | bytes) -> object:
    document = parse(text)
    assert document.faults == ()
    return document.value


def fault_texts(text: str | bytes) -> list[str]:
    started = time.process_time()
    faults = parse(text).faults
    assert time.process_time() - started < TIMES * longest_s()
    assert faults
    assert all(len(fault.text) < 300 for fault in faults)
    return [f"{fault.line}: {format_path(fault.path)}: {fault.text}" for fault in faults]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("+7", 7),
        ("0o17", 15),
        ("017", 17),
        ("0x1F", 31),
        ("1_000", "1_000"),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("12:30:00", "12:30:00"),
        ("2026-01-31", "2026-01-31"),
        ("~", None),
        ("null", None),
        ("none", "none"),
        ("0.4x", "0.4x"),
        ("'1e-3'", "1e-3"),
        ('"true"', "true"),
        ("0b11", "0b11"),
        ("=", "="),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, expected: object) -> None:
    value = value_of(f"key: {text}")
    assert value == {"key": expected}
    assert isinstance(value, dict)
    assert type(value["key"]) is type(expected)


def test_nan_is_read_so_that_validation_can_refuse_it() -> None:
    value = value_of("[.nan]")
    assert isinstance(value, list)
    assert math.isnan(value[0])


def test_keys_are_text_whatever_they_look_like() -> None:
    assert value_of("no: 1\n1: 2\ntrue: 3\n'': 4") == {"no": 1, "1": 2, "true": 3, "": 4}


def test_every_key_and_item_has_its_line() -> None:
    lines = parse("a: 1\nb:\n  - x\n  - {c: 2,\n     d: 3}\n").lines
    assert lines == {
        ("a",): 1,
        ("b",): 2,
        ("b", 0): 3,
        ("b", 1): 4,
        ("b", 1, "c"): 4,
        ("b", 1, "d"): 5,
    }


def test_a_byte_order_mark_and_windows_lines_are_read() -> None:
    assert value_of(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n") == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "1: : is empty"),
        ("# only a comment\n", "1: : is empty"),
        ("---\n...\n", "1: : is empty"),
        ("a: 1\n---\nb: 2\n", "2: : holds a second document"),
        ("a: &x 1\n", "1: a: found the anchor &x, which recipes do not allow"),
        ("a: *x\n", "1: a: found the alias *x, which recipes do not allow; write the value out, or quote it"),
        ("a:\n  <<: {b: 1}\n", "2: a: found the merge key <<"),
        ("a: !!python/object/apply:os.system [id]\n", "1: a: found the tag 'tag:yaml.org,2002:python/object/apply:os"),
        ("a: !!str 1\n", "1: a: found the tag"),
        ("a: ! 1\n", "1: a: found the tag '!'"),
        ("a: 1\nb: 2\na: 3\n", "3: a: found a second time, first on line 1"),
        ("? [a, b]\n: 1\n", "1: : found a list or mapping as a key"),
        ("? {a: b}\n: 1\n", "1: : found a list or mapping as a key"),
        ("? \n: 1\n", "found an empty key"),
        ("&k a: 1\n", "1: : found the anchor &k"),
        ("%TAG ! tag:x,2000:\n---\na: 1\n", "1: : holds a %TAG or %YAML 1.1 directive"),
        ("%YAML 1.1\n---\na: 1\n", "1: : holds a %TAG or %YAML 1.1 directive"),
        ("a:\n\tb: 1\n", "2: : is not YAML: while scanning for the next token, found character '\\t'"),
        ("a: [*.conv]\n", "quote a value that starts with *"),
        ("a: &\n", "quote a value that starts with &"),
        ("a: b: c\n", "does a value with ': ' need quotes?"),
        ("a: 'open\n", "is not YAML: while scanning a quoted scalar"),
        ("a: [1, 2\n", "is not YAML: while parsing a flow sequence"),
        ("a: " + "9" * 5000, "1: a: found an integer of 5000 digits"),
        (b"a: \xff\xfe\n", "1: : is not UTF-8 text"),
        ("a: \udcff", "1: : is not valid Unicode text"),
        (b"a: 1\n\x00\x01\x02", "2: : holds the control character"),
        (b"\x7fELF\x02\x01\x01\x00", "1: : holds the control character"),
        (b"\x89PNG\r\n\x1a\n", "1: : is not UTF-8 text"),
    ],
)
def test_traps_are_refused_with_line_and_reason(text: str | bytes, expected: str) -> None:
    assert expected in "\n".join(fault_texts(text))


def test_several_faults_are_noted_at_once_and_the_rest_is_read() -> None:
    document = parse("a: 1\na: {b: 2}\nc: *x\nd: !t 4\ne: 5\n")
    assert [fault.line for fault in document.faults] == [2, 3, 4]
    assert document.value == {"a": 1, "c": None, "d": 4, "e": 5}
    assert ("a", "b") not in document.lines


def test_yaml_1_2_may_say_so() -> None:
    assert value_of("%YAML 1.2\n---\na: 1\n") == {"a": 1}


def nested_mappings(levels: int) -> str:
    return "\n".join(" " * level + "a:" for level in range(levels))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 2000 + "]" * 2000, "nested deeper than"),
        ("[" * 200_000, "nested deeper than"),
        ("{a: " * 2000, "nested deeper than"),
        ("- " * 2000 + "x", "nested deeper than"),
        ("? " * 2000 + "x", "nested deeper than"),
        (nested_mappings(300), "nested deeper than"),
        ("[" + "1," * 100_000 + "]", f"more than {MAX_NODES} values"),
        ("a: " + "x" * MAX_BYTES, "larger than 256 KiB"),
        ("%YAML 1." + "1" * 5000 + "\n---\na: 1", "is not YAML"),
    ],
)
def test_hostile_sizes_are_rejected_fast(text: str, expected: str) -> None:
    assert expected in "\n".join(fault_texts(text))


def test_an_alias_bomb_is_rejected_without_expansion() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for here, before in zip("bcdefghi", "abcdefgh", strict=True):
        bomb += f"{here}: &{here} [{', '.join(['*' + before] * 9)}]\n"
    assert "alias *a" in "\n".join(fault_texts(bomb))
    assert len(str(parse(bomb).value)) < 2000


def test_the_deepest_allowed_nesting_is_read() -> None:
    levels = MAX_DEPTH - 1
    value = value_of("[" * levels + "x" + "]" * levels)
    for _ in range(levels):
        assert isinstance(value, list)
        value = value[0]
    assert value == "x"


@given(st.binary(max_size=200))
def test_no_bytes_make_it_raise(data: bytes) -> None:
    parse(data)


@given(st.text(alphabet="ab:- \n[]{},&*!|>'\"%@`#?<\t.1xe~", max_size=60))
def test_no_yaml_like_text_makes_it_raise(text: str) -> None:
    parse(text)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=20) | st.sampled_from(
    [
        "1e-3",
        "no",
        "on",
        "~",
        "0o17",
        "null",
        "<<",
        "*x",
        "&x",
        "!x",
        "12:30:00",
        "0.4x",
        "=",
        "- a",
        "a: b",
        "#",
        "007",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.floats(allow_nan=False) | TEXT
PLAIN = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)


@given(st.dictionaries(TEXT, PLAIN, min_size=1, max_size=5))
def test_what_is_dumped_is_read_back_equal_in_value_and_type(value: dict[str, object]) -> None:
    read = parse(dump(value))
    assert read.faults == ()
    assert repr(read.value) == repr(value)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("seed", ("seed",)),
        ("stages[1].epochs", ("stages", 1, "epochs")),
        ("input.size[0]", ("input", "size", 0)),
        ('stages[1].widths["block1.*"]', ("stages", 1, "widths", "block1.*")),
        ('a["with \\" quote"]', ("a", 'with " quote')),
    ],
)
def test_key_paths_are_read_and_written_alike(text: str, path: tuple[str | int, ...]) -> None:
    assert parse_path(text) == path
    assert format_path(path) == text


@given(st.lists(TEXT | st.integers(0, 999), min_size=1, max_size=5))
def test_any_key_path_survives_a_round_trip(parts: list[str | int]) -> None:
    assert parse_path(format_path(tuple(parts))) == tuple(parts)


@pytest.mark.parametrize("text", ["", ".a", "a.", "a..b", "a[1", "a[x]", "a b", "a[1]b", "a[-1]", "1"])
def test_what_is_no_key_path_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a key path such as"):
        parse_path(text)
