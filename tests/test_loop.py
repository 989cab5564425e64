"""The loop over real sockets in virtual time: what a provider does, and which result lines that makes."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from api_request_parallel_processor import Run, UsageError, process_api_requests_from_file
from tests.jobs import CHAT, KEY, chat, chats, one_line_each, play, read_lines, succeeded, virtually, write_lines
from tests.local_provider import LocalProvider, Options

if TYPE_CHECKING:
    from pathlib import Path

ALWAYS = 10**6


def fails(text: str, **rule: Any) -> dict[str, Any]:
    """Make a rule: requests that contain this are answered so, for ever or `times` times."""
    return {"contains": text, **rule}


def attempts(line: Any) -> list[tuple[int, str, int | None]]:
    """Return number, kind and status of each error of a failed line."""
    return [(error["attempt"], error["kind"], error["status"]) for error in line[1]]


# ---- golden triples: one request that the provider treats so, between others that succeed ----------------------------

TRIPLES: dict[str, tuple[dict[str, Any], list[tuple[int, str, int | None]] | None]] = {
    "500 twice, then well": ({"kind": "internal", "times": 2}, None),
    "500 for ever": ({"kind": "internal"}, [(n, "server_error", 500) for n in (1, 2, 3)]),
    "reset for ever": ({"fault": "reset"}, [(n, "connection", None) for n in (1, 2, 3)]),
    "closed without a reply": ({"fault": "early_close"}, [(n, "connection", None) for n in (1, 2, 3)]),
    "hangs for ever": ({"fault": "hang"}, [(n, "timeout", None) for n in (1, 2, 3)]),
    "trickles for ever": ({"fault": "trickle"}, [(n, "timeout", 200) for n in (1, 2, 3)]),
    "truncated for ever": ({"fault": "truncated"}, [(n, "connection", 200) for n in (1, 2, 3)]),
    "html for ever": ({"fault": "html_200"}, [(n, "bad_reply", 200) for n in (1, 2, 3)]),
    "half a JSON for ever": ({"fault": "bad_json"}, [(n, "bad_reply", 200) for n in (1, 2, 3)]),
    "nothing for ever": ({"fault": "empty"}, [(n, "bad_reply", 200) for n in (1, 2, 3)]),
    "an error under 200": ({"fault": "error_200"}, [(n, "server_error", 200) for n in (1, 2, 3)]),
    "too large at once": ({"fault": "huge"}, [(1, "too_large", 200)]),
    "a bomb at once": ({"fault": "gzip_bomb"}, [(1, "too_large", 200)]),
    "bad request at once": ({"status": 400, "body": {"error": {"message": "no"}}}, [(1, "bad_request", 400)]),
    "unknown model at once": ({"kind": "missing"}, [(1, "bad_request", 404)]),
    "filtered at once": ({"kind": "filtered"}, [(1, "content_filter", 400)]),
    "refused 40 times, then well": ({"kind": "requests", "times": 40}, None),
    "wrong content type": ({"fault": "wrong_content_type"}, None),
}


@pytest.mark.parametrize("name", TRIPLES)
def test_what_a_provider_does_to_one_request(tmp_path: Path, name: str) -> None:
    """Attempts are counted and listed one by one, refusals use up none, and the others do not notice."""
    rule, expected = TRIPLES[name]
    if "kind" in rule:
        rule = {"status": {"missing": 404, "filtered": 400, "requests": 429}.get(rule["kind"], 500), **rule}
    options = Options(statuses=[fails("question 007.", **rule)], huge_megabytes=3, latency=1.0, trickle_seconds=1.0)
    options.refusal_latency = 3.0  # so that it is not the first reply of all
    limits = {"max_attempts": 3, "request_timeout": 20, "max_reply_megabytes": 2}
    requests = chats(12)
    played = play(tmp_path, requests, options, **limits)
    assert one_line_each(requests, played.lines)
    assert {key for key, line in played.by_id.items() if not succeeded(line)} == ({7} if expected else set())
    if expected:
        assert attempts(played.by_id[7]) == expected
        assert all(error["message"] for error in played.by_id[7][1])
    assert played.tally.exit_code == bool(expected)
    assert (played.tally.succeeded, played.tally.failed) == (12 - bool(expected), int(bool(expected)))


def test_failures_before_a_success_are_not_in_its_line(tmp_path: Path) -> None:
    """A success is [request, response, metadata], however many attempts it took; the details tell how many."""
    options = Options(statuses=[fails("003.", times=2, kind="internal"), fails("003.", times=3, status=429)])
    played = play(tmp_path, chats(5), options, save_details=True)
    line = played.by_id[3]
    assert succeeded(line)
    assert (line[3]["attempts"], line[3]["refusals"], line[3]["line"]) == (3, 3, 4)
    assert {key: type(value) for key, value in line[3].items()} == {
        "line": int,
        "attempts": int,
        "refusals": int,
        "started": str,
        "seconds": float,
        "estimated_tokens": int,
        "tokens": int,
    }
    assert line[3]["tokens"] == line[1]["usage"]["total_tokens"]


def test_details_of_lines_without_metadata_and_of_bad_lines(tmp_path: Path) -> None:
    """With details, metadata that is absent stands as null, also for a line that could not be sent."""
    played = play(tmp_path, [chat(), b"nonsense\n"], save_details=True)
    assert [len(line) for line in played.lines] == [4, 4]
    assert [line[2] for line in played.lines] == [None, None]
    bad = next(line for line in played.lines if not succeeded(line))
    assert (bad[3]["line"], bad[3]["attempts"], bad[3]["tokens"]) == (2, 0, None)


def test_of_refusals_only_the_last_is_listed(tmp_path: Path) -> None:
    """Errors are one per attempt; however often the provider refused, that is one entry."""
    rules = [fails("001.", times=5, status=429), fails("001.", kind="internal")]
    played = play(tmp_path, chats(3), Options(statuses=rules), max_attempts=2, save_details=True)
    kinds = Counter(error["kind"] for error in played.by_id[1][1])
    assert kinds == {"rate_limit": 1, "server_error": 2}
    assert (played.by_id[1][3]["attempts"], played.by_id[1][3]["refusals"]) == (2, 5)


def test_a_reply_that_is_an_array_is_kept_as_an_object(tmp_path: Path) -> None:
    """A list in the second place means failure, so that a bare array is wrapped."""
    options = Options(statuses=[{"status": 200, "body": [{"embedding": [0.5]}]}])
    played = play(tmp_path, [{"model": "m", "input": "x"}], options, path="/v1/embeddings")
    assert played.lines == [[{"model": "m", "input": "x"}, {"data": [{"embedding": [0.5]}]}]]


# ---- hopeless runs ---------------------------------------------------------------------------------------------------

HOPELESS: dict[str, dict[str, Any]] = {
    "key refused": {"status": 401},
    "forbidden": {"status": 403},
    "no money": {"status": 402},
    "quota gone": {"kind": "no_money", "status": 429},
}


@pytest.mark.parametrize("name", HOPELESS)
@pytest.mark.parametrize("good_before", [0, 30])
def test_a_hopeless_run_stops_and_marks_nothing_failed(tmp_path: Path, name: str, good_before: int) -> None:
    """What was refused has no line, the reason stands in the provider's own words, and a later run finishes."""
    words = "Incorrect API key provided: balance or quota, in words of its own"
    body = {"error": {"message": words, "type": "insufficient_quota", "code": "insufficient_quota"}}
    body = body if name == "quota gone" else {"error": {"message": words}}
    rules = [fails("", times=good_before, fault="wrong_content_type")] if good_before else []
    options = Options(statuses=[*rules, {**HOPELESS[name], "body": body}], latency=0.5)
    requests = chats(200)
    played = play(tmp_path, requests, options)
    assert played.tally.exit_code == 3
    assert words in played.tally.stop_reason
    assert played.seconds < 60
    assert all(map(succeeded, played.lines))
    assert len(played.lines) == good_before
    assert played.stats.calls < 150
    again = play(tmp_path, requests)
    assert again.tally.exit_code == 0
    assert one_line_each(requests, again.lines)


