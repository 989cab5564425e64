"""What tokens cost: prices that the user gives, or the list prices that the package genai-prices knows."""

from __future__ import annotations

import importlib.util
from bisect import bisect_left
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from api_request_parallel_processor import find_provider
from workflows._run import optional

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workflows._replies import Tokens

# Of which tokens the special ones are a part: without a price of their own they cost what their whole costs.
PART_OF = {"cache_write_1h": "cache_write", **dict.fromkeys(("cache_read", "cache_write"), "input")}
PART_OF |= {f"{side}_{part}": side for side in ("input", "output") for part in ("audio", "image", "video")}
PART_OF |= {"output_reasoning": "output"}
KINDS = ("input", "output", *PART_OF)
# What the package calls providers that have another name here.
PACKAGE_NAMES = {"gemini": "google", "vertex": "google", "moonshot": "moonshotai", "zhipu": "zhipuai"}
BATCH = ("processing", "batch")  # in the package's words
Context = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Tariff:
    """Prices of a model: money per million tokens of each kind, and per request."""

    per_million: Mapping[str, float]
    per_request: float = 0.0

    def cost(self, tokens: Tokens, requests: int = 1) -> float:
        """What tokens cost. Special ones are taken out of the whole, and charged at their own price if they have one.

        Tariff({"input": 2, "output": 8, "cache_read": 1}).cost(Tokens(1000, 100, {"cache_read": 600})) -> 0.0022
        """
        money = tokens.prompt * self.price("input") + tokens.output * self.price("output")
        for kind, count in tokens.special.items():
            money += count * (self.price(kind) - self.price(PART_OF[kind]))
        return money / 1e6 + requests * self.per_request

    def price(self, kind: str) -> float:
        """The price of a million tokens of a kind: its own, else that of the whole they are a part of."""
        while kind not in self.per_million and kind in PART_OF:
            kind = PART_OF[kind]
        return self.per_million.get(kind, 0.0)


class Tariffs(NamedTuple):
    """The tariffs of a model by the length of the prompt; most models have one."""

    label: str  # "gpt-4o-mini (OpenAI)"
    starts: tuple[int, ...]  # prompts longer than this many tokens have the next tariff
    steps: tuple[Tariff, ...]

    def for_prompt(self, tokens: int) -> Tariff:
        """The tariff of a prompt of that length."""
        return self.steps[bisect_left(self.starts, tokens)]


@lru_cache(maxsize=4096)
def find_tariffs(
    model: str, url: str = "", provider: str = "auto", at: datetime | None = None, context: Context = ()
) -> Tariffs | None:
    """The list prices of a model, in US dollars; None if they are not known: they are never guessed.

    The provider is the one of the URL, else the named one, else the maker of the model, told by its name. `at` is when
    the request was made (default: now), since prices change by date and hour. `context` says what else they depend on:
    (("service_tier", "flex"), ("processing", "batch")). Needs the package genai-prices; UsageError without it.
    """
    package = optional("genai_prices")
    place = place_of(url, provider)
    try:
        found = package.calc_price(
            package.Usage(),
            model,
            genai_request_timestamp=at or datetime.now(UTC),
            price_context=dict(context),
            **place,
        )
    except LookupError:
        return None
    if BATCH in context and not any(BATCH in variant.when.items() for variant in found.model.price_variants or ()):
        return None
    prices = found.model_price
    given = {kind: price for kind in KINDS if (price := getattr(prices, f"{kind}_mtok", None)) is not None}
    if not given:
        return None  # by the hour, by the page
    starts = sorted({tier.start for price in given.values() for tier in getattr(price, "tiers", ())})
    per_request = float(getattr(prices, "requests_kcount", None) or 0) / 1000
    steps = [Tariff({k: price_at(price, n) for k, price in given.items()}, per_request) for n in (0, *starts)]
    return Tariffs(f"{found.model.id} ({found.provider.name})", tuple(starts), tuple(steps))


def price_at(price: Any, start: int) -> float:
    """A price, of which there may be several by the length of the prompt, from `start` on."""
    prices = [tier.price for tier in getattr(price, "tiers", ()) if tier.start <= start and start]
    return float(prices[-1] if prices else getattr(price, "base", price))


def place_of(url: str, provider: str) -> dict[str, str]:
    """What the package is told about where the requests went."""
    if provider == "auto" and not url:
        return {}
    if provider == "auto" and (provider := find_provider(url).name) in ("openai", "zhipu"):
        return {"provider_api_url": url}  # the package tells their sites apart, and hosts that are unknown here
    return {"provider_id": PACKAGE_NAMES.get(provider, provider)}


@dataclass
class Bill:
    """Prices the tokens of replies, and knows which prices it took and for which models there are none."""

    given: Tariff | None = None  # by the user, for all models
    url: str = ""
    provider: str = "auto"
    batch: bool = False  # the replies came through a Batch API
    available: bool = field(default_factory=lambda: importlib.util.find_spec("genai_prices") is not None)
    used: dict[str, Tariffs] = field(default_factory=dict)

    def price(
        self, tokens: Tokens, models: Sequence[str], at: datetime | None, reply: Mapping[str, Any]
    ) -> float | None:
        """What a reply cost; None if the price is not known. Of the model's names the first that has a price counts."""
        if self.given:
            return self.given.cost(tokens)
        if not self.available:
            return None
        context = self.context(reply)
        for model in models:
            if tariffs := find_tariffs(model, self.url, self.provider, at, context):
                if len(self.used) < 100:
                    self.used.setdefault(tariffs.label, tariffs)
                return tariffs.for_prompt(tokens.prompt).cost(tokens)
        return None

    def context(self, reply: Mapping[str, Any]) -> Context:
        """What the price of a reply depends on, as the reply or the user tells."""
        usage = reply.get("usage")
        tier = reply.get("service_tier") or (usage.get("service_tier") if isinstance(usage, dict) else None)
        if self.batch or tier == "batch":  # Anthropic says so itself
            return (BATCH,)
        return (("service_tier", tier),) if isinstance(tier, str) and len(tier) < 20 else ()
