"""Several endpoints in one run: each paced on its own, the faster one takes more, one that is down is left out."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from api_request_parallel_processor import Tally, UsageError, process_api_requests_from_file
from tests.jobs import CHAT, KEY, chats, one_line_each, read_lines, virtually, write_lines
from tests.local_provider import LocalProvider, Options, Stats

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ALWAYS = 10**6
SETTINGS: dict[str, Any] = {"max_requests_per_minute": 0, "max_tokens_per_minute": 0, "progress": "none"}


class Shared(NamedTuple):
    """How a run over several local providers went."""

    tally: Tally
    lines: list[Any]
    stats: list[Stats]
    seconds: float


def share(
    folder: Path,
    requests: list[dict[str, Any]],
    servers: list[Options],
    *,
    limits: Callable[[list[str]], str] | None = None,
    later: tuple[float, Callable[[list[str]], str]] | None = None,
    **settings: Any,
) -> Shared:
    """Process requests with all of these servers; `limits` writes the file of endpoints, `later` changes it."""
    path, file = write_lines(folder / "job.jsonl", requests), folder / "endpoints"

    for options in servers:
        options.record_calls = True

    async def run() -> Shared:
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            providers = [await stack.enter_async_context(LocalProvider(options)) for options in servers]
            urls = [provider.url + CHAT for provider in providers]
            values = SETTINGS | {"request_url": urls, "api_key": KEY} | settings
            if limits:
                file.write_text(limits(urls))
                values["endpoints_filepath"] = str(file)
            if later:
                loop.call_later(later[0], lambda: file.write_text(later[1](urls)))
            began = loop.time()
            tally = await process_api_requests_from_file(str(path), **values)
            lines = read_lines(folder / "job_results.jsonl")
            return Shared(tally, lines, [provider.stats for provider in providers], loop.time() - began)

    return virtually(run())


def test_two_servers_give_the_sum_of_their_limits(tmp_path: Path) -> None:
    """One allows twice as much as the other: it gets twice as much, and both are used to the full, never beyond."""
    rates = [600, 300]
    servers = [Options(requests_per_minute=rate, limit_kind="second_slots", latency=0.5) for rate in rates]
    shared = share(
        tmp_path,
        requests := chats(2700),
        servers,
        limits=lambda urls: "".join(f"{url} - {rate} 0\n" for url, rate in zip(urls, rates, strict=True)),
    )
    assert shared.tally.exit_code == 0
    assert one_line_each(requests, shared.lines)
    assert shared.stats[0].calls / shared.stats[1].calls == pytest.approx(2, rel=0.02)
    assert shared.seconds <= 2700 / sum(rates) * 60 / 0.95
    assert shared.tally.refused <= 0.02 * 2700


def test_of_servers_that_queue_the_faster_one_gets_more(tmp_path: Path) -> None:
    """Without limits the one that answers faster takes more, and the slower one still works."""
    servers = [Options(service_slots=slots, latency=0.5) for slots in (16, 8)]
    shared = share(tmp_path, requests := chats(3000), servers)
    assert one_line_each(requests, shared.lines)
    assert 1.5 < shared.stats[0].calls / shared.stats[1].calls < 2.7
    assert shared.seconds <= 3000 / (16 + 8) * 0.5 / 0.95


@pytest.mark.parametrize("kind", ["refuse", "503", "hang"])
def test_one_that_is_down_is_left_out_and_probed(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """Nothing fails, the other goes on at its own pace meanwhile, and the one that comes back takes part again."""
    servers = [Options(latency=0.3), Options(latency=0.3, outage_schedule=[[2, 30, kind]])]
    requests = chats(1500)
    shared = share(tmp_path, requests, servers, max_requests_per_minute=600, request_timeout=5, max_attempts=2)
    assert shared.tally.exit_code == 0
    assert one_line_each(requests, shared.lines)
    assert "seems to be down" in caplog.text
    assert "answers again" in caplog.text
    calls = [call["time"] - shared.stats[1].calls_seen[0]["time"] for call in shared.stats[1].calls_seen]
    assert sum(15 < time < 28 for time in calls) < 20
    assert sum(time > 40 for time in calls) > 50
    assert shared.seconds < 115  # 75 s of both, 28 s of one, and what noticing takes


def test_one_that_refuses_the_key_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The other does its share; without any left the run stops."""
    servers = [Options(api_key="sk-another-key-0123456789"), Options()]
    shared = share(tmp_path, requests := chats(200), servers, max_requests_per_minute=6000)
    assert shared.tally.exit_code == 0
    assert one_line_each(requests, shared.lines)
    assert "is left out from now on" in caplog.text
    servers = [Options(api_key="sk-another-key-0123456789")] * 2
    shared = share(tmp_path, chats(220), servers, max_requests_per_minute=6000)
    assert (shared.tally.exit_code, shared.tally.finished_before, shared.tally.failed) == (3, 200, 0)


