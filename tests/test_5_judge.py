"""Station 5: what a reply means, what it tells about limits and tokens."""

# ruff: noqa: E501  # a row of a table is a line
from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api_request_parallel_processor import (
    PROVIDERS,
    SHAPES,
    Reply,
    ServerLimits,
    Usage,
    error_words,
    judge,
    read_limits,
    read_usage,
    retry_delay,
)

NOW = 1_760_000_000.0  # 2025-10-09T08:53:20Z
MINUTE_LATER = "2025-10-09T08:54:20Z"


def nested(code: Any = None, message: str = "words", **more: Any) -> dict[str, Any]:
    """An error as most providers put it."""
    return {"error": {"message": message, "code": code, **more}}


def verdict(provider: str, status: int, body: Any, shape: str = "chat", text: str = "") -> tuple[str, str]:
    """Action and kind, for short tables."""
    found = judge(Reply(status=status, body=body, text=text), PROVIDERS[provider], shape)
    return found.action.name, found.kind


def flat(code: Any, message: str = "words") -> dict[str, Any]:
    """An error as DashScope and SiliconFlow put it."""
    return {"code": code, "message": message, "data": None}


def choice(finish: Any, content: Any = None, **more: Any) -> dict[str, Any]:
    """A chat reply with one choice."""
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish, **more}]
    }


