"""The benchmark beside other tools: its own pieces, without any of those tools."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.benchmarks._peers import TOOLS, Job, with_semaphore
from tests.benchmarks.peers import MEASURES, OURS, Bench, Measure, Outcome, check, find, report, run_all

if TYPE_CHECKING:
    from pathlib import Path

LIMIT = {"requests_per_minute": 1200, "limit_kind": "second_bucket"}
TINY = {
    "fast": Measure(10, 5, {}),
    "second": Measure(30, 5, LIMIT, requests_per_minute=1200, worth=0.025, head_start=1.0),
}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs wait4")
def test_a_table_of_one(tmp_path: Path) -> None:
    """The program is measured; what is not installed stands in the table with its pip command."""
    bench, names = Bench(tmp_path, {OURS: (sys.executable, "")}), [OURS, *TOOLS]
    done = run_all(bench, names, TINY, rounds=1, jobs=1)
    assert set(done) == {OURS}
    for outcomes in done[OURS].values():
        assert [(outcome.answered, outcome.faults) for outcome in outcomes] == [(1.0, "")]
    assert done[OURS]["second"][0].use > 0
    lines = list(report(bench, names, done, TINY))
    assert len(lines) == 2 + len(names)
    assert len({line.count(" |") for line in lines if not line.startswith("|-")}) == 1
    assert "pip install 'openai[aiohttp]'" in next(line for line in lines if line.startswith("| openai SDK"))


def test_tools_are_found_by_their_packages() -> None:
    """The program is always there, the script of the cookbook only by its path."""
    found = find([sys.executable], "")
    assert OURS in found
    assert "cookbook script" not in found


def test_answers_are_checked(tmp_path: Path) -> None:
    """Missing, repeated and exchanged answers are told apart, in both formats."""
    results = tmp_path / "results.jsonl"
    reply = {"choices": [{"message": {"content": "You said: Item 2. x"}}]}
    lines: list[list[Any]] = [[0, "You said: Item 0. x"], [0, "You said: Item 0. x"], [1, "You said: Item 11. x"]]
    lines += [[{}, reply, {"id": 2}], [{}, ["error"], {"id": 3}]]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    assert check(results, 4) == (0.75, "1 missing, 1 twice, 1 of another request")
    assert check(tmp_path / "none", 4) == (0.0, "4 missing")


def test_at_most_so_many_at_once(tmp_path: Path) -> None:
    """The loop that the libraries get asks everything, as many at once as told, and survives failures."""
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(json.dumps(body) + "\n" for body in MEASURES["fast"].requests()), "utf-8")
    running, most = 0, 0

    async def ask(**body: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        text = body["messages"][0]["content"]
        if text.startswith("Item 7."):
            raise ConnectionError
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=f"You said: {text}"))])

    job = Job(str(requests), str(tmp_path / "results.jsonl"), "", in_flight=3)
    asyncio.run(with_semaphore(job, ask))
    count = MEASURES["fast"].count
    assert check(tmp_path / "results.jsonl", count) == ((count - 1) / count, "1 missing")
    assert most == 3


def test_budget_use_of_a_median(tmp_path: Path) -> None:
    """The table shows medians, and what went wrong in the worst round."""
    good = Outcome(1.0, "", 1.0, 2.0, 10.0, 1.0, 50.0, use=0.9, refused=0.01)
    bad = Outcome(0.5, "15 missing", 1.0, 2.0, 10.0, 1.0, 50.0, use=0.5, refused=0.03)
    done = {OURS: {"second": [good, bad, good]}}
    lines = list(report(Bench(tmp_path, {OURS: ("", "")}), [OURS], done, {"second": TINY["second"]}))
    assert lines[-1] == "| this program | 90% | 1.0% (15 missing) |"
