"""Files that workflows read and write: rows out of CSV, JSONL and text, tables, whole files that appear at once."""

from __future__ import annotations

import codecs
import contextlib
import csv
import os
import re
import string
import tempfile
import unicodedata
from datetime import UTC, datetime
from difflib import get_close_matches
from itertools import islice, zip_longest
from typing import IO, TYPE_CHECKING, Any

from api_request_parallel_processor import LOGGER, UsageError, dumps, loads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

Row = dict[str, Any]
BLOCK = 1 << 20
LONGEST_FIELD = 2**31 - 1  # of a CSV field; what Python takes on every system
FORMULA_STARTS = tuple("=+-@\t\r")
JSON_ROWS = (".jsonl", ".ndjson")
CSV_ROWS = (".csv", ".tsv")
NO_TEXT = (".json", ".xlsx", ".xls", ".ods", ".parquet")  # not to be read as a text of one prompt a line
BEYOND_ASCII = bytes(range(128, 256))
MOST_BY_CHANCE = 24  # bytes beyond ASCII that a text in GBK may have before they are no UTF-8
TOLD: set[Path] = set()  # files that are read as GBK


# ---- reading ---------------------------------------------------------------------------------------------------------


def encoding_of(path: Path) -> str:
    """UTF-8 with or without BOM, UTF-16 with one, else GBK (as its superset GB18030); UsageError if it is none."""
    with opened(path) as file:
        start = file.read(2)
    if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    if (good := decodable(path, "utf-8-sig")) is None:
        return "utf-8-sig"
    if good[1] > MOST_BY_CHANCE:  # subtle: nearly any bytes can be read as GBK
        raise UsageError(
            f"{path}, line {good[0] + 1}: this is no UTF-8, as the text before it is; was the file cut off?"
        )
    if decodable(path, "gb18030") is not None:
        raise UsageError(f"{path} is neither UTF-8 nor GBK: save it as UTF-8")
    if path not in TOLD:
        TOLD.add(path)
        LOGGER.info("%s is no UTF-8: it is read as GBK", path)
    return "gb18030"


def decodable(path: Path, encoding: str) -> tuple[int, int] | None:
    """None for a file that is in this encoding, else how many lines and bytes beyond ASCII stand before the mistake."""
    decoder, lines, beyond = codecs.getincrementaldecoder(encoding)(), 0, 0
    with opened(path) as file:
        try:
            while block := file.read(BLOCK):
                decoder.decode(block)
                lines += block.count(b"\n")
                beyond += len(block) - len(block.translate(None, BEYOND_ASCII))
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            before = error.object[: error.start]
            return lines + before.count(b"\n"), beyond + len(before) - len(before.translate(None, BEYOND_ASCII))
    return None


def opened(path: Path) -> IO[bytes]:
    """Open for reading; UsageError if that is impossible."""
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); check the path") from None


def read_text(path: Path) -> str:
    """Read the whole of a text file."""
    return path.read_text(encoding_of(path))


def read_rows(path: Path, needed: Sequence[str] = ()) -> Iterator[Row]:
    """Give the rows of a CSV or JSONL file, or of a text file with one prompt a line, one by one.

    The name's ending tells which; a text line is {"prompt": "its text"}. Blank lines are skipped. Raises
    UsageError, which names the line, for what cannot be read, and at once if one of the `needed` fields is missing.
    """
    if path.suffix.lower() in JSON_ROWS:
        return read_json_rows(path, needed)
    if path.suffix.lower() in CSV_ROWS:
        return read_csv_rows(path, needed)
    if path.suffix.lower() in NO_TEXT:
        raise UsageError(f"{path}: rows come as .csv, .tsv or .jsonl (one object a line), or as text; save it as one")
    return read_lines(path)


def read_lines(path: Path) -> Iterator[Row]:
    """Give the lines of a text file."""
    with path.open(encoding=encoding_of(path)) as file:
        for line in file:
            if line.strip():
                yield {"prompt": line.rstrip("\r\n")}