REFUSED, BUSY, NO_ANSWER = ("REFUSED", "rate_limit"), ("RETRY", "server_error"), ("RETRY", "bad_reply")
REJECTED, FILTERED = ("FAIL", "bad_request"), ("FAIL", "content_filter")
BAD_KEY, NO_MONEY, REDIRECTED, DONE = ("STOP", "auth"), ("STOP", "no_money"), ("STOP", "redirect"), ("DONE", "")
CODES = [
    *[("openai", status, nested(), REJECTED) for status in (400, 404, 405, 413, 415, 422, 434, 435)],
    *[("openai", status, nested(), BUSY) for status in (408, 409, 425, 498, 499, 500, 502, 503, 504, 520, 524, 529)],
    *[("openai", status, nested(), REDIRECTED) for status in (301, 302, 303, 307, 308)],
    ("openai", 401, nested("invalid_api_key", type="invalid_request_error"), BAD_KEY),
    ("openai", 403, nested("unsupported_country_region_territory"), BAD_KEY),
    ("openai", 402, nested(), NO_MONEY),
    ("openai", 407, None, BAD_KEY),
    ("openai", 429, nested("rate_limit_exceeded", type="tokens"), REFUSED),
    ("openai", 429, nested("insufficient_quota", type="insufficient_quota"), NO_MONEY),
    ("openai", 429, nested("credit_balance_exhausted", type="insufficient_quota"), NO_MONEY),
    ("openai", 429, nested("project_spend_limit_exceeded", type="insufficient_quota"), NO_MONEY),
    ("openai", 429, nested("organization_spend_limit_exceeded", type="insufficient_quota"), NO_MONEY),
    ("openai", 429, nested("organization_usage_limit_exceeded", type="insufficient_quota"), NO_MONEY),
    ("openai", 429, nested("billing_hard_limit_reached"), NO_MONEY),
    ("openai", 429, nested("slow_down"), REFUSED),
    ("openai", 503, nested("slow_down"), REFUSED),
    ("openai", 429, nested("tokens_usage_limit_exceeded"), NO_MONEY),
    ("openai", 503, nested("server_is_overloaded"), BUSY),
    ("openai", 429, nested("resource_unavailable", "Resource Unavailable"), REFUSED),
    ("openai", 400, nested("context_length_exceeded"), REJECTED),
    ("openai", 404, nested("model_not_found"), REJECTED),
    ("openai", 503, nested("model_not_found"), REJECTED),
    ("openai", 400, nested("content_policy_violation"), FILTERED),
    ("openai", 429, nested("rate_limit_exceeded", "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 40000."), REJECTED),
    ("openai", 429, nested("rate_limit_exceeded", "Rate limit reached on TPM: Limit 30000, Used 29000, Requested 4000. Please try again in 6s."), REFUSED),
    ("openai", 500, None, BUSY),
    ("azure", 400, nested("content_filter", innererror={"code": "ResponsibleAIPolicyViolation"}), FILTERED),
    ("azure", 429, nested("429", "Requests have exceeded the call rate limit. Please retry after 6 seconds."), REFUSED),
    ("azure", 429, nested("429", "the system is under high demand"), REFUSED),
    ("azure", 403, nested("403", "Out of call volume quota. Quota will be replenished in 2 days."), NO_MONEY),
    ("azure", 404, nested("DeploymentNotFound"), REJECTED),
    ("azure", 401, nested("401"), BAD_KEY),
    *[("dashscope", 429, flat(code), REFUSED) for code in ("Throttling", "Throttling.RateQuota", "Throttling.BurstRate", "LimitRequests")],
    ("dashscope", 400, flat("Throttling.AllocationQuota", "Allocated quota exceeded"), REFUSED),
    ("dashscope", 429, nested("limit_requests"), REFUSED),
    ("dashscope", 429, nested("limit_burst_rate"), REFUSED),
    ("dashscope", 429, nested("insufficient_quota", "You exceeded your current quota: allocated quota"), REFUSED),
    ("dashscope", 403, flat("Throttling.AllocationQuota", "Free allocated quota exceeded."), NO_MONEY),
    ("dashscope", 403, flat("AllocationQuota.FreeTierOnly"), NO_MONEY),
    *[("dashscope", 400, flat(code), NO_MONEY) for code in ("Arrearage", "PrepaidBillOverdue", "PostpaidBillOverdue")],
    ("dashscope", 429, flat("CommodityNotPurchased"), NO_MONEY),
    ("dashscope", 401, flat("InvalidApiKey"), BAD_KEY),
    ("dashscope", 400, flat("DataInspectionFailed"), FILTERED),
    ("dashscope", 400, nested("data_inspection_failed"), FILTERED),
    ("dashscope", 400, flat("InvalidParameter"), REJECTED),
    ("dashscope", 500, flat("RequestTimeOut"), BUSY),
    ("dashscope", 404, flat("ModelNotFound"), REJECTED),
    ("deepinfra", 429, {"error": "Rate limited"}, REFUSED),
    ("deepinfra", 404, {"detail": {"error": "Model is not available"}}, REJECTED),
    ("deepseek", 429, nested("rate_limit"), REFUSED),
    ("deepseek", 402, nested("invalid_request_error", "Insufficient Balance"), NO_MONEY),
    ("deepseek", 422, nested("invalid_request_error"), REJECTED),
    ("moonshot", 429, nested(type="rate_limit_reached_error"), REFUSED),
    ("moonshot", 429, nested(type="engine_overloaded_error"), BUSY),
    ("moonshot", 429, nested(type="exceeded_current_quota_error"), NO_MONEY),
    ("moonshot", 403, nested(type="exceeded_current_quota_error"), NO_MONEY),
    ("moonshot", 429, nested(type="rate_limit_reached_error", message="request reached TPD rate limit, current: 9"), NO_MONEY),
    ("moonshot", 400, nested(type="content_filter"), FILTERED),
    ("moonshot", 404, nested(type="resource_not_found_error"), REJECTED),
    *[
        ("ark", 429, nested(code), REFUSED)
        for code in (
            "RateLimitExceeded.EndpointRPMExceeded",
            "RateLimitExceeded.EndpointTPMExceeded",
            "ModelAccountRpmRateLimitExceeded",
            "ModelAccountTpmRateLimitExceeded",
            "ModelAccountIpmRateLimitExceeded",
            "APIAccountRpmRateLimitExceeded",
            "AccountRateLimitExceeded",
            "InflightBatchsizeExceeded",
            "RequestBurstTooFast",
            "ServerOverloaded",
        )
    ],
    ("ark", 403, nested("AccountOverdueError"), NO_MONEY),
    ("ark", 429, nested("QuotaExceeded"), NO_MONEY),
    ("ark", 429, nested("SetLimitExceeded"), NO_MONEY),
    ("ark", 400, nested("InputTextSensitiveContentDetected"), FILTERED),
    ("ark", 400, nested("InputTextRiskDetection"), FILTERED),
    ("ark", 404, nested("InvalidEndpointOrModel.NotFound"), REJECTED),
    ("ark", 403, nested("ModelNotOpen"), REJECTED),
    ("ark", 400, nested("OutofContextError"), REJECTED),
    ("ark", 400, nested("InvalidParameter.model"), REJECTED),
    ("baichuan", 429, nested(None, "Rate limit reached for requests"), REFUSED),
    ("baichuan", 429, nested(None, "Insufficient balance"), NO_MONEY),
    ("baichuan", 429, nested(None, "账户余额不足"), NO_MONEY),
    *[("zhipu", 429, nested(code), REFUSED) for code in ("1302", "1303", "1305")],
    *[("zhipu", 429, nested(code), BUSY) for code in ("1312", "1120", "1230", "1234")],
    *[("zhipu", 429, nested(code), NO_MONEY) for code in ("1113", "1304", "1308", "1309", "1310")],
    *[("zhipu", 401, nested(code), BAD_KEY) for code in ("1000", "1001", "1002", "1003", "1004", "1110", "1111", "1112")],
    *[("zhipu", 400, nested(code), BAD_KEY) for code in ("1121", "1220")],
    *[("zhipu", 400, nested(code), REJECTED) for code in ("1210", "1211", "1212", "1213", "1214", "1215", "1261")],
    ("zhipu", 400, nested("1301"), FILTERED),
    ("zhipu", 500, nested("500"), BUSY),
    ("jiekou", 403, flat(403, "balance not enough"), REFUSED),
    ("jiekou", 403, flat(403, "invalid key"), BAD_KEY),
    ("jiekou", 429, flat(429, "server overload"), REFUSED),
    ("mistral", 429, {"object": "error", "message": "slow", "type": "x", "code": "3505"}, BUSY),
    ("mistral", 429, {"object": "error", "message": "slow", "type": "rate_limited", "code": "1300"}, REFUSED),
    ("mistral", 422, {"detail": [{"loc": ["body", "model"], "msg": "Field required"}]}, REJECTED),
    ("gemini", 400, nested(400, status="INVALID_ARGUMENT", details=[{"reason": "API_KEY_INVALID"}]), BAD_KEY),
    ("gemini", 400, nested(400, status="FAILED_PRECONDITION"), BAD_KEY),
    ("gemini", 400, nested(400, status="INVALID_ARGUMENT"), REJECTED),
    ("gemini", 429, nested(429, status="RESOURCE_EXHAUSTED", details=[{"violations": [{"quotaId": "RequestsPerMinutePerProject"}]}]), REFUSED),
    ("gemini", 429, nested(429, status="RESOURCE_EXHAUSTED", details=[{"violations": [{"quotaId": "RequestsPerDayPerProject"}]}]), NO_MONEY),
    ("gemini", 429, nested(429, "Your prepayment credits are depleted"), NO_MONEY),
    ("gemini", 429, [nested(429, status="RESOURCE_EXHAUSTED")], REFUSED),
    ("gemini", 503, nested(503, status="UNAVAILABLE"), BUSY),
    ("vertex", 429, nested(429, status="RESOURCE_EXHAUSTED"), REFUSED),
    ("vertex", 401, nested(401, status="UNAUTHENTICATED"), BAD_KEY),
    ("anthropic", 429, {"type": "error", "error": {"type": "rate_limit_error", "message": "w"}}, REFUSED),
    ("anthropic", 429, {"type": "error", "error": {"type": "rate_limit_error", "error_code": "enforced_spend_limit_reached"}}, NO_MONEY),
    ("anthropic", 402, {"type": "error", "error": {"type": "billing_error", "message": "w"}}, NO_MONEY),
    ("anthropic", 400, {"type": "error", "error": {"type": "invalid_request_error", "message": "Your credit balance is too low"}}, NO_MONEY),
    ("anthropic", 400, {"type": "error", "error": {"type": "invalid_request_error", "message": "You have reached your specified API usage limits"}}, NO_MONEY),
    ("anthropic", 400, {"type": "error", "error": {"type": "invalid_request_error", "message": "max_tokens: Field required"}}, REJECTED),
    ("anthropic", 413, {"type": "error", "error": {"type": "request_too_large", "message": "w"}}, REJECTED),
    ("anthropic", 529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, BUSY),
    ("infinigence", 429, nested("x"), REFUSED),
    ("siliconflow", 400, flat(20012), REJECTED),
    ("siliconflow", 503, flat(50505), BUSY),
    ("siliconflow", 403, flat(30001, "account balance is insufficient"), NO_MONEY),
    ("siliconflow", 401, "Invalid token", BAD_KEY),
    ("openrouter", 403, nested(403, "Your input was flagged", metadata={"reasons": ["violence"]}), FILTERED),
    ("openrouter", 403, nested(403, "Key limit exceeded (total limit)"), NO_MONEY),
    ("openrouter", 402, nested(402, "Insufficient credits"), NO_MONEY),
    ("openrouter", 429, nested(429, "Rate limit exceeded: free-models-per-min"), REFUSED),
    ("openrouter", 429, nested(429, "Rate limit exceeded: free-models-per-day"), NO_MONEY),
    ("together", 403, nested("x"), REJECTED),
    ("together", 503, nested("x"), BUSY),
    ("together", 429, nested("x"), REFUSED),
    ("together", 402, nested("x"), NO_MONEY),
    ("groq", 413, nested("rate_limit_exceeded", "Request too large: Limit 6000, Requested 8000, please reduce", type="tokens"), REJECTED),
    ("groq", 413, nested("rate_limit_exceeded", "Please try again in 4.2s", type="tokens"), REFUSED),
    ("groq", 413, nested("x"), REJECTED),
    ("ark", 400, nested("InputImageSensitiveContentDetected.PrivacyInformation"), FILTERED),
    ("ark", 400, nested("SensitiveContentDetected.Violence"), FILTERED),
    ("jiekou", 402, nested(message="balance not enough"), NO_MONEY),
    ("mistral", 429, {"object": "error", "message": "w", "type": "service_tier_capacity_exceeded", "code": None}, BUSY),
    ("anthropic", 429, nested(type="rate_limit_error", message="This request would exceed your account's monthly spend limit."), NO_MONEY),
    ("anthropic", 429, nested(type="rate_limit_error", error_code="enforced_spend_limit_reached"), NO_MONEY),
    ("groq", 498, nested("capacity_exceeded"), BUSY),
    ("local", 400, nested(400, type="BadRequestError"), REJECTED),
    ("local", 503, nested(503, "Loading model", type="unavailable_error"), BUSY),
    ("local", 503, {"error": "server busy, please try again"}, BUSY),
    ("json_gateway", 500, {"detail": "boom"}, BUSY),
]  # fmt: skip


