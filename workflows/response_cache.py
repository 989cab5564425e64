"""Keep answers in a SQLite file: known ones are filled in before a run, new ones are stored after it.

    python -m workflows.response_cache run --cache_filepath answers.sqlite --requests_filepath requests/mine.jsonl
    python -m workflows.response_cache store --cache_filepath answers.sqlite --requests_filepath requests/mine.jsonl
    python -m workflows.response_cache info --cache_filepath answers.sqlite

`run` takes all flags of the processor; `store` takes over the answers of an earlier run. An answer is found by URL,
body and the how-many-th identical request of its file it answers, so that five samples of one prompt stay five.
Failed, cut off and filtered answers are never stored. What an interrupted run left is stored at the next start.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from api_request_parallel_processor import (
    LOGGER,
    ResultsFile,
    Settings,
    Tally,
    UsageError,
    build_parser,
    dumps,
    identity,
    loads,
)
from workflows import _run
from workflows._replies import read_answers
from workflows._results import Results, Table, read_requests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, response BLOB NOT NULL, stored REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_age ON answers (stored);
"""
ROWS_PER_COMMIT = 1000
BUSY_SECONDS = 60.0  # how long to wait for another process that writes
SECONDS_PER_DAY = 86400.0
QUICK = 1  # of zlib: most of the gain at a small part of the time


