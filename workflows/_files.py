"""Files that workflows read and write: rows out of CSV, JSONL and text, tables, whole files that appear at once."""

from __future__ import annotations

import codecs
import contextlib
import csv
import os
import re
import string
import tempfile
from difflib import get_close_matches
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


# ---- reading ---------------------------------------------------------------------------------------------------------


def encoding_of(path: Path) -> str:
    """UTF-8 with or without BOM, UTF-16 with one, else GBK (as its superset GB18030); UsageError if it is none."""
    with opened(path) as file:
        start = file.read(2)
    if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    for encoding in ("utf-8-sig", "gb18030"):
        decoder = codecs.getincrementaldecoder(encoding)()
        with contextlib.suppress(UnicodeDecodeError), opened(path) as file:
            while block := file.read(BLOCK):
                decoder.decode(block)
            decoder.decode(b"", final=True)
            if encoding == "gb18030":
                LOGGER.info("%s is no UTF-8: it is read as GBK", path)
            return encoding
    raise UsageError(f"{path} is neither UTF-8 nor GBK: save it as UTF-8")


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
    return read_lines(path)


def read_lines(path: Path) -> Iterator[Row]:
    """Give the lines of a text file."""
    with path.open(encoding=encoding_of(path)) as file:
        for line in file:
            if line.strip():
                yield {"prompt": line.rstrip("\r\n")}


def read_json_rows(path: Path, needed: Sequence[str] = ()) -> Iterator[Row]:
    """Give the objects of a JSONL file."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if not (text := line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip():
                continue
            try:
                row = loads(text)
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
        delimiter = max(",;\t", key=file.readline().count)
        file.seek(0)
        # subtle: strict, since a quote that is never closed would swallow the rest of the file as one field
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = [name.strip() for name in next(reader, [])]
            if missing := [name for name in needed if name not in names]:
                there = ", ".join(names) or "nothing"
                raise UsageError(f"{path} needs the columns {', '.join(needed)}; {missing[0]} is missing in: {there}")
            for fields in reader:
                if len(fields) > len(names):
                    raise UsageError(f"{path}, line {reader.line_num}: more fields than the first row has names")
                if any(field.strip() for field in fields):
                    yield dict(zip(names, fields + [""] * (len(names) - len(fields)), strict=True))
        except csv.Error as error:
            hint = "a quote inside a quoted field is written twice, and every quote is closed"
            raise UsageError(f"{path}, line {reader.line_num}: {error} ({hint})") from None


# ---- templates -------------------------------------------------------------------------------------------------------


def compile_template(text: str, source: str = "the template") -> Callable[[Mapping[str, Any]], str]:
    """Make a function that fills a row into {field} placeholders; {{ and }} stand for braces.

    compile_template("{{{name}}}")({"name": "x"}) -> "{x}". Raises UsageError for anything else within braces.
    """
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UsageError(f"{source}: {error}; a brace that is no placeholder is written twice") from None
    for _, name, form, conversion in pieces:
        if form or conversion or name == "" or (name and re.search(r"[\s\"'\[\]]", name)):
            shown = f"{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}"
            raise UsageError(f"{source}: {{{shown[:40]}}} is no placeholder; braces of your own are written twice")

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


def refuse_foreign(path: Path, start: str) -> None:
    """Raise UsageError if a file is there that does not begin as ours do: a user may have written it."""
    if path.exists():
        with opened(path) as file:
            found = file.read(len(start.encode()) + 3).decode(errors="replace").removeprefix("\ufeff")
        if not path.is_file() or (found and not found.startswith(start)):
            raise UsageError(f"{path} exists and is no output of this program: move it away, or name another output")
