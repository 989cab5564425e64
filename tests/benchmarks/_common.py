"""What the benchmarks share: the local provider and the program in processes of their own, request files, tables.

PROGRAM in the environment names another copy of the program to measure, so that a long benchmark does not notice when
the file of the checkout is edited meanwhile.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import resource
    from collections.abc import Callable, Iterable, Iterator, Mapping

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(os.environ.get("PROGRAM") or ROOT / "api_request_parallel_processor.py").resolve()
PROVIDER = ROOT / "tests" / "local_provider.py"
BARE_LOOP = ROOT / "tests" / "benchmarks" / "bare_loop.py"
CHAT = "/v1/chat/completions"
VOCABULARIES = "https://openaipublic.blob.core.windows.net/encodings"
UNIT_OF_MAXRSS = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
CLIENT_CORE, SERVER_CORE = CORES[0], CORES[-1]


# ---- processes


def pin(pid: int, core: int) -> None:
    """Keep a process on one core, where the system can."""
    if hasattr(os, "sched_setaffinity") and CLIENT_CORE != SERVER_CORE:
        os.sched_setaffinity(pid, {core})


@dataclass
class Ended:
    """A process that has ended, and what it took; memory is the largest resident set, in bytes."""

    code: int
    started: float  # on the monotonic clock
    wall: float
    cpu: float  # user and system, in seconds
    memory: int
    said: str  # standard output and error


@dataclass
class Process:
    """A process of ours; what it prints goes to a file, so that no full pipe can stop it."""

    words: list[str]
    said: Path
    child: subprocess.Popen[bytes]
    started: float
    ended: Ended | None = None

    @classmethod
    def start(
        cls, words: Iterable[object], folder: Path, *, core: int | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start it, with our environment less any key, and `env` on top."""
        clean = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
        number, name = tempfile.mkstemp(prefix="said.", dir=folder)
        texts, started = list(map(str, words)), time.monotonic()
        child = subprocess.Popen(
            texts, stdin=subprocess.DEVNULL, stdout=number, stderr=number, env={**clean, **(env or {})}
        )
        os.close(number)
        if core is not None:
            pin(child.pid, core)
        return cls(texts, Path(name), child, started)

    @property
    def pid(self) -> int:
        return self.child.pid

    def running(self) -> bool:
        """Tell whether it still runs; the resources of an ended one are noted."""
        if self.ended is None:
            pid, status, used = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self._note(status, used)
        return self.ended is None

    def wait(self, seconds: float = 3600.0) -> Ended:
        """Wait for its end; a process that takes longer is killed and raises TimeoutError."""
        until = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"still running after {seconds:.0f} s: {' '.join(self.words)}\n{self.text()}")
            time.sleep(0.005)
        assert self.ended
        return self.ended

    def kill(self, number: int = signal.SIGKILL) -> Ended:
        """Send a signal and wait for the end."""
        with contextlib.suppress(ProcessLookupError):
            if self.ended is None:
                os.kill(self.pid, number)
        if self.ended is None:
            _, status, used = os.wait4(self.pid, 0)
            self._note(status, used)
        assert self.ended
        return self.ended

    def text(self) -> str:
        return self.said.read_text("utf-8", "replace")

    def _note(self, status: int, used: resource.struct_rusage) -> None:
        code = self.child.returncode = os.waitstatus_to_exitcode(status)
        memory, wall = used.ru_maxrss * UNIT_OF_MAXRSS, time.monotonic() - self.started
        self.ended = Ended(code, self.started, wall, used.ru_utime + used.ru_stime, memory, self.text())


