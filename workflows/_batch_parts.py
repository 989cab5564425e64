"""From a request file to parts that a provider takes: by lines, bytes and model, streaming."""

from __future__ import annotations

import math
import secrets
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from api_request_parallel_processor import (
    dumps,
    estimate_text,
    estimate_tokens,
    identity,
    loads,
    parse_line,
    read_bounded,
)
from workflows._batch_costs import Sample
from workflows._batch_ledger import FILES, Ledger, Part, identities
from workflows._batch_providers import FILE_SLACK, line_frame, wire_body

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from api_request_parallel_processor import Endpoint, Request, ResultsFile
    from workflows._batch_providers import Target

BLOCK = 1 << 20
LINE_SLACK = 200  # bytes of a line around the body


@dataclass
class Plan:
    """What a request file means for a batch."""

    read: int = 0
    finished: int = 0
    open: int = 0  # in jobs that were submitted before
    failed_before: int = 0  # in batches; sent again only on request
    unfit: int = 0  # bad lines, and what a batch cannot do
    new: int = 0
    bytes: int = 0
    parts: list[Part] = field(default_factory=list)
    samples: defaultdict[str, Sample] = field(default_factory=lambda: defaultdict(Sample))  # of what is new, by model


@dataclass
class Writer:
    """A part that is being filled."""

    part: Part
    target: Target
    upload: IO[bytes]
    metadata: IO[bytes]

    def __post_init__(self) -> None:
        row = self.target.transport
        before, after = (text.replace(b"%", b"%%") for text in line_frame(self.target))
        self.head = before + self.part.tag.encode() + b"-%d" + after  # the custom id is the part and the number in it
        self.most_lines, self.most_bytes = row.lines, int(row.megabytes * 1e6) - FILE_SLACK
        self.most_body = int(min(row.line_megabytes or math.inf, row.megabytes) * 1e6) - FILE_SLACK - LINE_SLACK

    def fits(self, size: int) -> bool:
        """Tell whether one more body of this size fits."""
        return self.part.requests < self.most_lines and self.part.bytes + size + LINE_SLACK <= self.most_bytes

    def add(self, body: bytes, metadata: bytes, own_body: bytes) -> None:
        """Append a request. own_body: as the user wrote it, if the provider gets another."""
        head = self.head % self.part.requests
        place = self.part.bytes + len(head)
        self.part.bytes += self.upload.write(b"".join((head, body, b"}\n")))
        self.metadata.write(b"%d\t%d\t%b\t%b\n" % (place, len(body), metadata, own_body))
        self.part.requests += 1


@dataclass
class Splitter:
    """Cuts what is to be sent into parts; `add` gives why a request cannot be part of a batch, or nothing."""

    ledger: Ledger
    target: Target
    name: str
    fields: dict[str, Any]  # of every part
    plan: Plan
    writers: dict[str, Writer] = field(default_factory=dict)
    stack: ExitStack = field(default_factory=ExitStack)

    def add(self, request: Request) -> str:
        """Put a request into the part of its model."""
        if request.body.get("stream"):
            return 'a batch cannot stream: remove "stream", or send this request live'
        model = self.target.model or request.model if self.target.transport.one_model else ""
        writer = self.writers.get(model) or self.open(model)
        sent = wire_body(request.body, writer.target)
        body = dumps(sent)
        if len(body) > writer.most_body:
            told = (
                f"it has {len(body) / 1e6:.1f} MB, {writer.target.transport.name} takes {writer.most_body / 1e6:.1f} MB"
            )
            return f"{told}: send it live"
        if not writer.fits(len(body)):
            self.close(writer)
            writer = self.open(model)
        writer.add(body, dumps(request.metadata), dumps(request.body) if sent is not request.body else b"")
        return ""

    def open(self, model: str) -> Writer:
        """Begin a part."""
        tag = secrets.token_hex(4)
        part = Part(tag, f"{self.name}-{tag}", model=model, **self.fields)
        self.ledger.folder.mkdir(mode=0o700, exist_ok=True)
        upload, metadata = (self.stack.enter_context(self.ledger.file(part, what).open("wb", BLOCK)) for what in FILES)
        self.writers[model] = writer = Writer(part, self.target.for_model(model), upload, metadata)
        return writer

    def close(self, writer: Writer) -> None:
        """End a part; the ledger knows it from now on."""
        for file in (writer.upload, writer.metadata):
            file.close()
        if writer.part.requests:
            self.plan.parts.append(writer.part)
            self.plan.bytes += writer.part.bytes
        del self.writers[writer.part.model]

    def finish(self) -> None:
        """End all parts."""
        for writer in list(self.writers.values()):
            self.close(writer)
        self.stack.close()
        self.ledger.parts += self.plan.parts
        self.ledger.save()