def test_the_reason_of_a_stop_ends_once(tmp_path: Path) -> None:
    """The provider's own full stop, of whatever script, is not followed by another."""
    played = play(tmp_path, chats(1), Options(statuses=[{"status": 401, "body": {"message": "无效的密钥。"}}]))
    assert played.tally.stop_reason.startswith("无效的密钥. Check")


@pytest.mark.parametrize("status", [404, 405])
def test_a_wrong_address_stops_at_the_first_reply(tmp_path: Path, status: int) -> None:
    """404 or 405 as the first reply blames the address, not the requests."""
    played = play(tmp_path, chats(100), Options(statuses=[{"status": status, "body": "nothing here"}]))
    assert played.tally.exit_code == 3
    assert played.lines == []
    assert played.seconds < 10
    assert "--request_url" in played.tally.stop_reason


def test_twenty_first_replies_of_one_reason_stop_the_run(tmp_path: Path) -> None:
    """The file is wrong, not a line: the run stops, those twenty keep their failed lines, the rest is untouched."""
    body = {"error": {"message": "Unsupported parameter: 'max_tokens'", "code": "unsupported_parameter"}}
    played = play(tmp_path, chats(200), Options(statuses=[{"status": 400, "body": body}]))
    assert played.tally.exit_code == 3
    assert played.kinds == [["bad_request"]] * 20
    assert "Unsupported parameter" in played.tally.stop_reason