@pytest.mark.parametrize(("provider", "status", "body", "expected"), CODES)
def test_error_codes(provider: str, status: int, body: Any, expected: tuple[str, str]) -> None:
    """Each provider's own codes mean what its documentation says."""
    assert verdict(provider, status, body) == expected


UNDER_200: list[tuple[str, Any, tuple[str, str]]] = [
    ("chat", choice("stop", "hi"), DONE),
    ("chat", choice("length", "hi"), DONE),
    ("chat", choice("length", None), DONE),
    ("chat", choice("content_filter", "half an ans"), DONE),
    ("chat", choice("content_filter", None), FILTERED),
    ("chat", choice("content_filter", ""), FILTERED),
    ("chat", choice("sensitive", ""), FILTERED),
    ("chat", choice("content_filter: PROHIBITED_CONTENT"), FILTERED),
    ("chat", choice("RECITATION"), FILTERED),
    ("chat", choice("network_error", ""), BUSY),
    ("chat", choice("insufficient_system_resource", "half"), BUSY),
    ("chat", choice("error", "", error={"code": 502, "message": "w"}), BUSY),
    ("chat", choice("tool_calls", None), DONE),
    ("chat", {**choice("stop", "hi"), "error": None}, DONE),
    ("chat", {"choices": []}, NO_ANSWER),
    ("chat", {"choices": None}, NO_ANSWER),
    ("chat", {"choices": "x"}, NO_ANSWER),
    ("chat", {"choices": [7]}, NO_ANSWER),
    ("chat", {}, NO_ANSWER),
    ("chat", {"id": "x", "object": "chat.completion"}, NO_ANSWER),
    ("chat", None, NO_ANSWER),
    ("chat", "words", BUSY),
    ("chat", [], NO_ANSWER),
    ("chat", {"choices": [choice("stop", "hi")["choices"][0], choice("content_filter")["choices"][0]]}, DONE),
    ("chat", {**choice("stop", "half an ans"), "error": {"code": 502, "message": "w"}}, BUSY),
    ("chat", {"error": {"message": "w"}}, BUSY),
    ("chat", {"error": "w"}, BUSY),
    ("chat", {"error": {"code": 429, "message": "w"}}, REFUSED),
    ("chat", {"error": {"code": 400, "message": "w"}}, REJECTED),
    ("chat", {"error": {"code": 502, "message": "w"}}, BUSY),
    ("chat", {"error": {"type": "rate_limit_error", "message": "w"}}, REFUSED),
    ("chat", {"error": {"type": "invalid_request_error", "message": "w"}}, REJECTED),
    ("chat", {"error": {"type": "authentication_error", "message": "w"}}, BAD_KEY),
    ("chat", {"error": {"type": "overloaded_error", "message": "w"}}, BUSY),
    ("chat", [{"error": {"code": 429, "message": "w"}}], REFUSED),
    ("completions", {"choices": [{"text": "x", "finish_reason": "stop"}]}, DONE),
    ("completions", {"choices": [{"text": "", "finish_reason": "content_filter"}]}, FILTERED),
    ("embeddings", {"data": [{"embedding": [0.1]}]}, DONE),
    ("embeddings", {"code": 20012, "message": "w", "data": None}, BUSY),
    ("moderations", {"results": [{"flagged": False}]}, DONE),
    ("responses", {"status": "completed", "error": None, "output": [{"type": "message", "content": []}]}, DONE),
    ("responses", {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "output": []}, DONE),
    ("responses", {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}, "output": []}, FILTERED),
    ("responses", {"status": "failed", "error": {"code": "server_error", "message": "w"}, "output": []}, BUSY),
    ("responses", {"status": "failed", "error": {"code": "rate_limit_exceeded", "message": "w"}, "output": []}, REFUSED),
    ("responses", {"status": "failed", "output": []}, BUSY),
    ("dashscope", {"output": {"text": "hi", "finish_reason": "stop"}}, DONE),
    ("dashscope", {"output": {"choices": [{"finish_reason": "stop", "message": {"content": "hi"}}]}}, DONE),
    ("dashscope", {"output": {"embeddings": [{}]}}, DONE),
    ("dashscope", {"code": "DataInspectionFailed", "message": "w"}, FILTERED),
    ("dashscope", {"code": "Throttling", "message": "w", "output": None}, REFUSED),
    ("dashscope", {"request_id": "r"}, NO_ANSWER),
    ("deepinfra", {"results": [{"generated_text": "x"}], "inference_status": {"status": "succeeded"}}, DONE),
    ("deepinfra", {"results": [], "inference_status": {"status": "failed"}}, BUSY),
    ("deepinfra", {"error": "Rate limited"}, BUSY),
    ("anthropic", {"type": "message", "content": [{"type": "text", "text": "x"}], "stop_reason": "end_turn"}, DONE),
    ("anthropic", {"type": "message", "content": [], "stop_reason": "refusal"}, FILTERED),
    ("anthropic", {"type": "message", "content": [], "stop_reason": "end_turn"}, DONE),
    ("anthropic", {"type": "error", "error": {"type": "overloaded_error", "message": "w"}}, BUSY),
    ("gemini", {"candidates": [{"content": {"parts": [{"text": "x"}]}, "finishReason": "STOP"}]}, DONE),
    ("gemini", {"candidates": [{"content": {"role": "model"}, "finishReason": "MAX_TOKENS"}]}, DONE),
    ("gemini", {"candidates": [{"content": {"parts": [{"text": "x"}]}, "finishReason": "SAFETY"}]}, DONE),
    *[
        ("gemini", {"candidates": [{"content": {"role": "model"}, "finishReason": reason}]}, FILTERED)
        for reason in ("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "OTHER")
    ],
    ("gemini", {"candidates": [{"finishReason": "SAFETY"}]}, FILTERED),
    ("gemini", {"candidates": [{"finishReason": "MALFORMED_FUNCTION_CALL"}]}, BUSY),
    ("gemini", {"promptFeedback": {"blockReason": "SAFETY"}}, FILTERED),
    ("gemini", {"promptFeedback": {"blockReason": "OTHER"}, "candidates": []}, FILTERED),
    ("gemini", {"candidates": []}, NO_ANSWER),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "body", "expected"), UNDER_200)
