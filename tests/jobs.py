"""What the tests of whole runs share: virtual time, request lines, runs in this process and of the real program."""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from api_request_parallel_processor import Tally, process_api_requests_from_file
from tests.local_provider import LocalProvider, Options, Stats

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Iterator, Sequence

PROGRAM = Path(__file__).resolve().parent.parent / "api_request_parallel_processor.py"
CHAT = "/v1/chat/completions"
KEY = "sk-a-key-for-tests-0123456789"
TICK_SECONDS = 1e-6  # passes in any case, so that what is due a little too early is due soon
GRACE_SECONDS = 0.002  # loopback delivers at once; this much is left for the kernel's threads
T = TypeVar("T")


# ==== virtual time ====================================================================================================


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still, and jumps to the next timer when nothing is readable for a moment.

    Sockets are real. The idea is trio's MockClock with autojump. What goes on in threads takes no time.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(JumpingSelector(self))

    def time(self) -> float:
        return self.now


class JumpingSelector(selectors.DefaultSelector):
    """A selector that lets time pass on its loop instead of waiting."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self.loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(min(timeout, GRACE_SECONDS) if timeout else timeout)
        self.loop.now += timeout if timeout and not ready else TICK_SECONDS
        return ready


def virtually(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(coroutine)


# ==== files ===========================================================================================================


def chat(text: str = "hello", **more: Any) -> dict[str, Any]:
    """Make a chat request that says this."""
    return {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}], **more}


def chats(number: int, **more: Any) -> list[dict[str, Any]]:
    """Make that many chat requests, told apart by text and metadata; "question 003." is contained in one only."""
    return [chat(f"question {i:03}.", metadata={"id": i}, **more) for i in range(number)]


def write_lines(path: Path, requests: Iterable[Any]) -> Path:
    """Write a request file; bytes are written as they are."""
    lines = (line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in requests)
    path.write_bytes(b"".join(lines))
    return path


def read_lines(path: Path) -> list[Any]:
    """Read a results file; every line must be whole."""
    data = path.read_bytes() if path.exists() else b""
    assert data.endswith(b"\n") or not data, "the last line is torn"
    return [json.loads(line) for line in data.splitlines()]


def succeeded(line: Any) -> bool:
    """Tell a successful result line."""
    return isinstance(line[1], dict)


def one_line_each(requests: Iterable[Any], results: Iterable[Any]) -> bool:
    """Tell whether every request has exactly one line, with its metadata."""
    wanted = sorted(json.dumps([{k: v for k, v in r.items() if k != "metadata"}, r.get("metadata")]) for r in requests)
    return wanted == sorted(json.dumps([line[0], line[2] if len(line) > 2 else None]) for line in results)


# ==== runs in this process ============================================================================================


@dataclass
class Played:
    """How a run in this process went."""

    tally: Tally
    lines: list[Any]
    stats: Stats
    seconds: float  # virtual
    results: Path
    kinds: list[list[str]] = field(init=False)  # of the errors of each failed line
    by_id: dict[Any, Any] = field(init=False)  # the line of each metadata id

    def __post_init__(self) -> None:
        self.kinds = [[error["kind"] for error in line[1]] for line in self.lines if not succeeded(line)]
        marked = (line for line in self.lines if len(line) > 2 and isinstance(line[2], dict))
        self.by_id = {line[2]["id"]: line for line in marked if isinstance(line[2].get("id"), int)}


def play(folder: Path, requests: Iterable[Any], options: Options | None = None, **settings: Any) -> Played:
    """Process requests against a local provider with these options, in virtual time over real sockets."""
    path = write_lines(folder / "job.jsonl", requests)
    options = options or Options()
    options.record_calls = options.record_bodies = True
    values = {"max_requests_per_minute": 60000, "max_tokens_per_minute": 0, "api_key": KEY, "progress": "none"}
    endpoint = settings.pop("path", CHAT)

    async def run() -> Played:
        async with LocalProvider(options) as provider:
            loop = asyncio.get_running_loop()
            began = loop.time()
            values["request_url"] = provider.url + endpoint
            tally = await process_api_requests_from_file(str(path), **(values | settings))
            results = path.with_name("job_results.jsonl")
            return Played(tally, read_lines(results), provider.stats, loop.time() - began, results)

    return virtually(run())


# ==== runs of the real program ========================================================================================


def clean_environment(**more: str) -> dict[str, str]:
    """Return an environment without this machine's keys and proxies."""
    names = ("PATH", "HOME", "LANG", "SYSTEMROOT", "TMPDIR", "TIKTOKEN_CACHE_DIR", "VIRTUAL_ENV")
    return {name: os.environ[name] for name in names if name in os.environ} | {"OPENAI_API_KEY": KEY} | more


def command(path: Path | str, url: str = "", *flags: str) -> list[str]:
    """Return the command line of the real program."""
    words = [sys.executable, str(PROGRAM), "--requests_filepath", str(path), "--progress", "none"]
    return [*words, *(["--request_url", url] if url else []), *flags]


def run_program(path: Path | str, url: str = "", *flags: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the real program to its end; more goes to subprocess.run, `environment` replaces the clean one."""
    environment = more.pop("environment", None)
    if environment is None:
        environment = clean_environment()
    settings = {"capture_output": True, "timeout": 60, "env": environment, **more}
    return subprocess.run(command(path, url, *flags), check=False, **settings)


def told(done: subprocess.CompletedProcess[bytes]) -> str:
    """Return what a program printed on standard error."""
    return done.stderr.decode("utf-8", "replace")


class ProviderProcess:
    """A local provider as a process of its own, for runs that are killed."""

    def __init__(self, folder: Path, *flags: Sequence[str] | str) -> None:
        self.port_file = folder / "port"
        self.words = [sys.executable, str(PROGRAM.parent / "tests" / "local_provider.py"), "--exit_with_parent"]
        self.words += ["--port_file", str(self.port_file), *map(str, flags)]
        self.url = ""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(self.words, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.url = self.process.stdout.readline().removeprefix("listening on ").strip()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate()

    def ask(self, path: str, changes: dict[str, Any] | None = None) -> Any:
        """Ask /_stats or change options through /_control."""
        data = json.dumps(changes).encode() if changes is not None else None
        with build_opener(ProxyHandler({})).open(self.url + path, data, timeout=20) as reply:
            return json.loads(reply.read())


# ==== servers that others wrote =======================================================================================


@contextmanager
def foreign_server(words: Sequence[str], url: str, folder: Path, **environment: str) -> Iterator[None]:
    """Run a server as a process of its own from when `url` answers; what it prints goes to a file in the folder."""
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=output, stderr=output, env=clean_environment(**environment)
        )
    try:
        opener, until = build_opener(ProxyHandler({})), time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text("utf-8", "replace")[-3000:]
            assert time.monotonic() < until, f"{words[0]} does not answer at {url}; see {log}"
            with suppress(URLError, ConnectionError), opener.open(url, timeout=5):
                break
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=10)
        process.kill()
        process.communicate()


def free_port() -> int:
    """Find a port that nobody listens to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
