"""The budgets of a cluster: one Pacer for all, of which workers lease single starts in small portions.

`Leases` stands where the budgets are, `LeasedPacer` in each worker, in the place of the Pacer of a run. Both are pure:
time is given to them, and who carries their messages is not their business.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from api_request_parallel_processor import Cost, Outcome, Pacer, ServerLimits

if TYPE_CHECKING:
    from collections.abc import Callable

LEASE_SECONDS = 0.5  # after asking for a start: until then it is used, or it is given back
HOLD_SECONDS = 0.2  # until an ask is answered, if only with nothing, so that a lease is still fresh when it arrives
AWAY_SECONDS = 0.25  # that who was answered with nothing keeps the place in the line
MESSAGE_SECONDS = 0.05  # between two answers to a worker, or two of its messages: what comes meanwhile goes together
MOST_AT_ONCE = 256  # starts in one ask
LANES = 2  # asks of a worker that may be under way: one waits in the line while the answer of another travels


class Want(NamedTuple):
    """A start that a worker asks for: tokens expected and at worst, and their price."""

    expected: int
    worst: int
    price: float = 0.0


class Grant(NamedTuple):
    """A start that a worker may make, of a request that costs no more than this."""

    number: int
    expected: int
    worst: int


class Finished(NamedTuple):
    """How a granted start ended; the fields are those of Pacer.finish."""

    number: int
    outcome: Outcome
    used: int | None
    told: ServerLimits | None


class News(NamedTuple):
    """What a worker tells whenever it writes: ended starts, grants that it did not need, all that it has spent."""

    finished: list[Finished]
    unused: list[int]
    spent: float = 0.0


# ---- where the budgets are -------------------------------------------------------------------------------------------


@dataclass
class Purse:
    """What all workers may spend together; 0 = as much as they like."""

    most: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)  # by worker
    reserved: float = 0.0  # for what is in flight
    empty: bool = False  # nothing is in flight, and one more might cost too much

    def holds(self, price: float) -> bool:
        """Whether one more start can be paid."""
        fits = not self.most or sum(self.spent.values()) + self.reserved + price <= self.most
        self.empty = not fits and self.reserved < 1e-9
        return fits


@dataclass(slots=True)
class _Ask:
    """A worker in the line."""

    wants: deque[Want]
    asked: float
    answer: Callable[[list[Grant]], object]
    grants: list[Grant] = field(default_factory=list)
    first: float = math.inf  # when the first of them was granted
    away_until: float = 0.0  # it was answered with nothing, and may come back until then


class _Lease(NamedTuple):
    """A granted start, until its end is reported."""

    worker: str
    ticket: Any
    price: float


class ClusterPacer(Pacer):
    """The Pacer of a run, of which a start may be given back that never happened."""

    def give_back(self, ticket: Any, now: float) -> None:
        """Undo a start."""
        self.finish(ticket, Outcome.FAILED, now, 0)
        requests = self._rates[0]
        requests.level, requests.taken = requests.level + 1, requests.taken - 1
        if ticket.bin.held[0]:  # within the last minute
            ticket.bin.held[0] -= 1
            requests.held -= 1


class Leases:
    """Grants starts to workers in the order of their asking, as the Pacer of a single run would grant them to itself.

    A budget stays a ceiling for any minute: a lease counts as started at the last moment at which it may be used.
    """

    def __init__(
        self, pacer: ClusterPacer, purse: Purse | None = None, message_seconds: float = MESSAGE_SECONDS
    ) -> None:
        self.pacer, self.purse, self.message_seconds = pacer, purse or Purse(), message_seconds
        self.line: dict[tuple[str, int], _Ask] = {}  # whoever asks again before leaving it keeps the place
        self.open: dict[int, _Lease] = {}
        self.granted = 0

    def ask(
        self, worker: str, lane: int, wants: list[Want], now: float, answer: Callable[[list[Grant]], object]
    ) -> None:
        """Queue an ask, or without wants leave the line; `answer` is called once, by a later turn."""
        if wants:
            self.line[worker, lane] = _Ask(deque(wants), now, answer)
        else:
            self.line.pop((worker, lane), None)
            answer([])

    def hear(self, worker: str, news: News, now: float) -> None:
        """Take in how leases ended."""
        self.purse.spent[worker] = max(news.spent, self.purse.spent.get(worker, 0.0))
        for number, outcome, used, told in news.finished:
            if lease := self._close(number):
                self.pacer.finish(lease.ticket, outcome, now, used, told)
        for number in news.unused:
            if lease := self._close(number):
                self.pacer.give_back(lease.ticket, now)

    def forget(self, worker: str, now: float) -> None:
        """Close what a worker that is gone has left open: it may have been started."""
        for place in [place for place in self.line if place[0] == worker]:
            del self.line[place]
        for number in [number for number, lease in self.open.items() if lease.worker == worker]:
            if lease := self._close(number):
                self.pacer.finish(lease.ticket, Outcome.FAILED, now)

    def _close(self, number: int) -> _Lease | None:
        lease = self.open.pop(number, None)
        self.purse.reserved -= lease.price if lease else 0.0
        return lease

    def turn(self, now: float) -> float:
        """Grant what may start now and answer who is due; gives when to look again."""
        again = self._serve(now)
        for place, ask in list(self.line.items()):
            if ask.away_until:
                due = ask.away_until
            elif ask.grants:
                due = self._due(ask)
            elif now >= (due := ask.asked + HOLD_SECONDS):
                ask.away_until = due = now + AWAY_SECONDS
                ask.answer([])
            if now >= due:
                del self.line[place]
                if ask.grants:
                    ask.answer(ask.grants)
            again = min(again, due)
        return again

    def _serve(self, now: float) -> float:
        """Grant starts to the head of the line, then to the next; gives when the one that has to wait may start."""
        while self.line:
            place, ask = next(iter(self.line.items()))
            if ask.away_until:  # subtle: were others served meanwhile, small requests would starve a large one
                return math.inf
            if ask.wants:
                wait = self._delay(ask.wants[0], now)
                if wait <= 0:
                    self._grant(place[0], ask, now)
                    continue
                if not ask.grants or now + wait < self._due(ask) or (now < self._due(ask) and wait == math.inf):
                    return now + wait
            del self.line[place]
            ask.answer(ask.grants)
        return math.inf

    def _due(self, ask: _Ask) -> float:
        """When an ask is answered with what was granted by then: later for a single one than in a long line."""
        return ask.first + self.message_seconds / len(self.line)

    def _delay(self, want: Want, now: float) -> float:
        cost = Cost(want.expected, want.worst)
        return self.pacer.delay(cost, now) if self.purse.holds(want.price) else math.inf

    def _grant(self, worker: str, ask: _Ask, now: float) -> None:
        want = ask.wants.popleft()
        ticket = self.pacer.start(Cost(want.expected, want.worst), now)
        ticket.bin.last = now + LEASE_SECONDS  # at the latest
        self.granted += 1
        self.purse.reserved += want.price
        self.open[self.granted] = _Lease(worker, ticket, want.price)
        ask.first = min(ask.first, now)
        ask.grants.append(Grant(self.granted, want.expected, want.worst))


# ---- in a worker -----------------------------------------------------------------------------------------------------


class LeasedPacer(Pacer):
    """Stands in the place of a run's Pacer and starts what was granted; asks ahead, so that the loop need not wait.

    `upcoming` gives the wants of so many of the next requests, `price` what a cost amounts to. `asks` is called when
    there is something to ask for, `tells` when there is something to report, `wake` when the loop should look again.
    """

    def __init__(
        self,
        most: int,
        upcoming: Callable[[int], list[Cost]],
        price: Callable[[Cost], float],
        asks: Callable[[], object],
        tells: Callable[[], object],
        wake: Callable[[], object],
    ) -> None:
        super().__init__()
        self.most, self.upcoming, self.price = most, upcoming, price
        self.asks, self.tells, self.wake = asks, tells, wake
        self.pool: deque[tuple[float, Grant]] = deque()  # with the end of their validity
        self.blocked: Cost | None = None  # of the request at the head of the line, if no grant fits
        self.portion, self.asked, self.closed = LANES, 0, False
        self.sought: Cost | None = None  # what is asked for already on account of `blocked`
        self.finished: list[Finished] = []
        self.unused: list[int] = []

    def delay(self, cost: Cost, now: float) -> float:
        """0.0 if a grant fits this request; else inf: a reply or a grant wakes the loop."""
        self.drop_late(now)
        if self.closed or self.in_flight >= self.most:
            return math.inf
        if self._fitting(cost) is not None:
            return 0.0
        self.blocked = cost
        self.asks()
        return math.inf

    def _fitting(self, cost: Cost) -> int | None:
        fits = (i for i, (_, g) in enumerate(self.pool) if cost.expected <= g.expected and cost.worst <= g.worst)
        return next(fits, None)

    def drop_late(self, now: float) -> None:
        """Give back what was not used in time, and ask for that much less: some may just not have fitted."""
        while self.pool and self.pool[0][0] <= now:
            self.unused.append(self.pool.popleft()[1].number)
            self.portion = max(LANES, self.portion - 1)
            self.tells()

    def start(self, cost: Cost, _now: float) -> Any:
        """Use up the grant that fits; gives it, as the ticket of this attempt."""
        index = self._fitting(cost)
        assert index is not None
        _, grant = self.pool[index]
        del self.pool[index]
        self.in_flight, self.blocked = self.in_flight + 1, None
        if len(self.pool) <= self.portion // 2:
            self.asks()
        return grant

    def finish(
        self, ticket: Any, outcome: Outcome, _now: float, used: int | None = None, told: ServerLimits | None = None
    ) -> None:
        """Report how an attempt ended."""
        self.in_flight -= 1
        self.finished.append(Finished(ticket.number, outcome, used, told))
        self.tells()

    def wanted(self, now: float) -> list[Want]:
        """What to ask for now: the request that waits, and the next ones; none once it is closed."""
        self.drop_late(now)
        room = min(self.portion, self.most - self.in_flight) - len(self.pool) - self.asked
        if self.closed or self.in_flight >= self.most:
            return []
        costs = [self.blocked] if self.blocked and self.blocked != self.sought else []
        self.sought = self.blocked
        number = max(0, min(room, self.portion // LANES) - len(costs))
        costs += self.upcoming(self.asked + number)[self.asked :]  # the other lane has asked for those before
        self.asked += len(costs)
        # What is learned until it starts may raise the cost a little; the end of the attempt settles it.
        return [Want(c.expected + c.expected // 20 + 8, c.worst + c.worst // 20 + 8, self.price(c)) for c in costs]

    def take_in(self, grants: list[Grant], asked: int, asked_at: float, now: float) -> None:
        """Keep what was granted of an ask of so many; ask for more the next time if that took but a moment."""
        if grants and len(grants) == asked and now - asked_at < MESSAGE_SECONDS:
            self.portion = min(MOST_AT_ONCE, 2 * self.portion)
        self.asked, self.sought = self.asked - asked, None
        self.pool += [(asked_at + LEASE_SECONDS, grant) for grant in grants]
        self.wake()

    def news(self, spent: float) -> News:
        """What is to be reported, once."""
        news, self.finished, self.unused = News(self.finished, self.unused, spent), [], []
        return news

    def close(self) -> None:
        """Start nothing any more."""
        self.closed, self.blocked = True, None
        self.unused += [grant.number for _, grant in self.pool]
        self.pool.clear()
        self.tells()

    def set_budgets(self, *_: float) -> None:
        """The budgets are elsewhere."""

    def last_minute(self) -> tuple[int, int]:
        """What was started is known where the budgets are."""
        return 0, 0

    def describe(self) -> str:
        """The same holds for what was found."""
        return ""