def test_replies_under_200(shape: str, body: Any, expected: tuple[str, str]) -> None:
    """A 200 is a success only with an answer in it."""
    row = {"dashscope": "dashscope", "deepinfra": "deepinfra"}.get(shape, "openai")
    assert verdict(row, 200, body, shape) == expected


def test_the_same_code_means_opposite_things() -> None:
    """`insufficient_quota` is final at OpenAI and a token throttle at DashScope."""
    assert verdict("openai", 429, nested("insufficient_quota")) == NO_MONEY
    assert verdict("dashscope", 429, nested("insufficient_quota")) == REFUSED


@pytest.mark.parametrize(
    ("failure", "status", "expected"),
    [
        ("connection", 0, ("RETRY", "connection")),
        ("timeout", 0, ("RETRY", "timeout")),
        ("timeout", 200, ("RETRY", "timeout")),
        ("connection", 200, ("RETRY", "connection")),
        ("bad_reply", 200, ("RETRY", "bad_reply")),
        ("too_large", 200, ("FAIL", "too_large")),
        ("connection", 429, REFUSED),
        ("too_large", 500, BUSY),
        ("timeout", 401, BAD_KEY),
    ],
)
def test_network_failures(failure: str, status: int, expected: tuple[str, str]) -> None:
    """What the network did decides, unless an error status had already arrived."""
    found = judge(Reply(status=status, failure=failure, message="reset by peer"), PROVIDERS["openai"], "chat")
    assert (found.action.name, found.kind) == expected
    assert found.message