def read_json_rows(path: Path, needed: Sequence[str] = ()) -> Iterator[Row]:
    """Give the objects of a JSONL file."""
    with path.open(encoding=encoding_of(path), newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, line {number}: {error}") from None
            if not isinstance(row, dict):
                raise UsageError(f"{path}, line {number}: a row is a JSON object")
            for name in needed:
                if name not in row:
                    raise UsageError(f"{path}, line {number}: no field {name!r}; there are {', '.join(row)}")
            yield row


def read_csv_rows(path: Path, needed: Sequence[str] = ()) -> Iterator[Row]:
    """Give the rows of a CSV file by the names of its first row; commas, semicolons or tabs between fields."""
    csv.field_size_limit(LONGEST_FIELD)
    with path.open(encoding=encoding_of(path), newline="") as file:
        first = next(filter(str.strip, file), "")
        told = re.fullmatch(r'"?sep=(.)"?\s*', first, re.IGNORECASE)  # so does Excel say what stands between fields
        delimiter = told[1] if told else max(",;\t", key=first.count)
        file.seek(0)
        # subtle: strict, since a quote that is never closed would swallow the rest of the file as one field
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            heads = (fields for fields in reader if any(map(str.strip, fields)))
            names = unique(next(islice(heads, told is not None, None), []))
            if missing := [name for name in needed if name not in names]:
                there = ", ".join(names) or "nothing"
                raise UsageError(f"{path} needs the columns {', '.join(needed)}; {missing[0]} is missing in: {there}")
            for fields in reader:
                if any(map(str.strip, fields[len(names) :])):  # empty ones are a spreadsheet's
                    raise UsageError(f"{path}, line {reader.line_num}: more fields than the first row has names")
                if any(map(str.strip, fields)):
                    yield dict(zip_longest(names, fields[: len(names)], fillvalue=""))
        except csv.Error as error:
            hint = "a quote inside a quoted field is written twice, and every quote is closed"
            raise UsageError(f"{path}, line {reader.line_num}: {error} ({hint})") from None


def unique(names: Sequence[str]) -> list[str]:
    """Names of columns without white space around them; of equal ones the later are numbered: ["a", "a"] -> a, a.1."""
    stripped = [name.strip() for name in names]
    before = [stripped[:at].count(name) for at, name in enumerate(stripped)]
    return [f"{name}.{count}" if name and count else name for name, count in zip(stripped, before, strict=True)]


# ---- templates -------------------------------------------------------------------------------------------------------


def compile_template(text: str, source: str = "the template") -> Callable[[Mapping[str, Any]], str]:
    """Make a function that fills a row into {field} placeholders; {{ and }} stand for braces.

    compile_template("{{{name}}}")({"name": "x"}) -> "{x}". Raises UsageError for anything else within braces, and for
    a text without a placeholder.
    """
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UsageError(f"{source}: {error}; a brace that is no placeholder is written twice") from None
    for _, name, form, conversion in pieces:
        if form or conversion or name == "" or (name and re.search(r"[\s\"'\[\]]", name)):
            shown = f"{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}"
            raise UsageError(f"{source}: {{{shown[:40]}}} is no placeholder; braces of your own are written twice")
    if all(name is None for _, name, _, _ in pieces):
        raise UsageError(
            f"{source} has no placeholder: every row would be asked the same; write {{field}} in one brace"
        )

    def fill(row: Mapping[str, Any]) -> str:
        words = []
        for literal, name, _, _ in pieces:
            words.append(literal)
            if name is not None:
                if name not in row:
                    raise UsageError(f"{source}: no field {name!r}{nearest(name, row)}; {{{{ stands for a brace")
                words.append(cell(row[name]))
        return "".join(words)

    return fill


def nearest(name: str, known: Iterable[str]) -> str:
    """Words that name the nearest of the known names."""
    known = list(known)
    close = get_close_matches(name, known, 1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f" among {', '.join(known)}"


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: Path, *, bom: bool = False) -> Iterator[IO[str]]:
    """Open a text file that appears under its name when it is complete, or never."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()  # a link is followed
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    encoding = "utf-8-sig" if bom else "utf-8"
    try:
        with temporary.open("w", encoding=encoding, errors="backslashreplace", newline="") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_requests(path: Path, requests: Iterable[tuple[Row, Any]]) -> int:
    """Write (body, metadata) pairs as a request file; gives their number."""
    count = 0
    with whole_file(path) as file:
        for body, metadata in requests:
            file.write(dumps({**body, "metadata": metadata}).decode() + "\n")
            count += 1
    return count


def write_table(
    path: Path, rows: Iterable[Row], *, first: Sequence[str] = (), last: Sequence[str] = (), excel: bool = False
) -> int:
    """Write rows as CSV if the name ends so, else as JSONL; gives their number.

    Columns of CSV: `first`, what the rows have besides in the order of its appearance, `last`. `excel` adds a BOM and
    puts an apostrophe before text that a spreadsheet would take for a formula.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count, columns = 0, dict.fromkeys(first)
    if path.suffix.lower() not in CSV_ROWS:
        with whole_file(path) as file:
            for count, row in enumerate(rows, 1):  # noqa: B007 - counts
                file.write(dumps(row).decode() + "\n")
        return count
    with tempfile.TemporaryFile(dir=path.parent) as spool:  # only after the last row all columns are known
        for count, row in enumerate(rows, 1):  # noqa: B007 - counts
            columns |= dict.fromkeys(row)
            spool.write(dumps(row) + b"\n")
        spool.seek(0)
        names = [name for name in columns if name not in last] + list(last)
        with whole_file(path, bom=excel) as file:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
            writer.writerow([guarded(name) if excel else name for name in names])
            for line in spool:
                row = loads(line)
                writer.writerow([guarded(row.get(name)) if excel else cell(row.get(name)) for name in names])
    return count


def cell(value: Any) -> str:
    """A value as the text of a CSV field: null is empty, objects and arrays are JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else dumps(value).decode()


def guarded(value: Any) -> str:
    """The same for a spreadsheet: text that begins like a formula gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else cell(value)


def columns_of(text: str) -> int:
    """How wide a terminal shows a text: Chinese takes two columns a character."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def check_table(path: Path) -> None:
    """Raise UsageError for the name of a table that write_table does not make."""
    if path.suffix.lower() not in CSV_ROWS + JSON_ROWS:
        raise UsageError(f"{path}: the name of a table ends in {', '.join(CSV_ROWS + JSON_ROWS)}")


def refuse_foreign(path: Path, start: str) -> None:
    """Raise UsageError if a file is there that does not begin as ours do: a user may have written it."""
    if path.exists():
        with opened(path) as file:
            found = file.read(len(start.encode()) + 3).decode(errors="replace").removeprefix("\ufeff")
        if not path.is_file() or (found and not found.startswith(start)):
            raise UsageError(f"{path} exists and is no output of this program: move it away, or name another output")


def keep_older(path: Path, results: Path) -> None:
    """Rename an output that was not made from these results, since there are none yet: another program's, perhaps."""
    if path.is_file() and path.stat().st_size and not results.exists():
        older = path.with_name(f"{path.stem}.{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}{path.suffix}")
        path.rename(older)
        LOGGER.warning("%s is not from these results: it is kept as %s", path, older.name)