class Cache:
    """Answers by key, in a file that several processes may share. sqlite3.Error for a file that is none."""

    def __init__(self, path: Path, url: str, *, max_days: float = 0, max_megabytes: float = 0) -> None:
        """Open or create the file, readable by its owner only; limits of 0 are none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self.url, self.max_bytes = " ".join(map(whole_url, url.split())).encode(), max_megabytes * 2**20
        self.oldest = time.time() - max_days * SECONDS_PER_DAY if max_days else 0.0
        self.database = sqlite3.connect(path, timeout=BUSY_SECONDS)
        try:
            self.database.execute("PRAGMA journal_mode = WAL")
            self.database.execute("PRAGMA synchronous = NORMAL")
            self.database.executescript(SCHEMA)
        except sqlite3.Error:
            self.database.close()
            raise

    def keys(self, requests_path: Path, limit: int = 0) -> Iterator[tuple[Any, Any, bytes, int]]:
        """Give body, metadata, key and how-many-th of its kind for every request of a file."""
        counts = Table()
        for number, (body, metadata) in enumerate(read_requests(requests_path)):
            if limit and number >= limit:
                return
            plain = identity(body, None)
            nth = counts.take(plain) or 0
            counts.add(plain, nth + 1)
            yield body, metadata, self.key(plain, nth), nth

    def key(self, plain: bytes, nth: int) -> bytes:
        """What an answer is found by."""
        return hashlib.blake2b(b"%b\0%b%d" % (self.url, plain, nth), digest_size=16).digest()

    def get(self, key: bytes) -> Any:
        """An answer, or None."""
        query = "SELECT response FROM answers WHERE key = ? AND stored >= ?"
        found = self.database.execute(query, (key, self.oldest)).fetchone()
        return loads(zlib.decompress(found[0])) if found else None

    def fill(self, settings: Settings) -> int:
        """Write known answers as results of requests that have none yet; gives their number."""
        filled, path = 0, settings.requests_filepath
        results = ResultsFile(settings.results_path, path, restart=settings.restart)
        for notice in results.notices:
            LOGGER.info("%s", notice)
        missed = Table()  # subtle: after a miss, a later answer to the same body may be what the results have already
        try:
            for body, metadata, key, nth in self.keys(Path(path), settings.limit):
                plain = identity(body, None)
                if results.take(identity(body, metadata)) or missed.take(plain, keep=True) is not None:
                    continue
                if (response := self.get(key) if isinstance(body, dict) else None) is None:
                    missed.put(plain, nth)
                    continue
                results.write(body, response, metadata)
                filled += 1
                if filled % ROWS_PER_COMMIT == 0:
                    results.flush()
            results.flush()
        finally:
            results.close()
        return filled

    def store(self, settings: Settings) -> int:
        """Take over the good answers of a results file; gives the number of new ones."""
        path = Path(settings.results_path)
        if not path.is_file() or not path.stat().st_size:
            return 0
        before = self.database.total_changes
        results = Results(path)
        for row, (body, metadata, key, _) in enumerate(self.keys(Path(settings.requests_filepath))):
            result = results.take(body, metadata)
            if result is None or not result.succeeded or not all(a.whole for a in read_answers(result.response)):
                continue
            packed = zlib.compress(dumps(result.response), QUICK)
            query = (
                "INSERT INTO answers VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET response = excluded.response, "
            )
            query += "stored = excluded.stored WHERE stored < ?"
            self.database.execute(query, (key, packed, time.time(), self.oldest))
            if row % ROWS_PER_COMMIT == 0:
                self.database.commit()
        self.database.commit()
        results.close()
        return self.database.total_changes - before

    def shrink(self) -> int:
        """Remove what is too old, then the oldest until the rest fits; gives the number removed."""
        before = self.database.total_changes
        self.database.execute("DELETE FROM answers WHERE stored < ?", (self.oldest,))
        query = """DELETE FROM answers WHERE key IN (SELECT key FROM (
            SELECT key, SUM(LENGTH(response)) OVER (ORDER BY stored DESC, key) AS size FROM answers) WHERE size > ?)"""
        if self.max_bytes:
            self.database.execute(query, (self.max_bytes,))
        self.database.commit()
        return self.database.total_changes - before

    def close(self) -> None:
        """Close the file."""
        self.database.close()


def whole_url(url: str) -> str:
    """A URL as the processor completes it, so that /v1 and /v1/chat/completions share their answers."""
    parts = urlsplit(url)
    bare = parts.path in ("", "/") or parts.path.rstrip("/").endswith("/v1")
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/chat/completions")) if bare else url


def with_cache(
    settings: Settings, path: Path, run: Callable[[Settings], Tally], *, max_days: float = 0, max_megabytes: float = 0
) -> Tally:
    """Store what an interrupted run left, fill in what is known, run, store what is new.

    A cache that is broken or cannot be used is told and left alone: the run goes on without it.
    """
    if settings.requests_filepath == "-":
        raise UsageError("a cache needs the requests in a file; standard input can be read only once")
    if settings.dry_run:
        return run(settings)
    with contextlib.ExitStack() as stack:
        try:
            cache = Cache(path, settings.request_url, max_days=max_days, max_megabytes=max_megabytes)
            stack.callback(cache.close)
            if not settings.restart:
                cache.store(settings)
            LOGGER.info("%s answers were known from %s", f"{cache.fill(settings):,}", path)
            settings = replace(settings, restart=False)
        except (sqlite3.Error, zlib.error, OSError) as error:
            LOGGER.warning("The cache %s cannot be used (%s): going on without it.", path, error)
            return run(settings)
        tally = run(settings)
        try:
            stored = cache.store(settings) if tally.succeeded else 0
            cache.shrink()
            LOGGER.info("%s answers are new in %s", f"{stored:,}", path)
        except (sqlite3.Error, OSError) as error:
            LOGGER.warning("The cache %s could not take the answers (%s); the results file has them.", path, error)
    return tally


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = _run.new_parser(__doc__)
    parser.add_argument("command", choices=["run", "store", "info"])
    parser.add_argument("--cache_filepath", type=Path, required=True, metavar="FILE")
    parser.add_argument("--cache_max_days", type=float, default=0, help="older answers do not count; 0 = no limit")
    parser.add_argument("--cache_max_megabytes", type=float, default=0, help="the oldest go first; 0 = no limit")
    arguments, rest = parser.parse_known_args(argv)
    limits = {"max_days": arguments.cache_max_days, "max_megabytes": arguments.cache_max_megabytes}
    if not min(limits.values()) >= 0:
        raise UsageError("--cache_max_days and --cache_max_megabytes are numbers from 0 up")
    path = arguments.cache_filepath
    if arguments.command == "run":
        settings = settings_from(rest)
        LOGGER.setLevel(_run.log_level(settings.logging_level))
        _run.load_env()
        return _run.run_processor(settings, cache_filepath=str(path), **limits).exit_code
    try:
        print(info(path) if arguments.command == "info" else store(path, settings_from(rest), **limits))
    except sqlite3.Error as error:
        raise UsageError(f"the cache {path} cannot be used: {error}") from None
    return 0


def info(path: Path) -> str:
    """How much is in a cache."""
    if not path.is_file():
        raise UsageError(f"there is no cache {path}; check the path")
    with contextlib.closing(Cache(path, "")) as cache:
        count, size = cache.database.execute("SELECT COUNT(*), TOTAL(LENGTH(response)) FROM answers").fetchone()
    return f"{count:,} answers, {size / 2**20:,.1f} MB packed, are in {path}"


def store(path: Path, settings: Settings, **limits: float) -> str:
    """Take over the answers of an earlier run."""
    for needed in (settings.requests_filepath, settings.results_path):
        if not Path(needed).is_file():
            raise UsageError(f"there is no {needed}; check --requests_filepath and --save_filepath")
    with contextlib.closing(Cache(path, settings.request_url, **limits)) as cache:
        told = f"{cache.store(settings):,} answers are new in {path}"
        cache.shrink()
    return told


def settings_from(flags: list[str]) -> Settings:
    """Read the processor's own flags."""
    return Settings.of(**vars(build_parser().parse_args(flags)))


if __name__ == "__main__":
    raise SystemExit(_run.main_program(main))