def test_html_under_200_is_no_answer() -> None:
    """A page with status 200 is a bad reply; how it begins is kept."""
    found = judge(Reply(status=200, text="<html>\n <title>Sign in</title>"), PROVIDERS["openai"], "chat")
    assert (found.action.name, found.kind, found.message) == (*NO_ANSWER, "<html> <title>Sign in</title>")


def test_redirects_name_their_target() -> None:
    """A redirect stops the run and says where it points."""
    found = judge(Reply(status=307, headers={"Location": "https://b.example/v1"}), PROVIDERS["openai"], "chat")
    assert "https://b.example/v1" in found.message
    assert "--request_url" in found.message


WORDS = [
    ({"error": {"code": "c", "type": "t", "message": "m"}}, ("c", "t", "m")),
    ({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "m"}}, ("429", "RESOURCE_EXHAUSTED", "m")),
    ([{"error": {"code": 400, "message": "m"}}], ("400", "", "m")),
    ({"error": "m"}, ("", "", "m")),
    ({"error": "Bad Request", "message": "m", "status": 400}, ("", "400", "m Bad Request")),
    ({"code": "InvalidParameter", "message": "m", "request_id": "r"}, ("InvalidParameter", "", "m")),
    ({"object": "error", "message": "m", "type": "t", "code": 404}, ("404", "t", "m")),
    ({"detail": "Not Found"}, ("", "", "Not Found")),
    ({"detail": [{"loc": ["body", "messages", 0], "msg": "Field required"}]}, ("", "", '[{"loc":["body","messages",0],"msg":"Field required"}]')),
    ({"message": {"detail": [{"loc": ["body"], "msg": "no"}]}, "type": "t"}, ("", "t", '{"detail":[{"loc":["body"],"msg":"no"}]}')),
    ({"error": {"code": 502, "message": "Provider returned error", "metadata": {"raw": "upstream"}}}, ("502", "", 'Provider returned error {"raw":"upstream"}')),
    ({"error": {"code": True, "message": None}}, ("true", "", "")),
    ("plain", ("", "", "plain")),
    (None, ("", "", "")),
]  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), WORDS)
def test_error_words(body: Any, expected: tuple[str, str, str]) -> None:
    """Error bodies of every form give code, type and message."""
    assert error_words(body) == expected


