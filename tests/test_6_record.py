"""Station 6, record: the results file loses nothing and does nothing twice."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import api_request_parallel_processor as program
from api_request_parallel_processor import ResultsFile, ResultsLost, UsageError, dumps, identity, loads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

POSIX_ONLY = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")

# Text with lone surrogates; a high one right before a low one is no JSON text, it would be read as one character.
texts = st.text(st.characters(exclude_categories=[]), max_size=8).filter(
    lambda text: not any("\ud800" <= a <= "\udbff" and "\udc00" <= b <= "\udfff" for a, b in itertools.pairwise(text))
)
numbers = (
    st.integers(-(10**40), 10**40) | st.integers(-(2**66), 2**66) | st.floats(allow_nan=False, allow_infinity=False)
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@contextlib.contextmanager
def without_orjson() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "orjson", None)
        yield


@pytest.fixture(params=["as installed", "standard library"])
def either_json(request: pytest.FixtureRequest) -> Iterator[None]:
    with without_orjson() if request.param == "standard library" else contextlib.nullcontext():
        yield


def exactly(value: Any) -> str:
    """A text that tells 1 from 1.0 and 0.0 from -0.0."""
    return repr(value)


def ask(number: int) -> dict[str, Any]:
    return {"model": "m", "input": f"question {number}"}


def answer(number: int) -> dict[str, Any]:
    return {"data": [number]}


def line(*row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


def success(number: int, *more: Any) -> bytes:
    return line(ask(number), answer(number), *more)


def failure(number: int, *more: Any) -> bytes:
    return line(ask(number), [{"attempt": 1, "kind": "server_error"}], *more)


def rows(path: Path) -> list[Any]:
    """All rows; fails on a torn or blank line."""
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(one) for one in data.splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


@pytest.fixture
def opened() -> Iterator[Callable[..., ResultsFile]]:
    """Opens results files and closes them in the end."""
    with contextlib.ExitStack() as stack:

        def open_results(path: Path, *arguments: Any, **options: Any) -> ResultsFile:
            results = ResultsFile(str(path), *arguments, **options)
            stack.callback(results.close)
            return results

        yield open_results


def run(
    path: Path, numbers: list[int], failing: tuple[int, ...] = (), *, limit: int = 0, **options: Any
) -> ResultsFile:
    """A whole run over a request file with these numbers."""
    results = ResultsFile(str(path), **options)
    for number in numbers[: limit or None]:
        if not results.take(identity(ask(number), None)):
            results.write(ask(number), [{"attempt": 1}] if number in failing else answer(number))
            results.flush()
    results.finish(whole=True, limited=bool(limit))
    return results


# ---- JSON


@given(values)
def test_json_round_trip(value: Any) -> None:
    """Every JSON value comes back exactly, with orjson, without it, and across."""
    written = [dumps(value)]
    with without_orjson():
        written.append(dumps(value))
        for data in written:
            assert exactly(loads(data)) == exactly(value)
    for data in written:
        assert b"\n" not in data
        data.decode()
        assert exactly(loads(data)) == exactly(value)


@given(values, st.data())
@settings(max_examples=200)
def test_json_damaged(value: Any, data: st.DataObject) -> None:
    """Damaged JSON is refused or read alike with and without orjson, never anything but a ValueError."""
    text = bytearray(json.dumps(value, ensure_ascii=data.draw(st.booleans())).encode(errors="surrogatepass"))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(text)))
        text[at : at + data.draw(st.integers(0, 1))] = data.draw(
            st.sampled_from(
                [
                    b"",
                    b'"',
                    b"1",
                    b"e",
                    b"999",
                    b"\xff",
                    b"[",
                    b"-",
                    b".",
                    b"\xed\xa0\x80",
                    b"\0",
                    b"NaN",
                    b"\xef\xbb\xbf",
                ]
            )
        )
    read = []
    for context in (contextlib.nullcontext(), without_orjson()):
        with context:
            try:
                read.append(exactly(loads(bytes(text))))
            except ValueError as error:
                read.append(str(error))
    assert read[0] == read[1]


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "[Infinity]",
        "-Infinity",
        "1e400",
        "-1e999",
        "[1e0400]",
        "9" * 400 + ".0",
        '{"a": 1',
        "",
        "[1]]",
        "01",
        "'a'",
        '"\n"',
        "\ufeff{}",
    ],
)
def test_json_refuses(either_json: None, text: str) -> None:
    """What is no strict JSON, or a float beyond a double, is a ValueError."""
    for data in (text, text.encode()):
        with pytest.raises(ValueError, match=r".") as caught:
            loads(data)
        assert type(caught.value) is ValueError
        assert "line 1" not in str(caught.value)


def test_json_refuses_bad_utf8(either_json: None) -> None:
    """Bytes that are no UTF-8 are a ValueError, encoded surrogates too."""
    for data in (b'"\xff"', b'"\xed\xa0\x80"', b'"\xc3"'):
        with pytest.raises(ValueError, match="utf-8"):
            loads(data)


@pytest.mark.parametrize(
    "text",
    [
        "18446744073709551615", "18446744073709551616", "-9223372036854775809", "[1,12345678901234567890123]",
        '{"a": 123456789012345678901234567890}', "[ 1234567890123456789012]", "[\n1234567890123456789012]",
        "0.12345678901234567890123", "12345678901234567890.5", "1e2", "-0", "-0.0", "5e-324", "1e-400",
    ],
)  # fmt: skip
def test_json_numbers(either_json: None, text: str) -> None:
    """Integers of any size are exact, floats the nearest double."""
    assert exactly(loads(text)) == exactly(loads(text.encode())) == exactly(json.loads(text))


def test_long_integers_anywhere(either_json: None) -> None:
    """An integer beyond 64 bits is exact wherever in the line it begins."""
    for before in range(9):
        for number in (2**63, -(2**63) - 1, 2**64, 10**20 + 1, 10**40 + 7):
            assert exactly(loads(f'["{"x" * before}", {number}]')) == exactly(["x" * before, number])


def test_json_nesting(either_json: None) -> None:
    """What is nested too deep is refused alike; what can be read can be written and recognised."""
    quoted = rb'{"a": "\\", "b[": "\"[\\\"[", "": ["]"]}'
    assert loads(b"[" * 498 + quoted + b"]" * 498)
    assert loads(b"[" + b",".join([quoted] * 2000) + b"]") == [loads(quoted)] * 2000
    deep: Any = json.loads("[" * 499 + "]" * 499)
    assert loads(dumps(deep)) == deep
    assert dumps([deep, {"a": [deep]}, None])
    assert identity({"a": deep}, deep) == identity({"a": deep}, deep)
    for depth in (501, 1000, 100_000):
        for opening, closing in (("[", "]"), ('{"a":', "}")):
            with pytest.raises(ValueError, match="nested too deep"):
                loads((opening * depth + "1" + closing * depth).encode())
    wide = [{"a": [1, {}]}] * 2000
    assert loads(dumps(wide)) == wide
    assert loads(dumps("[{" * 5000)) == "[{" * 5000


@given(values, st.integers(1, 4))
def test_json_nesting_is_counted_right(value: Any, most: int) -> None:
    """Brackets in strings do not count as nesting, whatever quotes and backslashes stand around them."""

    def depth(node: Any) -> int:
        inner = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    value = [value, {'[{\\"': '\\[\\"{', "\\": '"['}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "MAX_NESTING", most)
        with pytest.raises(ValueError, match="deep") if depth(value) > most else contextlib.nullcontext():
            loads(dumps(value))


def test_dumps_without_help(either_json: None) -> None:
    """A value that only Python can make is never written as broken JSON."""
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="Circular"):
        dumps(endless)
    with contextlib.suppress(ValueError):
        assert dumps(math.nan) == b"null"


def test_json_long_integers(either_json: None) -> None:
    """An integer is as long as Python was told to allow, far beyond what it allows by itself."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(100_000)
    try:
        text = b"[" + b"7" * 100_000 + b"," + b"-" + b"7" * 100_000 + b"]"
        assert dumps(loads(text)) == text
        with pytest.raises(ValueError, match="limit"):
            loads(b"7" * 100_001)
    finally:
        sys.set_int_max_str_digits(before)