def test_limits_are_read_again_when_they_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A change of the file counts within seconds; one that cannot be read changes nothing."""

    def limits(rate: str) -> Callable[[list[str]], str]:
        return lambda urls: f"# my limits\n{urls[0]} - {rate} 0  # requests and tokens a minute\n\n"

    requests = chats(700)
    shared = share(tmp_path, requests, [Options()], limits=limits("60"), later=(20, limits("1200")))
    assert one_line_each(requests, shared.lines)
    assert "1200 requests" in caplog.text
    assert shared.seconds < 20 + 680 / 1200 * 60 + 65
    caplog.clear()
    shared = share(tmp_path, chats(800), [Options()], limits=limits("60"), later=(5, limits("many")))
    assert (shared.tally.exit_code, caplog.text.count("stay as they were")) == (0, 1)
    assert 55 < shared.seconds < 65


def test_several_keys_for_one_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key has limits of its own; none is written anywhere."""
    for name in ("KEY_A", "KEY_B"):
        monkeypatch.setenv(name, f"{KEY}-{name}")
    shared = share(tmp_path, chats(200), [Options()], api_key="", api_key_env="KEY_A KEY_B", max_requests_per_minute=60)
    assert shared.tally.exit_code == 0
    assert 60 < shared.seconds < 70  # a minute's budget of both at once, the rest when the minute is over
    assert not [file for file in tmp_path.iterdir() if KEY.encode() in file.read_bytes()]


@pytest.mark.parametrize(
    ("settings", "file", "told"),
    [
        ({"request_url": "http://a.test/v1 http://b.test/v1 http://c.test/v1", "api_key_env": "A B"}, None, "as many"),
        ({"request_url": "http://127.0.0.1/v1/embeddings http://127.0.0.1/v1"}, None, "different shapes"),
        ({"endpoints_filepath": "nothing"}, None, "cannot be read"),
        ({}, "", "no endpoint"),
        ({}, "http://127.0.0.1/v1\n", "URL key_env"),
        ({}, "http://127.0.0.1/v1 - 60 many\n", "line 1"),
        ({}, "\n\nhttp://127.0.0.1/v1 - 60 -5\n", "line 3"),
        ({}, "https://api.openai.com/v1 sk-a-key-itself 60 0\n", "name of a variable"),
        ({}, "https://api.openai.com/v1 gsk_8aKeyItself 60 0\n", "name of a variable"),
        ({}, "http://127.0.0.1/v1 - 60 0 0 0\n", "line 1"),
        ({}, "\nhttps://api.openai.com/v1 NO_SUCH_KEY 60 0\n", "NO_SUCH_KEY"),
    ],
)
def test_endpoints_that_cannot_be(tmp_path: Path, settings: dict[str, str], file: str | None, told: str) -> None:
    """What is wrong is said before anything is touched."""
    path = write_lines(tmp_path / "job.jsonl", chats(1))
    if file is not None:
        (tmp_path / "endpoints").write_text(file)
        settings = settings | {"endpoints_filepath": str(tmp_path / "endpoints")}
    with pytest.raises(UsageError, match=told):
        virtually(process_api_requests_from_file(str(path), **(SETTINGS | settings)))
    assert {found.name for found in tmp_path.iterdir()} <= {"job.jsonl", "endpoints"}