def test_different_reasons_or_one_success_do_not_stop_the_run(tmp_path: Path) -> None:
    """Sixty hopeless requests among good ones are failed lines and nothing more."""
    rule = {"status": 400, "body": {"error": {"message": "too long", "code": "context_length_exceeded"}}}
    rules = [fails(f"question {i:03}.", **rule) for i in range(5, 65)]
    played = play(tmp_path, chats(70), Options(statuses=rules, refusal_latency=5.0))
    assert played.tally.exit_code == 1
    assert (played.tally.succeeded, played.tally.failed) == (10, 60)


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    """The key goes nowhere else; the message names the target."""
    target = "http://127.0.0.1:1/elsewhere"
    played = play(tmp_path, chats(3), Options(faults={"redirect": 1.0}, redirect_to=target))
    assert target in played.tally.stop_reason + str(played.lines)
    assert played.stats.paths["followed_redirect"] == 0
    assert played.tally.succeeded == 0


def test_a_failure_that_asks_for_a_pause_gets_it(tmp_path: Path) -> None:
    """Retry-After of an overloaded server holds for the request that met it, and the others go on."""
    rules = [fails("003.", times=2, status=503, body="busy", headers={"Retry-After": "40"})]
    played = play(tmp_path, chats(30), Options(statuses=rules), max_attempts=3)
    assert played.tally.exit_code == 0
    assert 80 <= played.seconds < 100
    assert played.stats.calls == 32


# ---- outages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["refuse", "503", "hang"])
@pytest.mark.parametrize(("number", "latency"), [(400, 0.3), (6, 3.0)])
def test_an_outage_fails_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, number: int, latency: float
) -> None:
    """A minute without the provider costs a minute; it is announced, probed gently, and nobody's attempts."""
    options = Options(latency=latency, outage_schedule=[[1, 61, kind]])
    settings = {"max_requests_per_minute": 1200 if number > 100 else 60, "request_timeout": 15, "max_attempts": 2}
    played = play(tmp_path, requests := chats(number), options, **settings)
    assert played.tally.exit_code == 0
    assert one_line_each(requests, played.lines)
    assert "provider" in caplog.text
    assert "down" in caplog.text
    assert played.seconds < 62 + 45
    during = [call["time"] - played.stats.started for call in played.stats.calls_seen]
    assert sum(15 < moment < 60 for moment in during) <= 60