# ---- identity


def shuffled(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict):
        items = [(key, shuffled(item, rng)) for key, item in value.items()]
        rng.shuffle(items)
        return dict(items)
    return [shuffled(item, rng) for item in value] if isinstance(value, list) else value


@given(st.dictionaries(texts, values, max_size=4), values, st.randoms(use_true_random=False))
def test_identity_ignores_order_of_keys(body: Any, metadata: Any, rng: random.Random) -> None:
    """A request is recognised whatever the order of its keys, also after a round trip through the file."""
    other = shuffled(body, rng)
    again = loads(json.dumps(other, indent=1))
    assert identity(body, metadata) == identity(other, metadata) == identity(again, loads(dumps(metadata)))
    with without_orjson():
        assert identity(body, metadata) == identity(other, metadata) == identity(loads(dumps(other)), metadata)


@given(values, values)
def test_identity_differs(one: Any, two: Any) -> None:
    """Different JSON values have different identities, with and without orjson."""
    same = json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True)
    assert (identity(one, None) == identity(two, None)) == same
    with without_orjson():
        assert (identity(one, None) == identity(two, None)) == same


def test_identity_corners(either_json: None) -> None:
    """1 and 1.0 differ, 1e2 is 100.0, body and metadata do not mix, true is not 1."""
    assert identity({"a": 1}, None) != identity({"a": 1.0}, None)
    assert identity({"a": True}, None) != identity({"a": 1}, None)
    assert identity(loads(b'{"a": 1e2}'), None) == identity(loads(b'{"a": 100.0}'), None)
    assert identity({"a": 1}, {"b": 2}) != identity({"b": 2}, {"a": 1})
    assert identity({"a": "\ud800", "b": 2**70}, None) == identity({"b": 2**70, "a": "\ud800"}, None)
    assert len(identity("raw text", None)) == 12