def cpu_seconds(pid: int) -> float:
    """User and system time so far of a process that still runs."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists():
        fields = stat.read_text("ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    text = subprocess.run(["ps", "-o", "time=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout
    seconds = 0.0
    for part in text.strip().split(":"):
        seconds = seconds * 60 + float(part)
    return seconds


def program(requests: Path, results: Path, url: str, *flags: object, python: str = sys.executable) -> list[object]:
    """Return the command line of one run; CHAT is the endpoint unless the URL names one."""
    where = url if url.count("/") > 2 else url + CHAT
    files = ["--requests_filepath", requests, "--save_filepath", results]
    return [python, PROGRAM, *files, "--request_url", where, "--progress", "none", *flags]


NO_BUDGETS = ("--max_requests_per_minute", 0, "--max_tokens_per_minute", 0)


# ---- the local provider


@dataclass
class Provider:
    """The local provider in a process of its own."""

    process: Process
    url: str
    last: dict[str, Any] = field(default_factory=dict)

    def stats(self) -> dict[str, Any]:
        """Its counters; see tests/local_provider.py."""
        self.last = self._ask("/_stats")
        return self.last

    def change(self, **options: Any) -> None:
        """Change its options; reset=True zeroes counters and limits."""
        self._ask("/_control", json.dumps(options).encode())

    def _ask(self, path: str, data: bytes | None = None) -> dict[str, Any]:
        """Ask until it answers: during an outage it does not."""
        give_up = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(self.url + path, data=data, timeout=30) as reply:
                    answer: dict[str, Any] = json.load(reply)
                    return answer
            except OSError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.05)


@contextlib.contextmanager
def local_provider(folder: Path, *, core: int | None = None, **options: Any) -> Iterator[Provider]:
    """Run the local provider with the given options."""
    number, name = tempfile.mkstemp(prefix="port.", dir=folder)
    os.close(number)
    port, words = Path(name), [sys.executable, str(PROVIDER), "--exit_with_parent", "--port_file", name]
    for flag, value in options.items():
        if value is not False:
            words += [f"--{flag}"] if value is True else [f"--{flag}", as_flag(value)]
    process = Process.start(words, folder, core=core)
    try:
        while not (text := port.read_text("ascii").strip()):
            if not process.running():
                raise RuntimeError(process.text())
            time.sleep(0.01)
        yield Provider(process, f"http://127.0.0.1:{text}")
    finally:
        process.kill()


def as_flag(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


# ---- files and figures


def short_chat(number: int) -> dict[str, Any]:
    """A small chat request."""
    question = f"What is {number} plus {number + 1}?"
    return {
        "model": "gpt-4o-mini",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 20,
        "metadata": {"id": number},
    }


def write_lines(path: Path, values: Iterable[Any]) -> Path:
    """Write a JSONL file."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    return path


def write_chats(path: Path, count: int) -> Path:
    """Write so many small chat requests."""
    return write_lines(path, map(short_chat, range(count)))


@dataclass
class Lines:
    """What a results file holds: how often each request succeeded and failed, and a torn end if there is one."""

    succeeded: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    torn: bytes = b""

    @classmethod
    def read(cls, path: Path) -> Lines:
        """Read a results file; ValueError if a whole line of it is none."""
        found = cls()
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            if not line.endswith(b"\n"):
                found.torn = line
                continue
            match json.loads(line):
                case [dict() | str() as body, list() | dict() as outcome, *rest] if len(rest) < 3:
                    which = found.failed if isinstance(outcome, list) else found.succeeded
                    which[identity(body, rest[0] if rest else None)] += 1
                case _:
                    raise ValueError(f"no result line: {line[:200]!r}")
        return found


def identity(body: Any, metadata: Any = None) -> str:
    """What a request is recognised by."""
    return json.dumps([body, metadata], sort_keys=True)


def identity_of_line(line: str) -> str:
    """The identity of a line of a request file; what is no object stands for itself."""
    with contextlib.suppress(ValueError):
        body = json.loads(line)
        if isinstance(body, dict):
            metadata = body.pop("metadata", None)
            return identity(body, metadata)
    return identity(line.strip())


def unpack_vocabulary(folder: Path, *names: str) -> dict[str, str]:
    """Put vocabularies where tiktoken looks for them, so that nobody needs a network; gives the environment to use."""
    spec = find_spec("bpe_openai")  # not imported: the peak of our memory would become that of every child
    assert spec
    assert spec.origin
    place = folder / "vocabulary"
    place.mkdir(exist_ok=True)
    for name in names or ("o200k_base",):
        packed = Path(spec.origin).parent / "data" / f"{name}.tiktoken.gz"
        key = hashlib.sha1(f"{VOCABULARIES}/{name}.tiktoken".encode(), usedforsecurity=False).hexdigest()
        (place / key).write_bytes(gzip.decompress(packed.read_bytes()))
    return {"TIKTOKEN_CACHE_DIR": str(place)}


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="benchmark.", ignore_cleanup_errors=True) as name:
        yield Path(name)


def interleaved(times: int, *measures: Callable[[], float]) -> list[list[float]]:
    """Take the measures in turn, A B A B: whatever else the machine does meets all of them alike."""
    rounds = [[measure() for measure in measures] for _ in range(times)]
    return [list(values) for values in zip(*rounds, strict=True)]


def median_ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios of measures that were taken one after the other."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def table(head: str, rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """Lines of a Markdown table: `head` is its first line, its columns separated by |."""
    columns = [column.strip() for column in head.split("|")]
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def say(text: str) -> None:
    """Tell what happens, on standard error: standard output is the table."""
    print(text, file=sys.stderr, flush=True)