def test_a_quota_of_the_day_is_found_behind_many_words() -> None:
    """Google names every quota that is used up, twice; what decides may come last."""
    metric = "generativelanguage.googleapis.com/generate_content_free_tier_requests"
    told = f"* Quota exceeded for metric: {metric}, limit: 20, model: gemini-2.5-flash\n" * 3
    quotas = [f"GenerateRequestsPer{span}PerProjectPerModel-FreeTier" for span in ("Minute", "Minute", "Day")]
    where = {"quotaMetric": metric, "quotaDimensions": {"location": "global", "model": "gemini-2.5-flash"}}
    violations = [{**where, "quotaId": quota, "quotaValue": "20"} for quota in quotas]
    details = [
        {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": violations},
        {"retryDelay": "36s"},
    ]
    body = nested(
        429, "You exceeded your current quota, please check your plan and billing. " * 4 + told, details=details
    )
    assert verdict("gemini", 429, body) == NO_MONEY
    found = read_limits(Reply(status=429, body=body), PROVIDERS["gemini"], NOW)
    assert found is not None
    assert found.retry_after == 36


def test_long_messages_are_cut() -> None:
    """A message of a megabyte does not end up in the log."""
    assert (
        len(judge(Reply(status=400, body={"error": {"message": "x " * 10**6}}), PROVIDERS["openai"], "chat").message)
        < 2000
    )
    assert len(judge(Reply(status=500, text="y" * 10**6), PROVIDERS["openai"], "chat").message) < 2000


LIMITS = [
    ("openai", 200, {}, ServerLimits()),
    ("openai", 429, {"Retry-After": "7"}, ServerLimits(retry_after=7)),
    ("openai", 429, {"retry-after": "7", "retry-after-ms": "250"}, ServerLimits(retry_after=0.25)),
    ("openai", 429, {"retry-after": "0"}, ServerLimits(retry_after=0)),
    ("openai", 503, {"retry-after": "Thu, 09 Oct 2025 08:53:30 GMT"}, ServerLimits(retry_after=10)),
    ("openai", 503, {"retry-after": "Thu, 09 Oct 2020 08:53:30 GMT"}, ServerLimits()),
    ("openai", 429, {"retry-after": "86400"}, ServerLimits(retry_after=600)),
    *[("openai", 429, {"retry-after": text}, ServerLimits()) for text in ("-1", "nan", "inf", "soon", "", "1e999")],
    ("openai", 200, {"retry-after": "7"}, ServerLimits()),
    ("openai", 429, {"llm_provider-retry-after": "7"}, ServerLimits(retry_after=7)),  # LiteLLM hands it on so
    (
        "openai",
        200,
        {
            "x-ratelimit-limit-requests": "5000", "x-ratelimit-remaining-requests": "4999", "x-ratelimit-reset-requests": "12ms",
            "x-ratelimit-limit-tokens": "160000", "x-ratelimit-remaining-tokens": "159000", "x-ratelimit-reset-tokens": "1m0.5s",
        },
        ServerLimits(None, 5000, 160000),
    ),
    ("openai", 429, {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}, ServerLimits(360)),
    ("openai", 200, {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6s"}, ServerLimits()),
    ("openai", 429, {"x-ratelimit-remaining-requests": "0"}, ServerLimits()),
    *[("openai", 200, {"x-ratelimit-limit-requests": text}, ServerLimits()) for text in ("0", "-1", "-5", "many", "nan", "inf", "1e300", "")],
    (
        "anthropic",
        200,
        {
            "anthropic-ratelimit-requests-limit": "50", "anthropic-ratelimit-requests-remaining": "49", "anthropic-ratelimit-requests-reset": MINUTE_LATER,
            "anthropic-ratelimit-tokens-limit": "30000", "anthropic-ratelimit-tokens-remaining": "29000", "anthropic-ratelimit-tokens-reset": MINUTE_LATER,
            "anthropic-ratelimit-output-tokens-limit": "8000", "anthropic-ratelimit-output-tokens-remaining": "7000", "anthropic-ratelimit-output-tokens-reset": "2025-10-09T08:53:30Z",
        },
        ServerLimits(None, 50, 30000),
    ),
    ("anthropic", 200, {"anthropic-ratelimit-tokens-limit": "90000", "anthropic-ratelimit-input-tokens-limit": "30000"}, ServerLimits(tokens_per_minute=90000)),
    ("anthropic", 200, {"anthropic-ratelimit-unified-reset": MINUTE_LATER}, ServerLimits()),
    (
        "groq",
        200,
        {"x-ratelimit-limit-requests": "14400", "x-ratelimit-remaining-requests": "14370", "x-ratelimit-reset-requests": "2m59.56s", "x-ratelimit-limit-tokens": "18000", "x-ratelimit-reset-tokens": "7.66s"},
        ServerLimits(tokens_per_minute=18000),
    ),
    ("groq", 429, {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "2m", "retry-after": "9"}, ServerLimits(retry_after=9)),
    (
        "together",
        200,
        {"x-ratelimit-limit": "10", "x-ratelimit-remaining": "9", "x-ratelimit-reset": "1", "x-tokenlimit-limit": "3000", "x-tokenlimit-remaining": "2000"},
        ServerLimits(None, 600, 180000),
    ),
    (
        "mistral",
        200,
        {"x-ratelimitbysize-limit-minute": "500000", "x-ratelimitbysize-remaining-minute": "499000", "x-ratelimitbysize-limit-month": "1000000000", "ratelimitbysize-reset": "42", "ratelimitbysize-query-cost": "32"},
        ServerLimits(tokens_per_minute=500000),
    ),
    ("mistral", 200, {"x-ratelimit-limit-req-minute": "60", "x-ratelimit-limit-tokens-month": "9"}, ServerLimits(requests_per_minute=60)),
    ("moonshot", 200, {"X-RateLimit-Limit": "500", "X-RateLimit-Remaining": "499", "X-RateLimit-Reset": "3"}, ServerLimits(None, 500)),
    ("openrouter", 429, {"X-RateLimit-Limit": "20", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(int((NOW + 30) * 1000))}, ServerLimits(30, 20)),
]  # fmt: skip


@pytest.mark.parametrize(("provider", "status", "headers", "expected"), LIMITS)
def test_limit_headers(provider: str, status: int, headers: dict[str, str], expected: ServerLimits) -> None:
    """Each provider's headers are read for what they say; absurd values are ignored or bounded."""
    found = read_limits(Reply(status=status, headers=headers, body={"choices": []}), PROVIDERS[provider], NOW)
    assert approximately(found or ServerLimits(), expected)
    assert (found is None) == (expected == ServerLimits())


def approximately(found: ServerLimits, expected: ServerLimits) -> bool:
    """Equal up to rounding of floats."""
    names = ServerLimits._fields
    return all(getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-3) for name in names)


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        (nested(message="Rate limit reached. Please try again in 1.2s. Visit ..."), 1.2),
        (nested(message="Please try again in 350ms."), 0.35),
        (nested(message="Please try again in 1m30s."), 90),
        (nested(message="Please try again in 7m12.5s"), 432.5),
        (nested(message="Please try again in 1h2m"), 600),
        (nested(message="Please retry after 6 seconds."), 6),
        (nested(message="Please try again after 2 minutes"), 120),
        (nested(message="try again in 20 milliseconds"), 0.02),
        (nested(message="try again later"), None),
        (nested(429, details=[{"@type": "RetryInfo", "retryDelay": "32s"}]), 32),
        ([nested(429, details=[{"@type": "RetryInfo", "retryDelay": "1.5s"}])], 1.5),
        ({"error": "Rate limited"}, None),
    ],
)
def test_hints_in_the_body(body: Any, seconds: float | None) -> None:
    """The wait that an error message asks for is understood."""
    found = read_limits(Reply(status=429, body=body), PROVIDERS["openai"], NOW)
    assert (found.retry_after if found else None) == (None if seconds is None else pytest.approx(seconds))