def test_an_outage_under_long_answers_is_one_outage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Answers to what was asked before the outage are no sign of life: it is told once, and probed gently."""
    options = Options(latency=20, latency_spread=0.8, outage_schedule=[[2, 62, "503"]])
    played = play(tmp_path, chats(350), options, max_requests_per_minute=1200)
    assert played.tally.exit_code == 0
    assert caplog.text.count("down") <= 3
    during = [call["time"] - played.stats.started for call in played.stats.calls_seen]
    assert sum(12 < moment < 60 for moment in during) <= 60
    assert sum(40 < moment < 60 for moment in during) >= 2


def test_probes_of_an_outage_stay_within_the_budget(tmp_path: Path) -> None:
    """The requests per minute are a ceiling on what starts in any minute, whatever the provider's state."""
    options = Options(outage_schedule=[[0, 300, "503"]])
    played = play(tmp_path, chats(20), options, max_requests_per_minute=6)
    moments = [call["time"] for call in played.stats.calls_seen]
    assert max(sum(then <= moment < then + 60 for moment in moments) for then in moments) <= 6


@pytest.mark.parametrize("kind", ["refuse", "503"])
def test_no_success_for_long_gives_up(tmp_path: Path, kind: str) -> None:
    """After --give_up_minutes the run stops, nothing is marked failed, and a later run goes on."""
    requests = chats(50)
    played = play(tmp_path, requests, Options(outage_schedule=[[1, ALWAYS, kind]]), give_up_minutes=2,
                  max_requests_per_minute=600)  # fmt: skip
    assert played.tally.exit_code == 3
    assert all(map(succeeded, played.lines))
    assert 120 < played.seconds < 180
    assert "give_up_minutes" in played.tally.stop_reason
    assert play(tmp_path, requests).tally.exit_code == 0


def test_the_last_request_uses_up_its_attempts(tmp_path: Path) -> None:
    """With nothing else to compare, an outage cannot be told from a request that fails."""
    played = play(tmp_path, chats(1), Options(outage="503"), max_attempts=3)
    assert played.tally.exit_code == 1
    assert attempts(played.lines[0]) == [(n, "server_error", 503) for n in (1, 2, 3)]


@pytest.mark.parametrize("fault", ["hang", "reset", "truncated"])
def test_a_few_poisoned_requests_at_the_end_are_no_outage(tmp_path: Path, fault: str) -> None:
    """Two of ten that never get an answer fail after their attempts, instead of being asked for half an hour."""
    rules = [fails("question 003.", fault=fault), fails("question 008.", fault=fault)]
    played = play(tmp_path, chats(10), Options(statuses=rules), max_attempts=3, request_timeout=30, give_up_minutes=5)
    assert played.tally.exit_code == 1
    assert {key for key, line in played.by_id.items() if not succeeded(line)} == {3, 8}
    assert len(played.by_id[3][1]) == len(played.by_id[8][1]) == 3


def test_out_of_attempts_among_others_waits_for_a_sign_of_life(tmp_path: Path) -> None:
    """A request that failed for good while nobody else answers is not marked failed if an outage turns out."""
    options = Options(latency=40, outage_schedule=[[1, 41, "503"]])
    played = play(tmp_path, chats(60), options, max_requests_per_minute=600, max_attempts=1)
    assert played.tally.exit_code == 0
    assert played.tally.failed == 0


def test_a_storm_of_faults(tmp_path: Path) -> None:
    """A tenth each of seven faults: every request succeeds, and the errors add up to the attempts."""
    names = ("error_500", "reset", "hang", "truncated", "html_200", "error_200", "error_429")
    options = Options(faults=dict.fromkeys(names, 0.1), latency=0.5, latency_spread=0.5, told_wait=0.5)
    requests = chats(100)
    played = play(tmp_path, requests, options, max_attempts=60, request_timeout=10, save_details=True)
    assert played.tally.exit_code == 0
    assert one_line_each(requests, played.lines)
    details = [line[3] for line in played.lines]
    assert sum(detail["attempts"] + detail["refusals"] for detail in details) == played.stats.calls
    assert sum(detail["refusals"] for detail in details) == played.stats.faults["error_429"]


