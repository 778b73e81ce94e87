import pytest

from cluster.json_lines import json_lines, parse_json


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "malformed JSON"),
        (b'{"a":', "malformed JSON"),
        (b"[NaN]", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        (b'{"b": {"a": 1, "a": 1}}', "the key 'a' twice"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"1" * 5000, "thousands of digits"),
        (b'"\xff"', "not UTF-8 \\(byte 1\\)"),
        (b"{" + b",".join(b'"%d":0' % n for n in range(10_001)) + b"}", "10001 keys"),
    ],
)
def test_json_that_python_misreads_is_refused_with_its_reason(content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refusal:
        parse_json(content)
    assert len(str(refusal.value)) < 200


def test_json_is_read_as_it_is() -> None:
    content = b'\xef\xbb\xbf {"a": [1, 2.5, null, true, "\xc3\xa9 \\u00e9"], "b": {}} '
    assert parse_json(content) == {"a": [1, 2.5, None, True, "é é"], "b": {}}


def test_lines_end_at_line_feeds_alone_and_are_numbered() -> None:
    content = '\ufeff{"a": "x\x85y\u2028z"}\r\n\n  \n{"a": 2}'.encode()
    assert list(json_lines(content, "f")) == [
        ("f:1", {"a": "x\x85y\u2028z"}),
        ("f:4", {"a": 2}),
    ]


def test_line_that_is_no_text_is_a_reject_and_the_next_is_read() -> None:
    lines = [b'{"a": "\\ud83d"}', b'"\\ud83e\\udd8e"', b"{", b"\xff", b"[" * 200_000, b"[1]"]
    lines += [b"[" * 900 + b'"\\u0061"' + b"]" * 900, b"2"]
    found = list(json_lines(b"\n".join(lines), "f"))
    reasons = {row[0]: row[1] for row in found if len(row) == 3}
    assert reasons["f:1"] == "half of a surrogate pair, which is no character"
    assert reasons["f:3"] == "malformed JSON"
    assert reasons["f:4"] == "not UTF-8"
    assert reasons["f:5"] == "JSON nested too deeply"
    assert [row for row in found if len(row) == 2 and row[0] != "f:7"] == [
        ("f:2", "🦎"),
        ("f:6", [1]),
        ("f:8", 2),
    ]
    assert all(len(row[2]) <= 200 for row in found if len(row) == 3)
