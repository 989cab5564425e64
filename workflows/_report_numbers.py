"""What workflows.report knows about a results file, counted line by line in bounded memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from workflows._replies import FILTERED, TRUNCATED, as_dict, as_list, read_answer, read_tokens
from workflows._report_excerpts import Excerpt, excerpt_of, number
from workflows._report_sketches import Histogram, Largest, Pairs, Timeline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workflows._prices import Bill
    from workflows._replies import Tokens
    from workflows._results import Result

LONGEST_NAME = 100
MOST_NAMES = 50  # models and reasons that are told apart; what comes later is counted together
OTHERS = "(others)"
SLOWEST, FAILED_OF_A_KIND, FAILED = 20, 10, 100  # requests that are kept to be read
MOST_ATTEMPTS = 1000


@dataclass
class ModelTotals:
    """What the replies of one model came to."""

    requests: int = 0
    replies: int = 0  # that tell their tokens
    prompt: int = 0
    cached: int = 0
    output: int = 0
    cost: float = 0.0
    unpriced: int = 0  # replies whose price is not known


@dataclass
class Reason:
    """Why requests failed: those whose last errors have the same kind and status."""

    requests: int = 0
    example: str = ""


@dataclass
class Numbers:
    """All counts. `see` takes every line of the file, `settle` the one line that counts for each request."""

    bill: Bill
    lines: int = 0
    succeeded: int = 0
    failed: int = 0
    ends: Counter[str] = field(default_factory=Counter)  # of successes that are no whole answers
    kinds: set[str] = field(default_factory=set)  # of errors
    reasons: dict[tuple[str, str], Reason] = field(default_factory=dict)  # by kind and status
    timed: int = 0  # lines with times
    unsent: int = 0  # lines of requests that never started, so that they have none
    attempts: Counter[int] = field(default_factory=Counter)  # lines by their number of attempts
    untold: int = 0  # attempts before a success, whose replies are not in the file
    refusals: int = 0
    refused: int = 0  # lines that were refused at least once
    prompt: Histogram = field(default_factory=Histogram)
    output: Histogram = field(default_factory=Histogram)
    special: Counter[str] = field(default_factory=Counter)
    silent: int = 0  # successes that do not tell their tokens
    cost: float = 0.0
    cost_of_failures: float = 0.0  # within cost
    credits: float = 0.0  # that a gateway says it took
    models: dict[str, ModelTotals] = field(default_factory=dict)
    seconds: Histogram = field(default_factory=Histogram)  # of successes
    timeline: Timeline = field(default_factory=Timeline)
    began: float | None = None
    ended: float | None = None
    estimates: Pairs = field(default_factory=Pairs)  # estimated and actual tokens
    ratio: Histogram = field(default_factory=Histogram)  # estimated by actual tokens
    slowest: Largest = field(default_factory=lambda: Largest(SLOWEST))
    failures: list[Excerpt] = field(default_factory=list)

    def see(self, result: Result) -> None:
        """Count what happened for one line, whether or not a later line made up for it: time, attempts, tokens."""
        self.lines += 1
        details = as_dict(result.details)
        start = moment(details.get("started"))
        model = self.model_of(result)
        self.count_attempts(result, details)
        prompt, output = self.count_tokens(result, model, start)
        if result.succeeded:
            self.settle(result, model)
        seconds = number(details.get("seconds"))
        if start is None or seconds is None:
            self.unsent += "started" in details and details["started"] is None
            return
        self.timed += 1
        began, refusals = start.timestamp(), number(details.get("refusals")) or 0
        repeats = max(0, (number(details.get("attempts")) or 1) - 1)
        self.timeline.add(began, started=1, prompt=prompt, output=output, refusals=refusals, repeats=repeats)
        kind = "succeeded" if result.succeeded else f"failed {self.kind_of(result)}"
        self.timeline.add(began + seconds, finished=1, **{kind: 1})
        self.began = min(began, began if self.began is None else self.began)
        self.ended = max(began + seconds, began + seconds if self.ended is None else self.ended)

    def settle(self, result: Result, model: str = "") -> None:
        """Count the outcome of one request."""
        seconds = number(as_dict(result.details).get("seconds"))
        self.models[model or self.model_of(result)].requests += 1
        if result.succeeded:
            self.succeeded += 1
            answer = read_answer(result.response)
            if not answer.whole:
                end = answer.finish.lower()
                self.ends["cut off" if end in TRUNCATED else "filtered" if end in FILTERED else "refused"] += 1
            if seconds is not None:
                self.seconds.add(seconds)
        else:
            self.failed += 1
            self.count_failure(result)
        if seconds is not None and self.slowest.wants(seconds):
            self.slowest.add(seconds, excerpt_of(result))

    def count_attempts(self, result: Result, details: dict[str, Any]) -> None:
        """Count how often a request was tried and refused."""
        attempts = number(details.get("attempts"))
        if attempts is None and not result.succeeded:
            attempts = len([error for error in as_list(result.response) if as_dict(error).get("attempt") != 0])
        if attempts is not None:
            self.attempts[min(int(attempts), MOST_ATTEMPTS)] += 1
            self.untold += max(0, int(attempts) - 1) if result.succeeded else 0
        if refusals := number(details.get("refusals")):
            self.refusals += int(refusals)
            self.refused += 1
        taken = details.get("credits_consumed")
        if isinstance(taken, int | float | str):
            self.credits += number_in(str(taken))

    def count_tokens(self, result: Result, model: str, start: datetime | None) -> tuple[int, int]:
        """Count and price the tokens of all replies in a line; gives their sums."""
        at = start.replace(second=0, microsecond=0) if start else None
        sums = [0, 0]
        for reply in replies_in(result):
            if (tokens := read_tokens(reply)) is None:
                self.silent += result.succeeded
                continue
            names = [
                name[:LONGEST_NAME] for name in (reply.get("model"), reply.get("modelVersion")) if isinstance(name, str)
            ]
            cost = self.bill.price(tokens, [*names, model], at, reply)
            self.count_reply(tokens, self.models[model], cost)
            if result.succeeded:
                self.prompt.add(tokens.prompt)
                self.output.add(tokens.output)
                estimated = number(as_dict(result.details).get("estimated_tokens"))
                if estimated and (actual := tokens.prompt + tokens.output):
                    self.estimates.add(estimated, actual)
                    self.ratio.add(estimated / actual)
            else:
                self.cost_of_failures += cost or 0.0
            sums = [sums[0] + tokens.prompt, sums[1] + tokens.output]
        return sums[0], sums[1]

    def count_reply(self, tokens: Tokens, totals: ModelTotals, cost: float | None) -> None:
        """Add the tokens of one reply to the totals."""
        self.special.update(tokens.special)
        totals.replies += 1
        totals.prompt += tokens.prompt
        totals.output += tokens.output
        totals.cached += tokens.special.get("cache_read", 0)
        totals.unpriced += cost is None
        totals.cost += cost or 0.0
        self.cost += cost or 0.0

    def model_of(self, result: Result) -> str:
        """The name under which the replies of a line are counted."""
        response = as_dict(result.response)
        names = as_dict(result.request).get("model"), response.get("model"), response.get("modelVersion"), "(not told)"
        name = next(name for name in names if isinstance(name, str) and name)[:LONGEST_NAME]
        if name not in self.models:
            name = name if len(self.models) < MOST_NAMES else OTHERS
            self.models.setdefault(name, ModelTotals())
        return name

    def kind_of(self, result: Result) -> str:
        """The kind of the last error of a failed result; "unknown" in old files, whose errors are plain texts."""
        kind = str(as_dict((as_list(result.response) or [None])[-1]).get("kind") or "unknown")[:40]
        kind = kind if kind in self.kinds or len(self.kinds) < MOST_NAMES else OTHERS
        self.kinds.add(kind)
        return kind

    def count_failure(self, result: Result) -> None:
        """Count why a request failed in the end, and keep some to be read."""
        status = as_dict((as_list(result.response) or [None])[-1]).get("status")
        key = self.kind_of(result), str(status or "")[:10]
        key = key if key in self.reasons or len(self.reasons) < MOST_NAMES else (OTHERS, "")
        reason = self.reasons.setdefault(key, Reason())
        reason.requests += 1
        if reason.requests <= FAILED_OF_A_KIND and len(self.failures) < FAILED:
            self.failures.append(excerpt_of(result))
            reason.example = reason.example or self.failures[-1].headline

    @property
    def requests(self) -> int:
        """All requests that have a result."""
        return self.succeeded + self.failed

    @property
    def made_up(self) -> int:
        """Failed lines of requests for which another line counts: a success, or the last failure."""
        return self.lines - self.requests

    @property
    def busy_seconds(self) -> float:
        """From the first start to the last end, without the pauses between runs."""
        whole = (self.ended or 0.0) - (self.began or 0.0)
        return max(0.0, whole - sum(end - start for start, end in self.timeline.pauses()))

    def total(self, name: str) -> int:
        """The sum of a field over all models."""
        return sum(getattr(totals, name) for totals in self.models.values())


def replies_in(result: Result) -> Sequence[dict[str, Any]]:
    """The replies in a result line: that of a success, those in the errors of a failure."""
    if result.succeeded:
        return [as_dict(result.response)]
    found = [as_dict(error).get("response") for error in as_list(result.response)]
    return [reply for reply in found if isinstance(reply, dict)]


def number_in(text: str) -> float:
    """The number that a text is; 0 if it is none."""
    try:
        return number(float(text[:30])) or 0.0
    except ValueError:
        return 0.0


def moment(value: Any) -> datetime | None:
    """A time as the details have it; None if it is none."""
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else None
        return found if found is None or found.tzinfo else found.replace(tzinfo=UTC)
    except ValueError:
        return None