def test_all_failed_attempts_are_in_the_lists(tmp_path: Path) -> None:
    """With few attempts the failed lines list exactly the calls that were made for them."""
    options = Options(faults={"error_500": 0.3, "bad_json": 0.3}, latency=0.2)
    played = play(tmp_path, chats(120), options, max_attempts=2, save_details=True)
    failed = [line for line in played.lines if not succeeded(line)]
    assert failed
    assert played.tally.exit_code == 1
    assert all([error["attempt"] for error in line[1]] == [1, 2] for line in failed)
    assert sum(line[3]["attempts"] for line in played.lines) == played.stats.calls


def test_retries_and_new_lines_take_turns(tmp_path: Path) -> None:
    """Under a tight budget and many failures, new lines go on being started between the retries."""
    options = Options(faults={"error_500": 0.6}, latency=0.2, seed=3)
    played = play(tmp_path, chats(80), options, max_requests_per_minute=120, max_attempts=40)
    firsts: dict[str, int] = {}
    for number, call in enumerate(played.stats.calls_seen):
        firsts.setdefault(call["sha256"], number)
    assert len(firsts) == 80
    order = sorted(firsts.values())
    assert order[40] < 0.6 * played.stats.calls
    assert played.tally.exit_code == 0


# ---- budgets and money -----------------------------------------------------------------------------------------------


def test_the_budget_of_requests_is_a_ceiling_for_any_minute(tmp_path: Path) -> None:
    """No sixty seconds hold more starts than allowed, retries included."""
    options = Options(latency=0.1, faults={"error_500": 0.2})
    played = play(tmp_path, chats(100), options, max_requests_per_minute=40, max_attempts=9)
    moments = [call["time"] for call in played.stats.calls_seen]
    assert max(sum(then <= moment < then + 60 for moment in moments) for then in moments) <= 40


def test_requests_above_the_token_budget_get_their_turn(tmp_path: Path) -> None:
    """A request that costs more than a minute's tokens starts when the minute before is empty, and does not block."""
    requests = [chat("word " * 3000, max_tokens=10), *chats(3, max_tokens=10), chat("word " * 2500, max_tokens=10)]
    played = play(tmp_path, requests, max_tokens_per_minute=1000)
    assert played.tally.exit_code == 0
    assert one_line_each(requests, played.lines)


def test_shortest_time_between_starts(tmp_path: Path) -> None:
    """--seconds_to_sleep_each_loop holds two starts apart."""
    played = play(tmp_path, chats(10), seconds_to_sleep_each_loop=2)
    moments = [call["time"] for call in played.stats.calls_seen]
    assert min(b - a for a, b in pairwise(moments)) >= 1.99


def test_at_most_so_many_in_flight(tmp_path: Path) -> None:
    """--max_concurrent_requests is a ceiling."""
    played = play(tmp_path, chats(40), Options(latency=1), max_concurrent_requests=3)
    assert played.stats.max_in_flight == 3
    assert played.tally.exit_code == 0


def test_the_first_line_that_fails_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once, with what to do about it; the others are in the results."""
    play(tmp_path, chats(5), Options(statuses=[fails("question", kind="missing")]))
    assert caplog.text.count('Check "model"') == 1


@pytest.mark.parametrize(("output_tokens", "number"), [(16, 400), (900, 20)])
def test_no_more_is_spent_than_allowed(tmp_path: Path, output_tokens: int, number: int) -> None:
    """--max_cost is used and holds, however much longer the answers are than expected before there is one."""
    options = Options(latency=1, completion_tokens=output_tokens)
    settings = {"input_price": 1.0, "output_price": 1000.0, "max_cost": 5.0}
    requests = chats(number, max_tokens=900)
    played = play(tmp_path, requests, options, **settings)
    assert played.tally.exit_code == 3
    price = output_tokens * settings["output_price"] / 1e6
    assert settings["max_cost"] - 1.1 * price < played.tally.spent <= settings["max_cost"]
    assert "--max_cost" in played.tally.stop_reason
    assert all(map(succeeded, played.lines))
    assert play(tmp_path, requests, options).tally.exit_code == 0


def test_more_than_the_whole_allowance_at_worst_is_tried_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A generous cap does not keep a run from spending what it may; what answers cost is learned from the first."""
    caplog.set_level("INFO", "api_request_parallel_processor")
    options = Options(latency=1, completion_tokens=16)
    settings = {"input_price": 1.0, "output_price": 1000.0, "max_cost": 1.0}
    played = play(tmp_path, chats(100, max_tokens=10_000), options, **settings)
    assert played.tally.exit_code == 3
    assert 0.9 < played.tally.spent <= 1.0
    assert " of about 1." in caplog.text  # what the whole file would have cost