# ---- recording and resuming


def test_result_lines(path: Path, opened: Callable[..., ResultsFile]) -> None:
    """A line is [request, response], with metadata if there is any, and with details after metadata or null."""
    results = opened(path)
    results.write({"a": 1}, {"b": 2})
    results.write({"a": 1}, {"b": 2}, 0)
    results.write({"a": 1}, {"b": 2}, {"id": 7}, {"line": 1})
    results.write({"a": "\ud800"}, [{"kind": "bad_line"}], None, {"line": 2})
    assert rows(path) == []
    results.flush()
    assert rows(path) == [
        [{"a": 1}, {"b": 2}],
        [{"a": 1}, {"b": 2}, 0],
        [{"a": 1}, {"b": 2}, {"id": 7}, {"line": 1}],
        [{"a": "\ud800"}, [{"kind": "bad_line"}], None, {"line": 2}],
    ]


def test_resume(path: Path, either_json: None) -> None:
    """Finished requests are not asked again, failed ones are, and their old lines go when the run ends."""
    first = run(path, [1, 2, 3], failing=(2, 3))
    assert (first.finished_before, first.failed_before, first.foreign) == (0, 0, 0)
    assert len(rows(path)) == 3
    second = run(path, [1, 2, 3, 4], failing=(3,))
    assert (second.finished_before, second.failed_before) == (1, 2)
    assert [row[0] for row in rows(path)] == [ask(1), ask(2), ask(3), ask(4)]
    assert isinstance(rows(path)[2][1], list)
    run(path, [4, 3, 2, 1])
    before = path.read_bytes()
    assert all(isinstance(row[1], dict) for row in rows(path))
    run(path, [1, 2, 3, 4])
    assert path.read_bytes() == before


def test_duplicates(path: Path, opened: Callable[..., ResultsFile]) -> None:
    """A request is finished as often as it has successful lines, metadata told apart, absent and null alike."""
    path.write_bytes(success(1) + success(1, None) + success(1, {"id": 1}) + success(2))
    results = opened(path)
    plain, marked = identity(ask(1), None), identity(ask(1), {"id": 1})
    assert [results.take(plain) for _ in range(3)] == [True, True, False]
    assert [results.take(marked) for _ in range(2)] == [True, False]
    results.finish(whole=True)
    assert results.foreign == 1
    assert len(rows(path)) == 4


def test_foreign_results_stay(path: Path) -> None:
    """Successful lines whose request is no longer asked for are kept and counted; failed ones go."""
    path.write_bytes(success(1) + failure(2) + success(3))
    results = run(path, [3])
    assert results.foreign == 1
    assert path.read_bytes() == success(1) + success(3)


