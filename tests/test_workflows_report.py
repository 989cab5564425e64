"""workflows.report: numbers of any results file, and a page that no text can break, looked at in a real browser."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import unicodedata
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from api_request_parallel_processor import UsageError
from tests.browser import Page, find_browser, new_page
from tests.jobs import ProviderProcess, chat, chats, clean_environment, run_program, told, write_lines
from workflows import _run, report
from workflows._prices import Bill
from workflows._report_plots import plots_of
from workflows._report_summary import summarize

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

ROOT = Path(__file__).resolve().parent.parent
USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "prompt_tokens_details": {"cached_tokens": 60}}
STARTED = "2026-11-20T10:00:00.000+00:00"
TIMES: dict[str, Any] = {"attempts": 1, "refusals": 0, "started": STARTED, "seconds": 2.0, "estimated_tokens": 130}


def reply(text: str = "yes", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"model": "gpt-4o-mini", "choices": [{"message": message, "finish_reason": "stop"}], "usage": USAGE, **more}


def failure(kind: str = "timeout", status: int | None = None, **more: Any) -> list[Any]:
    return [{"attempt": 1, "kind": kind, "status": status, "message": "it failed", **more}]


def numbers_of(tmp_path: Path, lines: Sequence[Any], *flags: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    path = write_lines(tmp_path / "x_results.jsonl", lines)
    assert report.main([str(path), "--json", *flags]) == 0
    summary: dict[str, Any] = json.loads(capsys.readouterr().out)
    return summary


def text_of(tmp_path: Path, lines: Sequence[Any], *flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    path = write_lines(tmp_path / "x_results.jsonl", lines)
    assert report.main([str(path), *flags]) == 0
    return capsys.readouterr().out


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_a_success_counts_more_than_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a file that was not finished, a failed line beside a success or a later failure is no request of its own."""
    lines = [
        [chat("a"), failure("timeout")],
        [chat("a"), failure("server_error", 500)],
        [chat("b"), failure("connection"), {"id": 1}],
        [chat("b"), reply(), {"id": 1}],
        [chat("c"), reply()],
        [chat("c"), reply()],
        b'{"no": "result"}\n',
        b"\n",
        b'[{"model":"gpt-4o-mini","mess',
    ]
    summary = numbers_of(tmp_path, lines, capsys=capsys)
    assert (summary["requests"], summary["succeeded"], summary["failed"]) == (4, 3, 1)
    assert (summary["failed_lines_made_up_for"], summary["lines_left_out"]) == (2, 2)
    assert [(row["kind"], row["status"], row["requests"]) for row in summary["failures"]] == [
        ("server_error", "500", 1)
    ]


def test_equal_requests_that_failed_are_told_apart_by_their_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Deliberate duplicates that failed are several requests, if details tell their lines."""
    lines = [[chat("a"), failure(), None, {**TIMES, "line": line}] for line in (1, 2, 2, 3)]
    summary = numbers_of(tmp_path, lines, capsys=capsys)
    assert (summary["requests"], summary["failed"], summary["failed_lines_made_up_for"]) == (3, 3, 1)


def test_lines_with_and_without_details_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Details of a gateway, of an old run without them, and strange ones do no harm."""
    strange: list[Any] = [None, [], "x", {"seconds": "2", "started": 5}, {"seconds": -1, "started": "yesterday"}]
    strange += [{"attempts": True, "refusals": 10**400, "started": "0001-01-01T00:00:00+14:00", "seconds": 1}]
    strange += [{"credits_consumed": "0.25"}, {"credits_consumed": "nan"}, {"estimated_tokens": [], "tokens": {}}]
    lines = [[chat(str(i)), reply(), {"id": i}, details] for i, details in enumerate(strange)]
    lines += [[chat("x"), reply()], [chat("y"), reply(), None, TIMES], ["no json", failure("bad_line")]]
    lines += [[chat("old"), ["it failed"]], [chat("older"), []], [chat("oldest"), [{"error": {"message": "no"}}]]]
    summary = numbers_of(tmp_path, lines, capsys=capsys)
    assert summary["requests"] == len(lines)
    assert summary["credits"] == 0.25
    assert summary["seconds"]["count"] == 2
    assert summary["lines_with_times"] in (1, 2)
    assert {row["kind"] for row in summary["failures"]} == {"bad_line", "unknown"}