def test_what_is_spent_beyond_the_allowance_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Answers that vary overshoot by their difference from what was expected, at most; the summary says so."""
    caplog.set_level("INFO", "api_request_parallel_processor")
    options = Options(latency=1, completion_tokens=400, completion_spread=1.5)
    settings = {"input_price": 1.0, "output_price": 1000.0, "max_cost": 5.0}
    played = play(tmp_path, chats(100), options, **settings)
    assert played.tally.exit_code == 3
    longest = max(line[1]["usage"]["completion_tokens"] for line in played.lines)
    assert played.tally.spent < 5.0 + played.stats.max_in_flight * longest * settings["output_price"] / 1e6
    assert (played.tally.spent > 5.0) == ("longer than expected" in caplog.text)


def test_cached_tokens_have_a_price_of_their_own(tmp_path: Path) -> None:
    """They are part of the input, and cheaper where --cached_input_price says so."""
    prices = {"input_price": 1000.0, "output_price": 0.0, "cached_input_price": 100.0}
    played = play(tmp_path, chats(10), Options(cached_tokens=5), **prices)
    assert played.tally.cached_tokens == 50
    assert played.tally.spent == pytest.approx((1000 * (played.tally.prompt_tokens - 50) + 100 * 50) / 1e6)


# ---- resuming within one process -------------------------------------------------------------------------------------


def test_failed_requests_are_tried_again_and_leave_one_line(tmp_path: Path) -> None:
    """A second run asks only for what failed, and drops the old failed lines when it ends."""
    requests = [*chats(10), b"nonsense\n"]
    first = play(tmp_path, requests, Options(statuses=[fails("00", times=3, status=400)]))
    assert (first.tally.exit_code, first.tally.failed) == (1, 4)
    second = play(tmp_path, requests)
    assert (second.stats.calls, second.tally.finished_before, second.tally.failed) == (3, 7, 1)
    assert len(second.lines) == 11
    assert one_line_each(chats(10), [line for line in second.lines if succeeded(line)])


def test_changed_files_between_runs(tmp_path: Path) -> None:
    """Lines may be moved, inserted and deleted; keys may change places; duplicates count one by one."""
    twins = [chat("twin"), chat("twin"), chat("twin", metadata=None)]
    play(tmp_path, [*chats(6), *twins])
    turned = [{key: request[key] for key in reversed(request)} for request in chats(6)[::-1]]
    requests = [*turned[:2], chat("new"), *turned[3:], *twins, chat("twin"), chat("twin", metadata={})]
    played = play(tmp_path, requests)
    assert sorted(call["body"].count("twin") for call in played.stats.calls_seen) == [0, 1, 1]
    assert len(played.lines) == 6 + 3 + 3
    assert played.tally.exit_code == 0


def test_two_signals_in_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has arrived by then is recorded, and the run is no finished one: old failed lines stay."""
    first = play(tmp_path, chats(3), Options(statuses=[fails("002.", status=400)]))
    assert first.tally.failed == 1
    wait = Run.wait

    async def wait_until_two_signals_come(self: Run, until: float) -> None:
        await wait(self, until)
        if self.arrived:
            self.signal, self.force = signal.SIGINT, True

    monkeypatch.setattr(Run, "wait", wait_until_two_signals_come)
    options = Options(latency=0.0, statuses=[fails("002.", fault="hang")])
    second = play(tmp_path, [*chats(3), *chats(9)[5:]], options)
    assert second.tally.succeeded > 0
    assert len(second.lines) == 3 + second.tally.succeeded
    assert not succeeded(second.by_id[2])
    assert second.tally.exit_code == 128 + signal.SIGINT