def test_the_hint_of_an_error_under_200_is_read() -> None:
    """OpenRouter reports upstream limits with status 200."""
    found = read_limits(Reply(status=200, body=nested(429, "try again in 2s")), PROVIDERS["openrouter"], NOW)
    assert found == ServerLimits(retry_after=2)


USAGES = [
    ("chat", {"usage": {"prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10}}, Usage(8, 2)),
    ("chat", {"usage": {"prompt_tokens": 8, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 5}}}, Usage(8, 2, 5)),
    ("chat", {"usage": {"prompt_tokens": 8, "completion_tokens": 2, "prompt_cache_hit_tokens": 4}}, Usage(8, 2, 4)),
    ("chat", {"usage": {"prompt_tokens": 8, "completion_tokens": 2, "cached_tokens": 3}}, Usage(8, 2, 3)),
    ("chat", {"usage": {"prompt_tokens": 8, "completion_tokens": 2, "input_tokens": 0, "output_tokens": 0}}, Usage(8, 2)),
    ("embeddings", {"usage": {"prompt_tokens": 8, "total_tokens": 8}}, Usage(8, 0)),
    ("embeddings", {"usage": {"total_tokens": 8}}, Usage(8, 0)),
    ("responses", {"usage": {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 1}, "output_tokens": 3}}, Usage(9, 3, 1)),
    ("dashscope", {"usage": {"input_tokens": 9, "output_tokens": 3, "total_tokens": 12}}, Usage(9, 3)),
    ("dashscope", {"usage": {"total_tokens": 12}}, Usage(12, 0)),
    ("anthropic", {"usage": {"input_tokens": 8, "cache_creation_input_tokens": 2, "cache_read_input_tokens": 5, "output_tokens": 4}}, Usage(15, 4, 5)),
    ("gemini", {"usageMetadata": {"promptTokenCount": 2, "candidatesTokenCount": 1, "thoughtsTokenCount": 6, "cachedContentTokenCount": 1}}, Usage(2, 7, 1)),
    ("deepinfra", {"inference_status": {"tokens_input": 12, "tokens_generated": 25}}, Usage(12, 25)),
    ("moderations", {"results": []}, None),
    ("chat", {"usage": None}, None),
    ("chat", {"usage": {"prompt_tokens": "8", "completion_tokens": True, "total_tokens": -3}}, None),
    ("chat", {"usage": {"prompt_tokens": 10**40, "completion_tokens": 2}}, Usage(0, 2)),
    ("chat", [1], None),
    ("chat", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "body", "expected"), USAGES)
def test_usage(shape: str, body: Any, expected: Usage | None) -> None:
    """Every family's usage is understood; what is no count is ignored."""
    assert read_usage(body, shape) == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "error code type status message detail details choices content usage output candidates finish_reason metadata "
                "reason violations promptFeedback inference_status incomplete_details msg loc prompt_tokens index".split()
            )
            | st.text(max_size=8),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
