"""Result lines found by their request, in bounded memory, whatever order they stand in."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from api_request_parallel_processor import PROVIDERS, UsageError, identity, loads, parse_line, read_result
from workflows._files import opened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BUCKETS, IDENTITY_BYTES, OFFSET_BYTES = 4096, 12, 8
ANY_ENDPOINT: Any = SimpleNamespace(url="http://localhost/", shape="chat", provider=PROVIDERS["local"])


@dataclass(frozen=True, slots=True)
class Result:
    """One result line; `response` is the list of errors of a failed one."""

    request: Any
    response: Any
    metadata: Any = None
    details: Any = None

    @property
    def succeeded(self) -> bool:
        """Whether there is an answer."""
        return not isinstance(self.response, list)


class Table:
    """Numbers by identity: 20 bytes each instead of the 200 of a dict; equal identities keep their order."""

    def __init__(self) -> None:
        self.buckets = [bytearray() for _ in range(BUCKETS)]

    def find(self, key: bytes) -> tuple[bytearray, int]:
        """The bucket of a key and the place of its first entry there, or -1."""
        bucket = self.buckets[int.from_bytes(key[:2], "little") % BUCKETS]
        at = bucket.find(key)
        while at > 0 and at % (IDENTITY_BYTES + OFFSET_BYTES):  # subtle: bytes of two entries, or of an offset
            at = bucket.find(key, at + 1)
        return bucket, at

    def add(self, key: bytes, number: int) -> None:
        """Append an entry."""
        self.find(key)[0].extend(key + number.to_bytes(OFFSET_BYTES, "little"))

    def take(self, key: bytes, *, keep: bool = False) -> int | None:
        """Give the first entry's number, and remove it unless it is to be kept; None if there is none."""
        bucket, at = self.find(key)
        if at < 0:
            return None
        number = int.from_bytes(bucket[at + IDENTITY_BYTES : at + IDENTITY_BYTES + OFFSET_BYTES], "little")
        if not keep:
            del bucket[at : at + IDENTITY_BYTES + OFFSET_BYTES]
        return number

    def put(self, key: bytes, number: int) -> int | None:
        """Replace the first entry, or append it; gives the number that was replaced."""
        bucket, at = self.find(key)
        old = self.take(key, keep=True) if at >= 0 else None
        at = len(bucket) if at < 0 else at
        bucket[at : at + IDENTITY_BYTES + OFFSET_BYTES] = key + number.to_bytes(OFFSET_BYTES, "little")
        return old

    def groups(self) -> Iterator[dict[bytes, list[int]]]:
        """Give the numbers by their keys, bucket after bucket; a key is in the same bucket of all tables."""
        for bucket in self.buckets:
            found: dict[bytes, list[int]] = {}
            for at in range(0, len(bucket), IDENTITY_BYTES + OFFSET_BYTES):
                end = at + IDENTITY_BYTES
                number = int.from_bytes(bucket[end : end + OFFSET_BYTES], "little")
                found.setdefault(bytes(bucket[at:end]), []).append(number)
            yield found


class Results:
    """The lines of a results file: a success before a failure, of failures the last."""

    def __init__(self, path: Path, each: Callable[[Result], None] | None = None) -> None:
        """Read the file once; a torn last line and lines that are no results are left out.

        `each` is given every result line as it is read: all successes count, of the failures those of `failures`.
        """
        self.succeeded, self.failed, self.failed_before, offset, known = Table(), Table(), Table(), 0, 0
        self.left_out = 0  # lines that are neither blank nor results
        self.file = opened(path)
        for line in self.file:
            if (found := read_result(line)) is not None:
                known += 1
                if found[1]:
                    self.succeeded.add(found[0], offset)
                elif (before := self.failed.put(found[0], offset)) is not None:
                    self.failed_before.add(found[0], before)
                if each:
                    each(Result(*loads(line)))
            else:
                self.left_out += not line.isspace()
            offset += len(line)
        if offset and not known:
            self.close()
            raise UsageError(f"{path} holds no result lines; is it the results file?")

    def take(self, body: Any, metadata: Any) -> Result | None:
        """Give the result of a request, the next one if equal requests have several; None if there is none yet."""
        key = identity(body, metadata)
        offset = self.succeeded.take(key)
        offset = self.failed.take(key, keep=True) if offset is None else offset
        return None if offset is None else self.at(offset)

    def at(self, offset: int) -> Result:
        """Read one line."""
        self.file.seek(offset)
        return Result(*loads(self.file.readline()))

    def in_own_order(self) -> Iterator[Result]:
        """Give all results as they stand in the file; a failure only if no success made up for it."""
        self.file.seek(0)
        while line := self.file.readline():
            if (found := read_result(line)) is None:
                continue
            key, succeeded = found
            here = self.file.tell()
            if succeeded or (
                self.succeeded.take(key, keep=True) is None and self.failed.take(key, keep=True) == here - len(line)
            ):
                yield Result(*loads(line))
            self.file.seek(here)

    def failures(self) -> Iterator[Result]:
        """Give the failed results that no success made up for, as they stand in the file.

        Of equal requests the last failure of each line of the request file counts, as far as details tell the lines.
        """
        offsets: list[int] = []
        for last, before in zip(self.failed.groups(), self.failed_before.groups(), strict=True):
            for key, [offset] in last.items():
                if self.succeeded.take(key, keep=True) is None:
                    by_line = {self.line_at(one): one for one in before.get(key, ())}
                    offsets += ({**by_line, self.line_at(offset): offset} if by_line else {0: offset}).values()
        for offset in sorted(offsets):
            yield self.at(offset)

    def line_at(self, offset: int) -> str:
        """The line of the request file that a result is of, as text; "" if it does not tell."""
        details = self.at(offset).details
        return str(details.get("line")) if isinstance(details, dict) else ""

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_requests(path: Path) -> Iterator[tuple[Any, Any]]:
    """Give body and metadata of every request of a request file, as the processor reads it."""
    with opened(path) as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                request = parse_line(number, raw, ANY_ENDPOINT)
                yield request.body, request.metadata