def test_tokens_cost_and_attempts_of_failures_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a failed attempt was charged is in the sums, also if a later run made up for it."""
    lines = [
        [chat("a"), failure("content_filter", 200, response=reply(""))],
        [chat("a"), reply(), None, {**TIMES, "attempts": 3, "refusals": 2}],
        [chat("b"), [*failure("bad_reply", 200, response=reply("")), *failure("timeout", response="text")]],
    ]
    prices = ("--input_price", "1", "--output_price", "2", "--cached_input_price", "0.5")
    summary = numbers_of(tmp_path, lines, *prices, capsys=capsys)
    each = (40 * 1 + 60 * 0.5 + 20 * 2) / 1e6
    assert summary["cost"]["total"] == pytest.approx(3 * each)
    assert summary["cost"]["of_failures"] == pytest.approx(2 * each)
    assert summary["cost"]["attempts_not_in_the_file"] == 2
    assert summary["tokens"] == {"input": 300, "output": 60, "cache_read": 180}
    assert summary["attempts"] == {"1": 1, "2": 1, "3": 1}
    assert (summary["refusals"], summary["refused_requests"]) == (2, 1)


def test_list_prices_are_by_model_and_unknown_ones_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cached tokens cost what cached tokens cost; a model without a price makes the cost a lower bound."""
    pytest.importorskip("genai_prices")
    mine = [{**chat("b"), "model": "my-own-model"}, reply(model="my-own-model")]
    summary = numbers_of(tmp_path, [[chat("a"), reply()], mine], capsys=capsys)
    assert summary["cost"]["total"] == pytest.approx((40 * 0.15 + 60 * 0.075 + 20 * 0.6) / 1e6)
    assert summary["cost"]["replies_without_price"] == {"my-own-model": 1}
    assert {row["model"]: row["cost"] is None for row in summary["models"]} == {
        "gpt-4o-mini": False,
        "my-own-model": True,
    }
    text = text_of(tmp_path, [[chat("a"), reply()], mine], capsys=capsys)
    assert "Cost: at least" in text
    assert "No price is known for my-own-model" in text
    elsewhere = numbers_of(tmp_path, [[chat("a"), reply()]], "--request_url", "http://localhost:8000/v1", capsys=capsys)
    assert elsewhere["cost"]["total"] is None


def test_without_the_package_the_way_to_prices_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is guessed, and the message names the package and the flags."""
    monkeypatch.setattr(report, "Bill", lambda given, *_: Bill(given, available=False))
    text = text_of(tmp_path, [[chat("a"), reply()]], capsys=capsys)
    assert "Cost" not in text
    assert "pip install genai-prices" in " ".join(text.split())
    assert "--input_price" in text


def test_answers_that_are_not_whole_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut off, filtered and refused answers succeeded, but a reader wants to know."""
    ends: list[dict[str, Any]] = [{"finish_reason": "length"}, {"finish_reason": "content_filter"}]
    ends += [{"finish_reason": "stop", "message": {"content": "", "refusal": "I cannot"}}]
    lines = [[chat(str(i)), reply(choices=[{"message": {"content": "x"}, **end}])] for i, end in enumerate(ends)]
    summary = numbers_of(tmp_path, lines, capsys=capsys)
    assert summary["not_whole"] == {"cut off": 1, "filtered": 1, "refused": 1}


def test_peaks_are_measured_against_the_budgets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fullest 60 s, in requests and tokens, beside the budget that the run had."""
    lines = []
    for i in range(120):
        started = f"2026-11-20T10:{i // 60:02}:{i % 60:02}.500+00:00"
        lines.append([chat(str(i)), reply(), None, {**TIMES, "started": started, "line": i}])
    flags = ("--max_requests_per_minute", "100", "--max_tokens_per_minute", "7200")
    summary = numbers_of(tmp_path, lines, *flags, capsys=capsys)
    assert summary["peak_per_minute"] == {"requests": 60, "tokens": 7200}
    text = text_of(tmp_path, lines, *flags, capsys=capsys)
    assert re.search(r"Most requests a minute +60 +60\.0 % of the budget of 100\n", text)
    assert re.search(r"Most tokens a minute +7,200 +100 % of the budget of 7,200\n", text)
    assert "2026-11-20 10:00:00 to 10:02:01 UTC, 2 min 1 s" in text


def test_the_terminal_stays_in_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever names and numbers there are, and no text of a model moves the cursor."""
    long = "a-model-with-a-name-that-does-not-end-" * 5
    evil = "\x1b[2J\x1b]0;title\x07\r\u202e" + "x" * 200
    lines: list[Any] = [[{**chat("a"), "model": long}, reply(model=long), None, {**TIMES, "seconds": 1e8}]]
    lines += [[chat(str(i)), failure(f"kind {i} {evil}", 599, message=evil), None, TIMES] for i in range(30)]
    usage = {"prompt_tokens": 10**11, "completion_tokens": 10**11, "prompt_tokens_details": {"audio_tokens": 10**10}}
    lines += [[chat("b"), reply(usage=usage), None, {**TIMES, "attempts": n, "line": n}] for n in range(12)]
    text = text_of(tmp_path, lines, capsys=capsys).split("\n", 1)[1]
    assert max(map(len, text.splitlines())) <= 80
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "other reasons" in text