header_names = st.sampled_from(
    "retry-after retry-after-ms x-ratelimit-limit-requests x-ratelimit-reset-tokens x-ratelimit-remaining-tokens "
    "anthropic-ratelimit-requests-reset anthropic-ratelimit-input-tokens-limit x-ratelimit-reset x-tokenlimit-limit "
    "anthropic-ratelimit-output-tokens-reset x-ratelimitbysize-limit-minute X-RateLimit-Remaining location".split()
)
header_values = (
    st.text(max_size=30)
    | st.from_regex(r"-?[0-9]{1,25}(\.[0-9]{0,9})?(ms|s|m|h|d)?", fullmatch=True)
    | st.datetimes().map(lambda when: when.isoformat() + "Z")
    | st.floats().map(str)
)


@given(
    st.integers(0, 599),
    st.dictionaries(header_names | st.text(max_size=12), header_values, max_size=6),
    json_values,
    st.text(max_size=40),
)
@settings(max_examples=300, deadline=None)
def test_nothing_that_arrives_is_too_strange(status: int, headers: dict[str, str], body: Any, text: str) -> None:
    """Any status, headers and body give a verdict, and limits only within bounds."""
    for provider in (PROVIDERS["openai"], PROVIDERS["groq"], PROVIDERS["together"]):
        for shape in SHAPES:
            reply = Reply(status=status, headers=headers, body=body, text=text)
            found = judge(reply, provider, shape)
            assert found.action.name == "DONE" or (found.kind and len(found.message) < 20_000)
            read_usage(body, shape)
        limits = read_limits(reply, provider, NOW)
        if limits:
            assert all(
                0 <= value <= 1e15 for value in map(limits.__getattribute__, ServerLimits._fields) if value is not None
            )
            assert (limits.retry_after or 0) <= 600


def test_retries_back_off_with_full_jitter() -> None:
    """Delays are spread over the whole range, which doubles with each attempt up to a cap."""
    rng = random.Random(1)
    first, third, late = ([retry_delay(attempt, rng) for _ in range(500)] for attempt in (1, 3, 10**6))
    assert max(first) <= 1 < max(third) <= 4
    assert min(third) < 0.2
    assert 50 < max(late) <= 60