def test_unfinished_run_drops_nothing(path: Path, opened: Callable[..., ResultsFile]) -> None:
    """A run that stops early leaves all old lines."""
    path.write_bytes(failure(1) + success(2) + b"rubbish\n")
    before = path.read_bytes()
    results = opened(path)
    results.take(identity(ask(1), None))
    results.write(ask(1), answer(1))
    results.finish(whole=False)
    assert path.read_bytes() == before + dumps([ask(1), answer(1)]) + b"\n"
    assert names(path.parent) == [path.name]


def test_limit_keeps_failures_that_were_not_read(path: Path) -> None:
    """With --limit, failed lines of requests beyond the limit stay."""
    path.write_bytes(failure(1) + failure(2, None) + failure(2) + failure(3, {"id": 3}) + success(4))
    results = run(path, [1, 4, 2, 3], limit=2)
    assert results.foreign == 0
    kept = failure(2, None) + failure(2) + failure(3, {"id": 3}) + success(4)
    assert path.read_bytes() == kept + dumps([ask(1), answer(1)]) + b"\n"


def test_success_and_failure_of_one_request(path: Path) -> None:
    """After an interrupted retry a request has both; at the end of the next run only the success."""
    path.write_bytes(failure(1) + failure(1) + success(1))
    run(path, [1, 2], limit=1)
    assert path.read_bytes() == success(1)


def test_cookbook_results(path: Path) -> None:
    """A results file of the OpenAI cookbook script is a checkpoint."""
    path.write_bytes(
        line(ask(1), answer(1))
        + line(ask(2), ["timeout", {"error": {}}], {"row": 2})
        + line(ask(3), answer(3), {"row": 3})
    )
    results = ResultsFile(str(path))
    assert results.take(identity(ask(1), None))
    assert not results.take(identity(ask(2), {"row": 2}))
    assert results.take(identity(ask(3), {"row": 3}))
    results.close()


def test_unparsable_request_line(path: Path) -> None:
    """The failed line of a request that is raw text is recognised and replaced."""
    path.write_bytes(success(1) + line("{broken", [{"kind": "bad_line"}]))
    results = ResultsFile(str(path))
    assert results.failed_before == 1
    assert results.take(identity(ask(1), None))
    assert not results.take(identity("{broken", None))
    results.write("{broken", [{"kind": "bad_line"}])
    results.finish(whole=True)
    assert [row[0] for row in rows(path)] == [ask(1), "{broken"]


# ---- repair


@pytest.mark.parametrize("tail", [b"[", b'[{"model"', b"\0\0\0", success(3)[:-2], b"   ", b"\xff"])
def test_torn_last_line(path: Path, opened: Callable[..., ResultsFile], tail: bytes) -> None:
    """A torn last line after results is cut off."""
    path.write_bytes(success(1) + tail)
    results = opened(path)
    assert path.read_bytes() == success(1)
    results.write(ask(2), answer(2))
    results.flush()
    assert len(rows(path)) == 2
    assert not path.with_name(path.name + ".unreadable").exists()


def test_last_line_lacks_only_its_end(path: Path, opened: Callable[..., ResultsFile]) -> None:
    """A whole last line without its line break counts."""
    path.write_bytes(success(1) + success(2)[:-1])
    results = opened(path)
    assert results.take(identity(ask(2), None))
    assert path.read_bytes() == success(1) + success(2)


def test_every_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a kill cuts the file, the next start reads what is whole and loses none of it."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    whole = success(1) + failure(2) + success(3)
    for cut in range(len(whole) + 1):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(whole[:cut])
        run(path, [1, 2, 3])
        assert sorted(row[0]["input"] for row in rows(path)) == ["question 1", "question 2", "question 3"]
        assert all(isinstance(row[1], dict) for row in rows(path))


@pytest.mark.parametrize("torn", [success(1)[:-9], b'["{bro', b"[", b'[{"a":1},{"a":2},{"a":3},{"a":4},{"a":5}]'])
def test_only_line_is_torn(path: Path, opened: Callable[..., ResultsFile], torn: bytes) -> None:
    """A file with nothing but a torn result line is kept whole under another name, like a former file."""
    path.write_bytes(torn)
    results = opened(path)
    assert path.read_bytes() == b""
    (former,) = path.parent.glob("results.2*Z.jsonl")
    assert former.read_bytes() == torn
    assert str(former) in results.notices[0]


