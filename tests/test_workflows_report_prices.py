"""Prices: those given, and the list prices of genai-prices, cached tokens priced as such; unknown ones stay unknown."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflows._prices import BATCH, Bill, Tariff, find_tariffs
from workflows._replies import Tokens, read_tokens

genai_prices = pytest.importorskip("genai_prices")
AT = datetime(2026, 11, 1, 12, tzinfo=UTC)
MODELS = {
    "gpt-4o-mini": "https://api.openai.com/v1/chat/completions",
    "claude-sonnet-4-5": "https://api.anthropic.com/v1/messages",
    "gemini-2.5-pro": "https://generativelanguage.googleapis.com/v1beta/models/gemini-2.5-pro:generateContent",
    "gemini-2.5-flash": "https://generativelanguage.googleapis.com/v1beta/models/gemini-2.5-flash:generateContent",
    "deepseek-chat": "https://api.deepseek.com/chat/completions",
}


@settings(deadline=None)
@given(
    st.sampled_from(sorted(MODELS)),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.integers(0, 10**5),
)
def test_costs_are_those_of_the_package(model: str, fresh: int, read: int, written: int, output: int) -> None:
    """What a tariff says is what the package says for the same tokens, caches and long prompts included."""
    prompt = fresh + read + written
    counted: dict[str, Any] = {"input_tokens": prompt, "output_tokens": output}
    counted |= {name: n for name, n in (("cache_read_tokens", read), ("cache_write_tokens", written)) if n}
    usage = genai_prices.Usage(**counted)
    wanted = genai_prices.calc_price(
        usage, model, provider_api_url=MODELS[model], genai_request_timestamp=AT
    ).total_price
    tariffs = find_tariffs(model, MODELS[model], at=AT)
    assert tariffs is not None
    tokens = Tokens(prompt, output, {"cache_read": read, "cache_write": written})
    assert tariffs.for_prompt(prompt).cost(tokens) == pytest.approx(float(wanted), abs=1e-12)


def test_special_tokens_have_their_own_price_or_that_of_their_whole() -> None:
    """Cached tokens are taken out of the prompt; an hour's cache costs what a cache costs, if nothing else is said."""
    tariff = Tariff({"input": 2, "output": 8, "cache_read": 1, "cache_write": 4})
    assert tariff.cost(Tokens(1000, 100, {"cache_read": 600})) == pytest.approx(0.0022)
    assert tariff.cost(Tokens(1000, 0, {"cache_write": 600, "cache_write_1h": 500})) == pytest.approx(0.0032)
    assert tariff.cost(Tokens(1000, 100, {"output_reasoning": 90, "input_audio": 5})) == pytest.approx(0.0028)
    assert Tariff({"input": 1}, per_request=0.5).cost(Tokens(0, 0, {}), requests=3) == 1.5


@pytest.mark.parametrize(
    ("model", "url", "provider"),
    [
        ("gpt-4o-mini", "http://127.0.0.1:8000/v1/chat/completions", "auto"),  # who knows what answers there
        ("gpt-4o-mini", "https://llm.example/v1/chat/completions", "auto"),
        ("qwen-plus", "https://dashscope.aliyuncs.com/compatible-mode/v1/chat/completions", "auto"),
        ("gpt-4o-mini", "", "dashscope"),
        ("a-model-of-my-own", "", "auto"),
        ("", "", "auto"),
    ],
)
def test_unknown_prices_are_not_guessed(model: str, url: str, provider: str) -> None:
    """A model that the package does not know, or not at this provider, has no price."""
    assert find_tariffs(model, url, provider, AT) is None


@pytest.mark.parametrize(
    ("model", "provider", "label"),
    [
        ("gemini-2.5-pro", "gemini", "Google"),
        ("claude-sonnet-4-5", "vertex", "Google"),
        ("kimi-k2", "moonshot", "Moonshot"),
        ("gpt-4o", "azure", "Azure"),
    ],
)
def test_providers_are_found_by_their_names_here(model: str, provider: str, label: str) -> None:
    """The package has other names for some providers."""
    tariffs = find_tariffs(model, provider=provider, at=AT)
    assert tariffs is not None
    assert label.lower() in tariffs.label.lower()