def test_chinese_takes_two_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A message in Chinese is cut where the terminal ends; one without Chinese gets question marks instead."""
    lines = [[chat("a"), failure("timeout", message="请求失败，请稍后重试" * 9)]]
    [line] = [line for line in text_of(tmp_path, lines, capsys=capsys).splitlines() if "timeout" in line]
    assert sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in line) in (79, 80)
    assert line.endswith("…")
    command = [sys.executable, "-m", "workflows.report", str(tmp_path / "x_results.jsonl")]
    environment = clean_environment(PYTHONIOENCODING="ascii")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert b"timeout" in done.stdout
    assert b"????" in done.stdout


def test_what_is_kept_does_not_grow(tmp_path: Path) -> None:
    """Names, times, lengths and texts of strangers fill bounded room, in memory and on the page."""
    long, deep = "x" * 300_000, b"[" * 490 + b"]" * 490
    lines: list[Any] = []
    for i in range(600):
        details = at(i * 10**6, estimated_tokens=i * i + 1, seconds=i)
        own = reply(model=f"model {i}", usage={"prompt_tokens": 7 * i + 1, "completion_tokens": i})
        lines += [[{"model": f"model {i}", "n": i}, own, None, details]]
        lines += [[{"model": f"model {i}"}, failure(f"kind {i}", i), i, {**details, "attempts": i}]]
    lines += [[chat(long + str(i)), failure(message=long, response=long), {long: long}, at(i)] for i in range(20)]
    lines += [b'[{"messages":%s},[{"message":"no","response":%s}],%s]\n' % (deep, deep, deep)]
    lines += [b'[{"n":%s},{"choices":[]},{"n":%s}]\n' % (b"9" * 5000, b"9" * 5000)]
    path = write_lines(tmp_path / "x_results.jsonl", lines)
    pytest.importorskip("plotly")
    page = Path(make_page(path).removeprefix("file://")).read_text("utf-8")
    assert len(page.partition("<script>")[0]) < 300_000
    numbers, left_out = report.count(path, Bill())
    assert (numbers.requests, left_out) == (1222, 0)
    assert len(numbers.models) <= 51
    assert max(len(numbers.reasons), len(numbers.kinds)) <= 51
    assert len(numbers.failures) <= 100
    assert len(numbers.slowest.items()) == 20
    assert all(len(text) < 2100 for excerpt in numbers.failures for text in excerpt.sections.values())


def test_an_empty_file_and_wrong_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No results yet is no error; a file of something else, no file, and wrong flags are."""
    empty = write_lines(tmp_path / "empty.jsonl", [])
    assert report.main([str(empty)]) == 0
    assert "Requests" in capsys.readouterr().out
    other = write_lines(tmp_path / "other.jsonl", [{"a": 1}])
    page = tmp_path / "page.html"
    page.write_text("<p>mine</p>", "utf-8")
    wrong: list[list[str]] = [[str(other)], [str(tmp_path / "none")], [str(empty), "--html", str(empty)]]
    wrong += [
        [str(empty), "--html", str(page)],
        [str(empty), "--cached_input_price", "1"],
        [str(empty), "--input_price", "-1"],
    ]
    wrong += [[str(empty), "--max_requests_per_minute", "nan"], [str(empty), "--request_url", "nowhere"]]
    for arguments in wrong:
        with pytest.raises(UsageError):
            report.main(arguments)
    assert page.read_text("utf-8") == "<p>mine</p>"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without plotly the page cannot be made; the message tells the command that installs it."""
    monkeypatch.setitem(sys.modules, "plotly", None)
    empty = write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(UsageError, match="pip install plotly"):
        report.main([str(empty), "--html", str(tmp_path / "x.html")])


# ---- a real run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results file of a run that had refusals, failures and repeated attempts."""
    pytest.importorskip("plotly")
    folder = tmp_path_factory.mktemp("run")
    flags = ["--requests_per_minute", "6000", "--limit_kind", "second_bucket", "--latency", "0.02"]
    flags += ["--latency_spread", "0.8", "--completion_spread", "0.8", "--cached_tokens", "16", "--error_500", "0.05"]
    flags += ["--statuses", json.dumps([{"contains": "lock", "kind": "filtered"}])]
    requests = [*chats(150, max_tokens=200), *(chat(f"pick a lock {i}") for i in range(5)), b"no json\n"]
    path = write_lines(folder / "run.jsonl", requests)
    with ProviderProcess(folder, *flags) as provider:
        done = run_program(path, f"{provider.url}/v1", "--save_details", "--max_requests_per_minute", "9000")
    assert done.returncode == 1, told(done)
    return folder / "run_results.jsonl"