def test_unreadable_lines(path: Path) -> None:
    """Unreadable lines inside stay until the run is finished; then they are moved aside, never away."""
    bad = [b"rubbish\n", b"\0" * 50 + b"\n", b'{"a": 1}\n', b"[1, 2]\n", b'["text", {"a": 1}]\n', b"[{}, 1, 2, 3, 4]\n"]
    path.write_bytes(success(1) + b"".join(bad) + b"\n  \n" + success(2))
    aside = path.with_name(path.name + ".unreadable")
    aside.write_bytes(b"earlier\n")
    results = run(path, [1, 2, 3])
    assert results.unreadable == len(bad)
    assert aside.read_bytes() == b"earlier\n" + b"".join(bad)
    assert path.read_bytes() == success(1) + success(2) + dumps([ask(3), answer(3)]) + b"\n"


def test_crlf(path: Path) -> None:
    """Results that an editor gave CRLF are read."""
    path.write_bytes((success(1) + success(2)).replace(b"\n", b"\r\n"))
    assert run(path, [1, 2]).finished_before == 2


# ---- guards


def refused(path: Path, *arguments: Any, **options: Any) -> str:
    """The message of a refusal that leaves the folder as it was."""
    before = {one: (one.lstat().st_mode, one.read_bytes() if one.is_file() else b"") for one in path.parent.glob("*")}
    with pytest.raises(UsageError) as caught:
        ResultsFile(str(path), *arguments, **options)
    assert before == {
        one: (one.lstat().st_mode, one.read_bytes() if one.is_file() else b"") for one in path.parent.glob("*")
    }
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b'{"model": "m"}\n', b"hello\n", b"hello", b"\n\nhello\n", b"[\n", b"[1, 2]\n", b"\0\0\0\n", b"\0\0\0",
        b"[{}]\n",
        b'[{"a":1},{"a":2},{"a":3},{"a":4},{"a":5}]\n', b'["a","b"]\n',
        b"[[1],[2]]\n", b"[1", b"\x1f\x8b\x08", b"null\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("restart", [False, True])
def test_guard_foreign_file(path: Path, content: bytes, restart: bool) -> None:
    """A file that does not begin with a result line is not touched."""
    path.write_bytes(content)
    path.chmod(0o644)
    assert "--save_filepath" in refused(path, restart=restart)


def test_guard_same_file(path: Path, tmp_path: Path) -> None:
    """Requests and results in one file are refused, also through links."""
    path.write_bytes(success(1))
    soft, hard = tmp_path / "soft.jsonl", tmp_path / "hard.jsonl"
    soft.symlink_to(path)
    os.link(path, hard)
    for one, two in itertools.permutations((path, soft, hard), 2):
        assert "request file" in refused(one, str(two))
    assert "request file" in refused(path, str(path), restart=True)


@POSIX_ONLY
def test_guard_standard_input(path: Path) -> None:
    """Results that are standard input too are refused."""
    path.write_bytes(success(1))
    code = f"import api_request_parallel_processor as p; p.ResultsFile({str(path)!r}, '-')"
    with path.open("rb") as stdin:
        done = subprocess.run([sys.executable, "-c", code], stdin=stdin, capture_output=True, text=True, check=False)
    assert "UsageError" in done.stderr
    assert path.read_bytes() == success(1)


@POSIX_ONLY
def test_guard_no_regular_file(path: Path, tmp_path: Path) -> None:
    """Folders, pipes and devices are refused."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for one in (tmp_path / "folder", tmp_path / "pipe"):
        assert "no regular file" in refused(one)
    with pytest.raises(UsageError, match="no regular file"):
        ResultsFile("/dev/null")


def test_guard_missing_folder(tmp_path: Path) -> None:
    """A missing folder is not made; the message has the command that makes it."""
    path = tmp_path / "no" / "such" / "results.jsonl"
    assert f"mkdir -p '{path.parent}'" in refused(path)


def test_guard_permission(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file or a folder without permission is refused before anything is made."""
    path.write_bytes(success(1))
    if getattr(os, "geteuid", lambda: 1)() == 0:
        monkeypatch.setattr(os, "access", lambda *_: False)
        assert "not writable" in refused(path)
        assert "mkdir" not in refused(path)  # it is there
        monkeypatch.undo()

        def refuse(*_: Any, **__: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
        with pytest.raises(UsageError, match="Permission denied"):
            ResultsFile(str(path))
    else:
        for mode in (0o000, 0o400, 0o200):
            path.chmod(mode)
            with pytest.raises(UsageError, match="Permission denied"):
                ResultsFile(str(path))
        path.parent.chmod(0o500)
        with pytest.raises(UsageError, match="not writable"):
            ResultsFile(str(path))
        path.parent.chmod(0o700)
    assert names(path.parent) == [path.name]


@POSIX_ONLY
def test_links_and_modes(tmp_path: Path) -> None:
    """Links are followed, also dangling ones and over the rewrite; every file is its owner's only."""
    target, link = tmp_path / "target.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(target)
    run(link, [1])
    target.write_bytes(failure(1) + b"rubbish\n" + success(2))
    target.chmod(0o644)
    results = ResultsFile(str(link))
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "target.jsonl.lock").stat().st_mode) == 0o600
    results.finish(whole=True)
    assert link.is_symlink()
    assert target.read_bytes() == success(2)
    assert {stat.S_IMODE(one.stat().st_mode) for one in tmp_path.iterdir()} == {0o600}
    assert names(tmp_path) == ["link.jsonl", "target.jsonl", "target.jsonl.unreadable"]


