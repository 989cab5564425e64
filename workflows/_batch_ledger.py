"""What was submitted to a Batch API: the ledger beside the results file, and the files of its parts."""

from __future__ import annotations

import json
import os
import shutil
from array import array
from dataclasses import asdict, dataclass, field, fields
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from api_request_parallel_processor import UsageError, identity, loads

if TYPE_CHECKING:
    from collections.abc import Iterator

# Of a part: what the provider gets; and for each of its lines one with the place of the body in it, its length, the
# metadata, and the request's own body where the provider gets another. Between them are tabs: JSON has none here.
FILES = ("upload", "metadata")
# The life of a part. What is open may still cost money or be asked twice; the processor refuses to run beside it.
PREPARED, UPLOADING, UPLOADED, SUBMITTING, SUBMITTED, COLLECTING, UNCLEAR = OPEN = (
    "prepared",  # split off; nothing has left this machine
    "uploading",
    "uploaded",  # to be submitted; also when the provider's queue was full
    "submitting",  # subtle: if this is found at a start, the provider may or may not have got it
    "submitted",
    "collecting",
    "unclear",  # cannot be found at the provider: the user decides
)
UNSENT = (PREPARED, UPLOADING, UPLOADED)
COLLECTED, RETURNED, DROPPED = CLOSED = ("collected", "returned", "dropped")


def private(path: str, flags: int) -> int:
    """Opener of a file that only its owner can read."""
    return os.open(path, flags, 0o600)


@dataclass(slots=True)
class Part:
    """One job of the ledger: a part of the request file."""

    tag: str  # begins its custom ids and ends its name
    name: str
    state: str = PREPARED
    open: bool = True
    id: str = ""  # of the job, at the provider
    file: str = ""  # id of the uploaded file
    word: str = ""  # the provider's own word for the state
    model: str = ""
    requests: int = 0
    bytes: int = 0
    done: int = 0
    failed: int = 0
    request_url: str = ""
    provider: str = ""
    hours: int = 24
    submitted: float = 0.0  # seconds since the epoch
    past: list[str] = field(default_factory=list)  # jobs that failed as a whole: never ours again
    cancelling: bool = False
    overtaken: bool = False  # somebody else wrote results while it was open, perhaps of its requests

    def move(self, state: str) -> None:
        """Change the state; `open` follows."""
        self.state, self.open = state, state in OPEN


class Ledger:
    """The file <results>.batch.json with the jobs, and the folder <results>.batch with what they were made of."""

    def __init__(self, results_path: Path, *, read_only: bool = False) -> None:
        """Read the ledger if there is one; UsageError if it is none. read_only: somebody else may be writing it."""
        self.path = Path(f"{results_path}.batch.json")
        self.folder = Path(f"{results_path}.batch")
        self.results_path, self.read_only = results_path, read_only
        self.parts: list[Part] = []
        self.left = (0, 0)  # the results file as this program left it, see `state_of`
        known = {item.name for item in fields(Part)}
        try:
            content = json.loads(self.path.read_bytes())
            self.left = (content["results_bytes"], content.get("results_changed", 0))
            self.parts = [Part(**{name: job[name] for name in known & job.keys()}) for job in content["jobs"]]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"the ledger {self.path} cannot be read ({error}); it says what was submitted: restore it, or move it "
                "away if you know that no job is open"
            ) from None

    def save(self) -> None:
        """Write the ledger: at once or not at all, and on the disk when this returns."""
        if self.read_only:
            return
        results = {"results_bytes": self.left[0], "results_changed": self.left[1]}
        content = {"version": 1, **results, "jobs": [asdict(part) for part in self.parts]}
        temporary = Path(f"{self.path}.new")
        with open(temporary, "wb", opener=private) as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def file(self, part: Part, what: str) -> Path:
        """Give the path of one of the FILES of a part."""
        return self.folder / f"{part.tag}.{what}.jsonl"

    def open_parts(self, *states: str) -> list[Part]:
        """Give the open parts, of some states if named."""
        return [part for part in self.parts if part.open and (part.state in states or not states)]

    def close(self, part: Part, state: str) -> None:
        """End a part, and remove its files."""
        part.move(state)
        self.save()
        self.sweep()

    def look_for_others(self) -> None:
        """Mark the open parts as overtaken if somebody else wrote results since this program did."""
        if state_of(self.results_path) != self.left:
            for part in self.open_parts():
                part.overtaken = True

    def leave_results(self) -> None:
        """Remember the results file as it is now, written by this program."""
        self.left = state_of(self.results_path)
        self.save()

    def drop_unsent(self) -> None:
        """Forget what is to be split anew: it never left this machine, or was overtaken before it was submitted."""
        stale = [part for part in self.open_parts(*UNSENT) if part.overtaken or part.state == PREPARED]
        self.parts = [part for part in self.parts if part not in stale]
        self.save()
        self.sweep()

    def sweep(self) -> None:
        """Remove files that no open part needs."""
        needed = {part.tag for part in self.open_parts()}
        if self.folder.is_dir():
            for path in list(self.folder.iterdir()):
                if path.name.partition(".")[0] not in needed:
                    path.unlink()
            if not needed:
                shutil.rmtree(self.folder)


def state_of(path: Path) -> tuple[int, int]:
    """Bytes of a file and when it was changed, in nanoseconds: tells whether somebody wrote to it."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


class Requests:
    """The requests of a part as the files of the part hold them: by number, read when asked for."""

    def __init__(self, ledger: Ledger, part: Part) -> None:
        """Open the files; the metadata, which are small, are mapped into memory. UsageError if one is missing."""
        try:
            with ledger.file(part, "metadata").open("rb") as file:
                self.metadata = mmap(file.fileno(), 0, access=ACCESS_READ)
            # subtle: outputs come in any order, so a buffer would be filled for every line
            self.upload = ledger.file(part, "upload").open("rb", buffering=0)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"what the open job {part.name} was made of cannot be read ({error}), and its results are matched by "
                f"it: restore {ledger.folder}, or move {ledger.path} away, and its requests are sent and paid again"
            ) from None
        self.starts = array("Q", [0])
        for line in iter(self.metadata.readline, b""):
            self.starts.append(self.starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.upload.close()
        self.metadata.close()

    def read(self, number: int) -> tuple[bytes, bytes]:
        """Give body and metadata of a request as JSON."""
        line = self.metadata[self.starts[number] : self.starts[number + 1] - 1]
        at, size, metadata, body = line.split(b"\t")
        if not body:
            body = read_at(self.upload, int(at), int(size))
        return body, metadata

    def identity(self, number: int) -> bytes:
        """Give what a request is recognised by."""
        body, metadata = self.read(number)
        return identity(loads(body), loads(metadata))


def read_at(file: IO[bytes], place: int, size: int) -> bytes:
    """Read so many bytes from a place in a file: in one call of the system, where it has that one."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, place)
    file.seek(place)
    return file.read(size)


def identities(ledger: Ledger, part: Part) -> Iterator[bytes]:
    """Give the identities of all requests of a part, in order."""
    with Requests(ledger, part) as requests:
        yield from map(requests.identity, range(len(requests)))