@pytest.mark.slow
def test_a_real_run_is_told_as_it_was(real_run: Path) -> None:
    """The program by itself: the numbers are those of the run, the page is there, and is made anew."""
    page = real_run.with_name("page.html")
    command = [sys.executable, "-m", "workflows.report", str(real_run), "--html", str(page)]
    command += ["--max_requests_per_minute", "9000"]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=True)
    assert re.search(r"Requests +156\n  succeeded +150 +96\.2 %\n  failed +6 +3\.8 %\n", done.stdout)
    assert re.search(r"content_filter 400 +5 ", done.stdout)
    assert re.search(r"cached +\d,\d{3} ", done.stdout)
    assert "Most requests a minute" in done.stdout
    assert "The page is in" in done.stderr
    again = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=True)
    assert again.stdout == done.stdout


# ---- the page --------------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(not find_browser(), reason="there is no Chromium")
EVIL = [
    "</script><script>window.hacked = 1</script>",
    '<img src="http://127.0.0.1:9/x.png" onerror="window.hacked = 1">',
    "<!-- <script>",
    "]]></style></title></pre></details><h1>big</h1>",
    '"><svg onload=window.hacked=1>',
    "javascript:window.hacked=1",
    "{{7*7}} ${7*7} %{x} --red <b>bold</b><a href='http://127.0.0.1:9/'>link</a>",
    "line\u2028separator\u2029end \x00\x07\x1b[31m\x7f\x85 \u202e backwards \ufffe",
    "lone \ud800 surrogate \udfff",
]


def evil_results(path: Path) -> Path:
    """Write results in which every text that can be foreign is."""
    lines: list[Any] = []
    for i, text in enumerate(EVIL):
        details = {**TIMES, "line": i, "started": f"2026-11-20T10:00:{i:02}+00:00", "credits_consumed": text}
        request = {"model": text, "messages": [{"role": text, "content": text}], text: text}
        failed = [{"attempt": text, "kind": text, "status": text, "message": text, "response": {text: text}}]
        lines.append([request, reply(text, model=text, service_tier=text), {text: text}, details])
        lines.append([{**request, "n": 2}, failed, text, details])
        lines.append([{**request, "n": 3}, [text], text, {**details, "started": text}])
        lines.append([text, [{"kind": text, "message": {text: text}, "response": text}], text])
    return write_lines(path, lines)


def at(moment: float, /, **more: Any) -> dict[str, Any]:
    """Make details of a request that started so long after a moment."""
    started = datetime(2026, 11, 20, 10, tzinfo=UTC) + timedelta(seconds=moment)
    return {**TIMES, "started": started.isoformat(timespec="milliseconds"), "line": int(moment), **more}


PLOTS_OF: dict[str, tuple[list[Any], str]] = {
    "nothing": ([], ""),
    "one success": ([[chat(), reply(), None, at(0)]], "requests tokens latency estimates lengths"),
    "one failure": ([[chat(), failure(), None, at(0)]], "requests tokens errors"),
    "one that was never sent": ([[chat(), failure("bad_line"), None, at(0, started=None, seconds=None)]], ""),
    "no details": ([[chat(str(i)), reply()] for i in range(3)], "lengths"),
    "no tokens": ([[chat(), reply(usage=None), None, at(0, seconds=0)]], "requests tokens"),
    "refusals alone": (
        [[chat(), reply(), None, at(0, refusals=3)]],
        "requests tokens errors latency estimates lengths",
    ),
}