def test_limit_counts_finished_requests_and_keeps_the_rest(tmp_path: Path) -> None:
    """--limit takes the first lines of the file, finished ones included, blank ones not."""
    requests: list[Any] = [chats(10)[0], b"\n", b"  \r\n", *chats(10)[1:]]
    assert [play(tmp_path, requests, limit=n).stats.calls for n in (3, 3, 5)] == [3, 0, 2]
    final = play(tmp_path, requests)
    assert (final.stats.calls, final.tally.finished_before) == (5, 5)


def test_restart_keeps_the_old_results_under_another_name(tmp_path: Path) -> None:
    """--restart asks for everything again."""
    play(tmp_path, chats(4))
    assert play(tmp_path, chats(4), restart=True).stats.calls == 4
    assert len(list(tmp_path.glob("job_results.*.jsonl"))) == 1


def test_an_empty_request_file_is_a_finished_run(tmp_path: Path) -> None:
    """Nothing to do is no error."""
    assert play(tmp_path, []).tally.exit_code == 0
    assert play(tmp_path, [b"\n\r\n \n"]).tally.exit_code == 0


# ---- from Python -----------------------------------------------------------------------------------------------------


def test_two_jobs_in_one_process(tmp_path: Path) -> None:
    """Runs from Python may go on side by side, but not for the same results."""

    async def run() -> None:
        async with LocalProvider(Options(latency=1)) as provider:
            paths = [write_lines(tmp_path / f"{name}.jsonl", chats(5)) for name in "ab"]
            jobs = [
                process_api_requests_from_file(
                    str(path), request_url=provider.url + CHAT, api_key=KEY, progress="none", save_filepath=save
                )
                for path, save in [(paths[0], ""), (paths[1], ""), (paths[1], str(tmp_path / "a_results.jsonl"))]
            ]
            first, second, third = await asyncio.gather(*jobs, return_exceptions=True)
            assert not isinstance(first, BaseException)
            assert not isinstance(second, BaseException)
            assert first.exit_code == second.exit_code == 0
            assert isinstance(third, UsageError)

    virtually(run())
    assert one_line_each(chats(5), read_lines(tmp_path / "a_results.jsonl"))


@pytest.mark.parametrize(("named", "saved"), [("out.jsonl", "out.jsonl"), (None, "job_results.jsonl")])
def test_paths_may_be_path_objects(tmp_path: Path, named: str | None, saved: str) -> None:
    """From Python, files are named by strings or by paths, and None is what is not given."""

    async def run() -> int:
        async with LocalProvider() as provider:
            path = write_lines(tmp_path / "job.jsonl", chats(2))
            settings = {"save_filepath": tmp_path / named if named else None, "max_attempts": None, "api_key": None}
            url = provider.url + CHAT
            tally = await process_api_requests_from_file(path, request_url=url, progress="none", **settings)
            return tally.exit_code

    assert virtually(run()) == 0
    assert len(read_lines(tmp_path / saved)) == 2


def test_a_cancelled_job_leaves_whole_lines_and_no_lock(tmp_path: Path) -> None:
    """Whoever cancels the coroutine can start it again."""

    async def run() -> None:
        async with LocalProvider(Options(latency=1, latency_spread=0.5)) as provider:
            path = str(write_lines(tmp_path / "job.jsonl", chats(30)))
            settings: dict[str, Any] = {"request_url": provider.url + CHAT, "progress": "none"}
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(process_api_requests_from_file(path, **settings), 1.2)
            done = len(read_lines(tmp_path / "job_results.jsonl"))
            assert 0 < done < 30
            tally = await process_api_requests_from_file(path, **settings)
            assert (tally.exit_code, tally.finished_before) == (0, done)

    virtually(run())
    assert one_line_each(chats(30), read_lines(tmp_path / "job_results.jsonl"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.jsonl", "job_results.jsonl"]