def test_restart(path: Path, opened: Callable[..., ResultsFile]) -> None:
    """--restart keeps the old file under a name of its own, never over another."""
    for number in range(3):
        path.write_bytes(success(number))
        results = opened(path, restart=True)
        assert results.finished_before == 0
        assert path.read_bytes() == b""
        assert "kept" in results.notices[0]
        results.close()
    path.unlink()
    kept = sorted(path.parent.glob("results.2*Z*.jsonl"))
    assert sorted(one.read_bytes() for one in kept) == [success(0), success(1), success(2)]


# ---- lock


def child(code: str, *arguments: Any, **options: Any) -> subprocess.Popen[str]:
    names = "ResultsFile, ResultsLost, UsageError, identity"
    program_code = f"import os, sys\nfrom api_request_parallel_processor import {names}\n"
    command = [sys.executable, "-c", program_code + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline()


def test_lock(path: Path) -> None:
    """A second process is refused and told the pid of the first; a dead holder does not block."""
    holder = child(
        "r = ResultsFile(sys.argv[1]); r.write({'a': 1}, {}); r.flush(); print('held', flush=True); input()", path
    )
    assert next_line(holder) == "held\n"
    with pytest.raises(UsageError, match=rf"\b{holder.pid}\b.*\.lock"):
        ResultsFile(str(path))
    holder.kill()
    holder.communicate()
    assert path.with_name(path.name + ".lock").read_text() == f"{holder.pid}\n"
    results = ResultsFile(str(path))
    assert results.finished_before == 1
    assert path.with_name(path.name + ".lock").read_text() == f"{os.getpid()}\n"
    with pytest.raises(UsageError, match=rf"\b{os.getpid()}\b"):
        ResultsFile(str(path))
    results.close()
    results.close()
    assert not path.with_name(path.name + ".lock").exists()


def test_lock_is_held_during_the_rewrite(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else gets in while the file is replaced."""
    path.write_bytes(failure(1) + success(2))
    results, replace, tried = ResultsFile(str(path)), os.replace, []

    def replace_and_try(*names: str) -> None:
        for step in ("before", "after"):
            if step == "after":
                replace(*names)
            with pytest.raises(UsageError, match="is writing"):
                ResultsFile(str(path))
            tried.append(step)

    monkeypatch.setattr(os, "replace", replace_and_try)
    results.finish(whole=True)
    assert len(tried) == 2
    assert path.read_bytes() == success(2)


@POSIX_ONLY
@pytest.mark.parametrize("renewed", [False, True])
def test_lock_removed_while_waiting(path: Path, monkeypatch: pytest.MonkeyPatch, renewed: bool) -> None:
    """A lock file that its holder removes between our open and our lock is no lock, nor is a newer one removed."""
    import fcntl

    flock, lock = fcntl.flock, path.with_name(path.name + ".lock")

    def slow_flock(*arguments: Any) -> None:
        lock.unlink()
        if renewed:
            lock.write_text("7\n")
        flock(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", slow_flock)
        with pytest.raises(UsageError, match="is writing"):
            ResultsFile(str(path))
    assert names(path.parent) == [lock.name] * renewed
    run(path, [1])


@POSIX_ONLY
def test_no_locks_on_this_file_system(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has no locks, the run goes on with a notice."""
    import fcntl

    def unsupported(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    results = ResultsFile(str(path))
    assert "No locks" in results.notices[0]
    results.close()


# ---- what happens during a run


@POSIX_ONLY
def test_disk_full(path: Path) -> None:
    """On a full disk every line is whole or not there, the message says so, and a restart completes the run."""
    code = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        results = ResultsFile(sys.argv[1])
        for number in range(20):
            results.write({"model": "m", "input": f"question {number}"}, {"data": ["x" * 90]})
        try:
            results.flush()
        except ResultsLost as lost:
            print(lost)
        whole = open(sys.argv[1], "rb").read()
        assert whole.endswith(b"\\n") and 800 < len(whole) <= 1000
        try:
            results.flush()
        except ResultsLost as lost:
            print("again")
        assert open(sys.argv[1], "rb").read() == whole
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        results.flush()
        results.finish(whole=False)
    """
    output, _ = child(code, path).communicate()
    assert "results.jsonl cannot be written (File too large)" in output
    assert "Make room" in output or "make room" in output
    assert "again" in output
    assert [row[0] for row in rows(path)] == [ask(number) for number in range(20)]


@POSIX_ONLY
def test_disk_full_at_the_end(path: Path) -> None:
    """If there is no room for the final rewrite, all results stay and the next run tidies up."""
    path.write_bytes(failure(0) + b"".join(success(number) for number in range(1, 30)))
    before = path.read_bytes()
    code = """
        import resource
        results = ResultsFile(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
        try:
            results.finish(whole=True)
        except ResultsLost as lost:
            print(lost)
    """
    output, _ = child(code, path).communicate()
    assert "could not be dropped" in output
    assert path.read_bytes() == before
    run(path, list(range(30)))
    assert len(rows(path)) == 30
    assert names(path.parent) == [path.name]


@POSIX_ONLY
@pytest.mark.parametrize("what", ["delete", "replace", "rename"])
def test_file_taken_away(tmp_path: Path, what: str) -> None:
    """A results file that is deleted or replaced during the run is kept whole under a second name."""
    folder = tmp_path / "deep"
    folder.mkdir()
    path = folder / "results.jsonl"
    path.write_bytes(success(1))
    results = ResultsFile(str(path))
    results.write(ask(2), answer(2))
    results.flush()
    results.check()
    if what == "rename":
        path.rename(tmp_path / "elsewhere.jsonl")
    else:
        path.unlink()
    if what == "replace":
        path.write_bytes(b"mine\n")
    results.write(ask(3), answer(3))
    results.flush()
    with pytest.raises(ResultsLost) as caught:
        results.check()
    rescue = Path(results.path)
    assert ".rescued." in rescue.name
    assert str(path) in str(caught.value)
    assert str(rescue) in str(caught.value)
    results.flush()
    results.write(ask(4), answer(4))
    results.finish(whole=True)
    assert [row[0] for row in rows(rescue)] == [ask(1), ask(2), ask(3), ask(4)]
    assert stat.S_IMODE(rescue.stat().st_mode) == 0o600
    assert what != "replace" or path.read_bytes() == b"mine\n"
    assert run(rescue, [1, 2, 3, 4]).finished_before == 4
    rescue.unlink()


@POSIX_ONLY
def test_folder_taken_away(tmp_path: Path) -> None:
    """Without its folder nothing can be kept, and the message says so; once there is one again, all is in it."""
    path = tmp_path / "deep" / "results.jsonl"
    path.parent.mkdir()
    results = ResultsFile(str(path))
    results.write(ask(1), answer(1))
    shutil.rmtree(path.parent)
    results.flush()
    with pytest.raises(ResultsLost, match=r"deleted.*No such file"):
        results.check()
    path.parent.mkdir()
    with pytest.raises(ResultsLost, match="what is still held"):
        results.finish(whole=True)
    assert rows(Path(results.path)) == [[ask(1), answer(1)]]


@pytest.mark.parametrize("size", [0, 5, len(success(1)), len(success(1)) + 9])
def test_file_truncated(path: Path, size: int) -> None:
    """What is recorded after someone truncated the file goes to a second one; both together continue the run."""
    path.write_bytes(success(1) + success(2))
    results = ResultsFile(str(path))
    os.truncate(path, size)
    results.write(ask(3), answer(3))
    with pytest.raises(ResultsLost, match="truncated"):
        results.flush()
    results.finish(whole=False)
    rescue = Path(results.path)
    path.write_bytes(path.read_bytes() + rescue.read_bytes())
    if size >= len(success(1)):
        run(path, [1, 2, 3])
        whole = [json.loads(one) for one in path.read_bytes().splitlines() if one]
        assert sorted(row[0]["input"] for row in whole) == ["question 1", "question 2", "question 3"]
    assert [row[0] for row in map(json.loads, rescue.read_text().split("\n")[1:-1])] == [ask(3)]


def test_check_at_the_end(path: Path) -> None:
    """A file deleted after the last line was written is noticed by finish."""
    results = ResultsFile(str(path))
    results.write(ask(1), answer(1))
    results.flush()
    path.unlink()
    with pytest.raises(ResultsLost, match="deleted"):
        results.finish(whole=True)
    assert len(rows(Path(results.path))) == 1


# ---- kills


class Killed(BaseException):
    """Stands for kill -9: nothing of the program runs after it, but the clean-up of Python."""


@pytest.mark.parametrize("step", range(12))
def test_kill_at_each_step_of_finish(path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Whatever step of the final rewrite a kill meets, the next run completes and nothing is lost or doubled."""
    path.write_bytes(failure(1) + success(2) + b"rubbish\n" + failure(3) + success(3))
    results = ResultsFile(str(path))
    steps = itertools.count()

    def fragile(call: Any) -> Any:
        def maybe(*arguments: Any, **options: Any) -> Any:
            if next(steps) == step:
                raise Killed
            return call(*arguments, **options)

        return maybe

    for number in (2, 3, 1):
        if not results.take(identity(ask(number), None)):
            results.write(ask(number), answer(number))
    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "unlink"):
            patch.setattr(os, name, fragile(getattr(os, name)))
        patch.setattr("builtins.open", fragile(open))
        patch.setattr(shutil, "copyfileobj", fragile(shutil.copyfileobj))
        with contextlib.suppress(Killed):
            results.finish(whole=True)
    assert step < next(steps) or step > 4
    again = run(path, [1, 2, 3])
    assert again.finished_before == 3
    assert sorted(row[0]["input"] for row in rows(path)) == ["question 1", "question 2", "question 3"]
    assert all(isinstance(row[1], dict) for row in rows(path))
    assert set(path.with_name(path.name + ".unreadable").read_bytes().splitlines()) == {b"rubbish"}
    assert names(path.parent) == [path.name, path.name + ".unreadable"]


@POSIX_ONLY
def test_kill_at_random(path: Path) -> None:
    """After kills at random moments and restarts, every request has exactly one line and none was asked twice."""
    code = """
        numbers = [*range(300), *range(50)]
        results = ResultsFile(sys.argv[1])
        for at, number in enumerate(numbers):
            body = {"model": "m", "input": f"question {number}", "pad": "x" * 3000}
            if not results.take(identity(body, None)):
                failed = number % 7 == 0 and sys.argv[2] == "kill"
                results.write(body, [{"attempt": 1}] if failed else {"data": [number] * 500})
                if at % 3 == 0:
                    results.flush()
                    print(flush=True)
        print(flush=True)
        results.finish(whole=True)
    """
    rng = random.Random(6)
    for _ in range(6):
        process = child(code, path, "kill")
        for _ in range(rng.randrange(1, 70)):
            if not next_line(process):
                break
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.communicate()
    process = child(code, path, "last")
    process.communicate()
    assert process.returncode == 0
    asked = sorted(row[0]["input"] for row in rows(path))
    assert asked == sorted(f"question {number}" for number in [*range(300), *range(50)])
    assert all(isinstance(row[1], dict) for row in rows(path))
    assert set(names(path.parent)) <= {path.name, path.name + ".unreadable"}  # if the only line was torn


def test_memory_per_finished_request(path: Path) -> None:
    """A finished request takes far less than a hundred bytes, at the peak too."""
    import tracemalloc

    count = 20_000
    path.write_bytes(b"".join(line({"n": number}, {}) for number in range(count)))
    tracemalloc.start()
    results = ResultsFile(str(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    results.close()
    assert (peak - 2 * program.BLOCK) / count < 60
    assert results.finished_before == count