@pytest.mark.parametrize("name", PLOTS_OF)
def test_plots_are_those_that_the_file_has_numbers_for(tmp_path: Path, name: str) -> None:
    """Where there is nothing to be drawn, there is no empty plot, but words."""
    pytest.importorskip("plotly")
    lines, wanted = PLOTS_OF[name]
    path = Path(make_page(write_lines(tmp_path / "x_results.jsonl", lines)).removeprefix("file://"))
    text = path.read_text("utf-8")
    found = re.search(r'<script type="application/json" id="plots">(.*?)</script>', text)
    assert found
    assert [plot["id"] for plot in json.loads(found[1])] == [f"plot-{one}" for one in wanted.split()]
    assert text.count('class="plot"') == len(wanted.split())
    assert "NaN" not in text.partition("<script>")[0]
    assert text.startswith("<!doctype html>")


def test_pauses_between_runs_take_no_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that was filled in two runs, a night apart, is told and drawn without the night."""
    lines = [[chat(str(i)), reply(), None, at(i)] for i in (*range(100), *range(40000, 40100))]
    path = write_lines(tmp_path / "x_results.jsonl", lines)
    numbers, left_out = report.count(path, Bill())
    summary = summarize(numbers, left_out, (0, 0))
    axis = plots_of(numbers, summary)["requests"].layout["xaxis"]
    [cut] = [[end / 1000 - numbers.began for end in part["bounds"]] for part in axis["rangebreaks"] if numbers.began]
    assert 102 < cut[0] < 170
    assert 39990 < cut[1] <= 40000
    assert axis["range"][1] - axis["range"][0] < 1000 * 40200
    assert report.main([str(path)]) == 0
    assert re.search(r"UTC, 11 h 8 min, 3 min \d+ s\s+without pauses", capsys.readouterr().out)


def in_browser(scenario: Callable[[Page], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with new_page() as page:
            await scenario(page)

    asyncio.run(run())


def make_page(results: Path, *flags: str) -> str:
    path = results.with_suffix(".html")
    assert _run.main_program(report.main, [str(results), "--html", str(path), *flags]) == 0
    return path.as_uri()


@needs_browser
@pytest.mark.slow
def test_times_of_a_short_run_stand_apart(tmp_path: Path) -> None:
    """Seconds below an axis do not run into each other."""
    pytest.importorskip("plotly")
    write_lines(tmp_path / "r.jsonl", [[chat("1"), reply(), None, {**TIMES, "seconds": 1.5}]])
    url = make_page(tmp_path / "r.jsonl")
    places = "[...document.querySelectorAll('#plot-requests .xtick text')].map(t => t.getBoundingClientRect())"

    async def scenario(page: Page) -> None:
        for width in (360, 1100, 1600):
            await page.open(url, width=width)
            ticks = await page.run(f"{places}.map(place => [place.left, place.right])")
            assert len(ticks) > 1
            assert all(left[1] < right[0] for left, right in pairwise(sorted(ticks))), (width, ticks)

    in_browser(scenario)


@needs_browser
@pytest.mark.slow
def test_nothing_foreign_becomes_code(tmp_path: Path) -> None:
    """Texts of users and models are shown, never run; and even what got in could load nothing."""
    pytest.importorskip("plotly")
    url = make_page(evil_results(tmp_path / "</title><script>window.hacked=1</script>_results.jsonl".replace("/", "")))

    async def scenario(page: Page) -> None:
        await page.open(url)
        assert await page.run("window.hacked") is None
        assert page.console == []
        assert page.loaded == [url]
        assert await page.run("document.scripts.length") == 3
        legend = await page.run("document.querySelector('#plot-errors .legend').textContent")
        assert legend == "other kinds"
        assert (
            await page.run("document.querySelectorAll('img, h1 + h1, section svg[onload], a[href^=http]').length") == 0
        )
        assert await page.run("document.querySelectorAll('main h1').length") == 0
        shown = await page.run("document.querySelector('main').textContent")
        for text in EVIL[:7]:
            assert text in shown, text
        assert "lone \ufffd surrogate \ufffd" in shown
        assert "\u2400\u2407\u241b[31m\u2421" in shown
        blocked = """new Promise((done) => {
            addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
            %s
            setTimeout(() => done("nothing"), 5000);
        })"""
        image = "document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.1:9/x.png' }));"
        script = "const s = document.createElement('script'); s.textContent = 'hacked = 1'; document.body.append(s);"
        assert await page.run(blocked % image) == "img-src"
        assert await page.run(blocked % script) == "script-src-elem"
        assert await page.run(blocked % "fetch('http://127.0.0.1:9/').catch(() => 0);") == "connect-src"
        await page.open(url, width=360)
        assert await page.run("document.documentElement.scrollWidth") == 360
        assert await page.run("window.hacked") is None

    in_browser(scenario)


PLOTS = """[...document.querySelectorAll(".plot")].map((plot) => {
    const box = plot.getBoundingClientRect(), drawn = plot.querySelector(".main-svg").getBoundingClientRect();
    const marks = plot.querySelectorAll(".scatterlayer path, .barlayer path").length;
    return { id: plot.id, marks, fits: drawn.right <= box.right + 1 && drawn.height > 150, label: plot.ariaLabel };
})"""
TEXT_COLOUR = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"


async def by_keyboard(page: Page) -> None:
    """Requests open by Enter, and all at once by their button; headings and tables say what they are."""
    await page.run("document.querySelector('#failed-list summary').focus()")
    enter = {"key": "Enter", "code": "Enter", "text": "\r", "windowsVirtualKeyCode": 13}
    for kind in ("keyDown", "keyUp"):
        await page.call("Input.dispatchKeyEvent", type=kind, **enter)
    assert await page.run("document.querySelectorAll('#failed-list details[open]').length") == 1
    await page.run("document.querySelector('button[data-list=failed-list]').click()")
    assert await page.run("document.querySelectorAll('#failed-list details:not([open])').length") == 0
    assert "pick a lock" in await page.run("document.querySelector('#failed-list').textContent")
    assert await page.run("document.querySelectorAll('h1').length") == 1
    assert await page.run("[...document.querySelectorAll('nav a')].every((a) => document.querySelector(a.hash))")
    assert await page.run("document.querySelectorAll('th:not([scope])').length") == 0
    assert await page.run("document.documentElement.lang") == "en"


@needs_browser
@pytest.mark.slow
def test_the_page_in_light_and_dark_narrow_and_wide(real_run: Path) -> None:
    """All plots are drawn and fit, nothing is loaded, the console is silent, colours follow, keys work, it prints."""
    url = make_page(real_run, "--max_requests_per_minute", "9000", "--max_tokens_per_minute", "200000")

    async def scenario(page: Page) -> None:
        colours = set()
        for width, dark in ((1600, False), (360, False), (1600, True), (360, True)):
            await page.open(url, width=width, dark=dark)
            assert await page.run("document.documentElement.scrollWidth") == width
            plots = await page.run(PLOTS)
            assert [plot["id"] for plot in plots] == [
                f"plot-{name}" for name in ("requests", "tokens", "errors", "latency", "estimates", "lengths")
            ]
            assert all(plot["marks"] and plot["fits"] and plot["label"] for plot in plots), plots
            colours.add((dark, await page.run(TEXT_COLOUR)))
        assert len(colours) == 2
        await page.call(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}]
        )  # as the system changes, the plots do
        light = next(colour for dark, colour in colours if not dark)
        async with asyncio.timeout(30):
            while await page.run(TEXT_COLOUR) != light:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await by_keyboard(page)
        assert (await page.print()).startswith(b"%PDF")
        assert page.console == []
        assert set(page.loaded) == {url}

    in_browser(scenario)


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_words_stand_out() -> None:
    """Text has a contrast of 4.5 on every ground that it stands on, marks of plots one of 3, in light and in dark."""
    style = (ROOT / "workflows" / "_report_page.css").read_text("utf-8")
    themes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for block in re.findall(r":root[^{]*\{(.*?)\}", style, re.DOTALL)
    ]
    assert len(themes) == 2
    for own in themes:
        theme = {**themes[0], **own}

        def contrast(one: str, other: str, theme: dict[str, str] = theme) -> float:
            high, low = sorted((luminance(theme[one]), luminance(theme[other])), reverse=True)
            return (high + 0.05) / (low + 0.05)

        for ground in ("page", "card", "shade"):
            for words in ("text", "muted", "link", "good", "bad"):
                assert contrast(words, ground) >= 4.5, (words, ground)
        for marks in "blue teal orange red purple pink olive brown sky grey".split():
            assert contrast(marks, "card") >= 3, marks