def requests_of(path: Path, endpoint: Endpoint, limit: float = math.inf) -> Iterator[Request]:
    """Give the requests of a file, one by one; bad lines have a `problem`."""
    number, given = 0, 0
    with path.open("rb", buffering=BLOCK) as file:
        while given < limit and (raw := read_bounded(file)):
            number += 1
            if raw.strip():
                given += 1
                yield parse_line(number, raw, endpoint)


def split(
    requests: Iterator[Request], results: ResultsFile, splitter: Splitter, endpoint: Endpoint, *, resubmit: bool
) -> None:
    """Read the request file once: skip what is finished or open, record what cannot be sent, cut the rest into parts.

    resubmit: send again what failed in an earlier batch.
    """
    plan, waiting = splitter.plan, open_identities(splitter.ledger)
    failed = set() if resubmit else failed_in_batches(results.path)
    recorded = set(results.failed)  # before `take` forgets them
    known = results.resumed or bool(waiting)  # else no request can have been met before
    for request in requests:
        plan.read += 1
        key = identity(request.body, request.metadata) if known else b""
        if known and results.take(key):
            plan.finished += 1
        elif waiting and waiting[key] > 0:
            waiting[key] -= 1
            plan.open += 1
        elif not request.problem and key in failed:
            plan.failed_before += 1
        elif problem := request.problem or splitter.add(request):
            plan.unfit += 1
            if key not in recorded:
                kind = "bad_line" if request.problem else "bad_request"
                message = problem if request.problem else f"line {request.line}: {problem}"
                error = {"attempt": 0, "kind": kind, "status": None, "message": message, "batch": ""}
                results.write(request.body, [error], request.metadata)
                results.flush()
        else:
            plan.new += 1
            sample = plan.samples[splitter.target.model or request.model]
            if sample.next():
                sample.count(*estimate_tokens(request.body, endpoint.shape, estimate_text)[:2])
    splitter.finish()


def open_identities(ledger: Ledger) -> Counter[bytes]:
    """What open jobs hold, as often as they hold it."""
    found: Counter[bytes] = Counter()
    for part in ledger.open_parts():
        found.update(identities(ledger, part))
    return found


def room_for(part: Part, ledger: Ledger, results: ResultsFile, in_file: Iterator[Request]) -> Counter[bytes]:
    """How many result lines are still wanted for each request of a part: as many as it occurs, without its successes.

    in_file: the request file. What is no longer in it is wanted as often as the part holds it.
    """
    held = Counter(identities(ledger, part))
    keys = (identity(request.body, request.metadata) for request in in_file)
    wanted = held | Counter(key for key in keys if key in held)
    for key in wanted:
        while wanted[key] and results.take(key):
            wanted[key] -= 1
    return wanted


def failed_in_batches(results_path: Path) -> set[bytes]:
    """Identities of requests whose only results are failures of a batch: they are not sent again unasked."""
    failed, succeeded = set(), set()
    with results_path.open("rb", BLOCK) as file:
        for line in file:
            if b'"batch":' not in line:
                continue
            try:
                body, outcome, *rest = loads(line)
                key = identity(body, rest[0] if rest else None)
            except ValueError:
                continue
            if isinstance(outcome, list) and any(isinstance(error, dict) and "batch" in error for error in outcome):
                failed.add(key)
            elif not isinstance(outcome, list):
                succeeded.add(key)
    return failed - succeeded