def test_batches_and_service_tiers_have_their_own_price() -> None:
    """A batch costs half where the package knows it, and has no price where it does not."""
    standard, batch = find_tariffs("gpt-4o-mini", at=AT), find_tariffs("gpt-4o-mini", at=AT, context=(BATCH,))
    assert standard is not None
    assert batch is not None
    assert batch.steps[0].per_million["input"] == pytest.approx(standard.steps[0].per_million["input"] / 2)
    assert find_tariffs("deepseek-chat", at=AT, context=(BATCH,)) is None
    bill = Bill()
    tokens = Tokens(1_000_000, 0, {})
    tiers = [bill.price(tokens, ["gpt-5"], AT, {"service_tier": tier}) for tier in ("flex", "default", None, 7)]
    assert None not in tiers
    assert tiers[0] == pytest.approx((tiers[1] or 0) / 2)
    assert tiers[1] == tiers[2] == tiers[3]
    assert bill.price(tokens, ["claude-sonnet-4-5"], AT, {"usage": {"service_tier": "batch"}}) == pytest.approx(
        (bill.price(Tokens(1_000_000, 0, {}), ["claude-sonnet-4-5"], AT, {}) or 0) / 2
    )


def test_a_bill_takes_given_prices_first() -> None:
    """Prices of the user hold for all models; without the package there are no others."""
    bill = Bill(given=Tariff({"input": 1, "output": 2, "cache_read": 0.5}))
    assert bill.price(Tokens(100, 10, {"cache_read": 40}), ["anything"], None, {}) == pytest.approx(100e-6)
    assert Bill(available=False).price(Tokens(1, 1, {}), ["gpt-4o-mini"], AT, {}) is None


@pytest.mark.parametrize(
    ("reply", "tokens"),
    [
        (
            {
                "usage": {
                    "prompt_tokens": 100,
                    "completion_tokens": 20,
                    "prompt_tokens_details": {"cached_tokens": 64, "audio_tokens": 3},
                    "completion_tokens_details": {"reasoning_tokens": 12, "audio_tokens": 0},
                }
            },
            Tokens(100, 20, {"cache_read": 64, "output_reasoning": 12, "input_audio": 3}),
        ),
        (
            {
                "usage": {
                    "input_tokens": 10,
                    "cache_creation_input_tokens": 30,
                    "cache_read_input_tokens": 60,
                    "cache_creation": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20},
                    "output_tokens": 5,
                }
            },
            Tokens(100, 5, {"cache_read": 60, "cache_write": 30, "cache_write_1h": 20}),
        ),
        (
            {
                "usageMetadata": {
                    "promptTokenCount": 100,
                    "candidatesTokenCount": 7,
                    "thoughtsTokenCount": 13,
                    "cachedContentTokenCount": 50,
                    "promptTokensDetails": [
                        {"modality": "TEXT", "tokenCount": 40},
                        {"modality": "IMAGE", "tokenCount": 60},
                    ],
                }
            },
            Tokens(100, 20, {"cache_read": 50, "output_reasoning": 13, "input_image": 60}),
        ),
        ({"inference_status": {"tokens_input": 4, "tokens_generated": 5}}, Tokens(4, 5, {})),
        ({"usage": {"prompt_tokens": 4, "completion_tokens": True, "completion_tokens_details": []}}, Tokens(4, 0, {})),
        ({"usage": None}, None),
        ("no reply", None),
        ([], None),
    ],
)
def test_tokens_of_any_family_are_read(reply: Any, tokens: Tokens | None) -> None:
    """Prompt, output, caches, reasoning and media, in every family's words."""
    assert read_tokens(reply) == tokens
