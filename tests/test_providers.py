"""The tables at the end: providers, shapes of requests, streams, the JSON gateway."""

# ruff: noqa: E501  # a row of a table is a line
from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api_request_parallel_processor import (
    PROVIDERS,
    SHAPES,
    Reply,
    UsageError,
    assemble_stream,
    check_request,
    find_provider,
    find_shape,
    judge,
    likely_mistake,
    unwrap_gateway,
)
from tests.jobs import KEY, chats, play
from tests.local_provider import Options

if TYPE_CHECKING:
    from pathlib import Path

BEARER = {"Authorization": "Bearer KEY"}
VERSION = {"anthropic-version": "2023-06-01"}
URLS = [
    ("https://api.openai.com/v1/chat/completions", "openai", "chat", BEARER),
    ("https://eu.api.openai.com/v1/completions", "openai", "completions", BEARER),
    ("https://api.openai.com/v1/embeddings", "openai", "embeddings", BEARER),
    ("https://api.openai.com/v1/responses", "openai", "responses", BEARER),
    ("https://api.openai.com/v1/moderations", "openai", "moderations", BEARER),
    ("https://r.openai.azure.com/openai/deployments/d/chat/completions?api-version=1", "azure", "chat", {"api-key": "KEY"}),
    ("https://r.openai.azure.com/openai/v1/responses", "azure", "responses", {"api-key": "KEY"}),
    ("https://gw.example.com/openai/deployments/d/embeddings", "azure", "embeddings", {"api-key": "KEY"}),
    ("https://dashscope.aliyuncs.com/compatible-mode/v1/chat/completions", "dashscope", "chat", BEARER),
    ("https://dashscope-intl.aliyuncs.com/compatible-mode/v1/embeddings", "dashscope", "embeddings", BEARER),
    ("https://dashscope-us.aliyuncs.com/api/v1/services/aigc/text-generation/generation", "dashscope", "dashscope", BEARER),
    ("https://dashscope.aliyuncs.com/api/v1/services/aigc/multimodal-generation/generation", "dashscope", "dashscope", BEARER),
    ("https://batch.dashscope.aliyuncs.com/compatible-mode/v1/chat/completions", "dashscope", "chat", BEARER),
    ("https://ws1.cn-beijing.maas.aliyuncs.com/compatible-mode/v1/chat/completions", "dashscope", "chat", BEARER),
    ("https://api.deepinfra.com/v1/openai/chat/completions", "deepinfra", "chat", BEARER),
    ("https://api.deepinfra.com/v1/inference/meta-llama/Meta-Llama-3-8B-Instruct", "deepinfra", "deepinfra", BEARER),
    ("https://api.deepseek.com/chat/completions", "deepseek", "chat", BEARER),
    ("https://api.deepseek.com/beta/completions", "deepseek", "completions", BEARER),
    ("https://api.deepseek.com/anthropic/v1/messages", "deepseek", "anthropic", BEARER | VERSION),
    ("https://api.moonshot.cn/v1/chat/completions", "moonshot", "chat", BEARER),
    ("https://api.moonshot.ai/v1/chat/completions", "moonshot", "chat", BEARER),
    ("https://ark.cn-beijing.volces.com/api/v3/chat/completions", "ark", "chat", BEARER),
    ("https://ark.cn-beijing.volces.com/api/v3/batch/chat/completions", "ark", "chat", BEARER),
    ("https://api.baichuan-ai.com/v1/chat/completions", "baichuan", "chat", BEARER),
    ("https://open.bigmodel.cn/api/paas/v4/chat/completions", "zhipu", "chat", BEARER),
    ("https://api.z.ai/api/paas/v4/chat/completions", "zhipu", "chat", BEARER),
    ("https://api.jiekou.ai/openai/v1/chat/completions", "jiekou", "chat", BEARER),
    ("https://api.jiekou.ai/openai/v1/responses", "jiekou", "responses", BEARER),
    ("https://api.mistral.ai/v1/chat/completions", "mistral", "chat", BEARER),
    ("https://generativelanguage.googleapis.com/v1beta/models/g:generateContent", "gemini", "gemini", {"x-goog-api-key": "KEY"}),
    ("https://generativelanguage.googleapis.com/v1beta/openai/chat/completions", "gemini", "chat", BEARER),
    ("https://us-east1-aiplatform.googleapis.com/v1/projects/p/locations/l/publishers/google/models/m:generateContent", "vertex", "gemini", BEARER),
    ("https://aiplatform.googleapis.com/v1/projects/p/locations/global/endpoints/openapi/chat/completions", "vertex", "chat", BEARER),
    ("https://aiplatform.googleapis.com/v1/projects/p/locations/l/publishers/anthropic/models/c:rawPredict", "vertex", "anthropic", BEARER | VERSION),
    ("https://api.anthropic.com/v1/messages", "anthropic", "anthropic", {"x-api-key": "KEY"} | VERSION),
    ("https://api.anthropic.com/v1/chat/completions", "anthropic", "chat", BEARER),
    ("https://cloud.infini-ai.com/maas/v1/chat/completions", "infinigence", "chat", BEARER),
    ("https://api.siliconflow.cn/v1/chat/completions", "siliconflow", "chat", BEARER),
    ("https://api.siliconflow.com/v1/embeddings", "siliconflow", "embeddings", BEARER),
    ("https://openrouter.ai/api/v1/chat/completions", "openrouter", "chat", BEARER),
    ("https://api.together.xyz/v1/chat/completions", "together", "chat", BEARER),
    ("https://api.groq.com/openai/v1/chat/completions", "groq", "chat", BEARER),
    ("http://localhost:8000/v1/chat/completions", "local", "chat", BEARER),
    ("http://127.0.0.1:8080/v1/embeddings/", "local", "embeddings", BEARER),
    ("http://[::1]:11434/v1/completions", "local", "completions", BEARER),
    ("http://192.168.3.4:30000/v1/chat/completions", "local", "chat", BEARER),
    ("http://gateway.example.com:9000/gpt", "json_gateway", "chat", {}),
    ("http://127.0.0.1:9000/claude", "json_gateway", "anthropic", VERSION),
    ("https://llm.example.com/v1/chat/completions", "openai", "chat", BEARER),
    ("https://llm.example.com/v1/messages", "openai", "anthropic", BEARER | VERSION),
    ("https://llm.example.com/models/m:generateContent", "openai", "gemini", BEARER),
]  # fmt: skip


@pytest.mark.parametrize(("url", "name", "shape", "headers"), URLS)
def test_urls(url: str, name: str, shape: str, headers: dict[str, str]) -> None:
    """The URL alone tells the provider, the shape of requests and how the key is sent."""
    provider = find_provider(url)
    assert provider.name == name
    assert find_shape(urlsplit(url).path, provider) == shape
    assert provider.auth_headers("KEY") == headers


def test_every_row_is_walked() -> None:
    """The table above visits every provider and every shape; names and rows agree."""
    assert {name for _, name, _, _ in URLS} == set(PROVIDERS)
    assert {shape for _, _, shape, _ in URLS} == set(SHAPES)
    assert all(row.name == name and row.limits and row.key_env for name, row in PROVIDERS.items())


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_named_provider_wins_over_the_url(name: str) -> None:
    """With --provider every row can be tried against a server on this machine."""
    provider = find_provider("http://127.0.0.1:8000/v1/chat/completions", name)
    assert provider.name == name
    assert provider.auth_headers("") == {}


def test_unknown_names_and_paths_are_usage_errors() -> None:
    """What is not known is told together with what is."""
    with pytest.raises(UsageError, match="dashscope"):
        find_provider("https://a.example/v1/chat/completions", "dashcope")
    with pytest.raises(UsageError, match="/chat/completions"):
        find_provider("https://api.openai.com/v1/images")


def test_entra_tokens_of_azure_are_bearer_tokens() -> None:
    """A token from Entra does not go into the api-key header."""
    assert PROVIDERS["azure"].auth_headers("eyJhbGciOi") == {"Authorization": "Bearer eyJhbGciOi"}


def test_no_key_is_no_header() -> None:
    """Servers on this machine need no key."""
    assert PROVIDERS["local"].auth_headers("") == {}
    assert find_provider("https://api.anthropic.com/v1/messages").auth_headers("") == VERSION


MESSAGES = [{"role": "user", "content": "hi"}]
REQUESTS = [
    ("openai", "chat", {"model": "m", "messages": MESSAGES}, ""),
    ("openai", "chat", {"model": "m", "messages": MESSAGES, "stream": True}, ""),
    ("openai", "chat", {}, "messages"),
    ("openai", "chat", {"model": "m"}, "messages"),
    ("openai", "chat", {"model": "m", "messages": []}, "list of objects"),
    ("openai", "chat", {"model": "m", "messages": "hi"}, "list of objects"),
    ("openai", "chat", {"model": "m", "messages": ["hi"]}, "list of objects"),
    ("openai", "chat", {"model": "m", "messages": None}, "list of objects"),
    ("openai", "chat", {"messages": MESSAGES}, "model"),
    ("local", "chat", {"messages": MESSAGES}, ""),
    ("azure", "chat", {"messages": MESSAGES}, ""),
    ("json_gateway", "chat", {"messages": MESSAGES, "stream": True}, "stream"),
    ("openai", "chat", {"model": "m", "contents": [{}]}, ":generateContent"),
    ("openai", "completions", {"model": "m", "prompt": "hi"}, ""),
    ("openai", "completions", {"model": "m", "prompt": [1, 2]}, ""),
    ("openai", "completions", {"model": "m", "prompt": None}, "prompt"),
    ("openai", "completions", {"model": "m", "prompt": "hi", "stream": True}, "stream"),
    ("openai", "completions", {"model": "m", "messages": MESSAGES}, "/chat/completions"),
    ("openai", "embeddings", {"model": "m", "input": "hi"}, ""),
    ("openai", "embeddings", {"model": "m", "input": ["hi"]}, ""),
    ("openai", "embeddings", {"model": "m", "input": []}, "input"),
    ("openai", "embeddings", {"model": "m", "input": 3}, "input"),
    ("openai", "embeddings", {"model": "m", "messages": MESSAGES}, "/chat/completions"),
    ("openai", "responses", {"model": "m", "input": "hi"}, ""),
    ("openai", "responses", {"model": "m", "prompt": {"id": "p"}}, ""),
    ("openai", "responses", {"model": "m", "input": "hi", "background": True}, "background"),
    ("openai", "responses", {"model": "m", "input": "hi", "stream": True}, "stream"),
    ("openai", "moderations", {"input": "hi"}, ""),
    ("anthropic", "anthropic", {"model": "c", "max_tokens": 9, "messages": MESSAGES}, ""),
    ("anthropic", "anthropic", {"model": "c", "max_tokens": 9, "messages": MESSAGES, "stream": True}, "stream"),
    ("anthropic", "anthropic", {"max_tokens": 9, "messages": MESSAGES}, "model"),
    ("vertex", "anthropic", {"anthropic_version": "vertex-2023-10-16", "max_tokens": 9, "messages": MESSAGES}, ""),
    ("gemini", "gemini", {"contents": [{"parts": [{"text": "hi"}]}]}, ""),
    ("gemini", "gemini", {"model": "m", "messages": MESSAGES}, "/chat/completions"),
    ("dashscope", "dashscope", {"model": "q", "input": {"messages": MESSAGES}}, ""),
    ("dashscope", "dashscope", {"model": "q", "messages": MESSAGES}, "/chat/completions"),
    ("dashscope", "dashscope", {"model": "q", "input": "hi"}, "an object"),
    ("dashscope", "dashscope", {"input": {"messages": MESSAGES}}, "model"),
    ("dashscope", "chat", {"model": "q", "input": {"messages": MESSAGES}}, "/api/v1/services/"),
    ("openai", "chat", {"model": "m", "input": "hi"}, "/embeddings"),
    ("gemini", "gemini", {"contents": "hi"}, "list of objects"),
    ("openai", "embeddings", {"model": "m", "input": {"messages": MESSAGES}}, "/api/v1/services/"),
    ("deepinfra", "deepinfra", {"input": "hi"}, ""),
    ("deepinfra", "deepinfra", {"inputs": ["hi"]}, ""),
    ("deepinfra", "deepinfra", {"model": "m", "messages": MESSAGES}, "/chat/completions"),
    ("deepinfra", "deepinfra", {"input": "hi", "webhook": "https://x.example"}, "webhook"),
]  # fmt: skip


@pytest.mark.parametrize(("provider", "shape", "body", "reason"), REQUESTS)
def test_requests_that_the_endpoint_cannot_mean(provider: str, shape: str, body: dict[str, Any], reason: str) -> None:
    """A body of another family or without its main field is refused with the reason; the others pass."""
    found = check_request(body, shape, PROVIDERS[provider])
    assert (reason in found) if reason else not found


def events(*chunks: Any, ending: str = "\n\n", done: bool = True) -> bytes:
    """A stream of server-sent events."""
    lines = [f"data: {json.dumps(chunk)}" for chunk in chunks] + (["data: [DONE]"] if done else [])
    return "".join(line + ending for line in lines).encode()


def delta(index: int = 0, finish: str | None = None, **pieces: Any) -> dict[str, Any]:
    """One event with a piece of one choice."""
    choice = {"index": index, "delta": pieces, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 7, "model": "m", "choices": [choice]}


def whole(*choices: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The reply to the same request without streaming."""
    return {"id": "c1", "object": "chat.completion", "created": 7, "model": "m", "choices": list(choices), **more}


def said(content: Any, finish: str = "stop", index: int = 0, **more: Any) -> dict[str, Any]:
    """One choice of a reply."""
    return {"index": index, "message": {"role": "assistant", "content": content, **more}, "finish_reason": finish}


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def call(name: str, arguments: str) -> dict[str, Any]:
    """A tool call, or the first piece of one."""
    return {"id": name, "type": "function", "function": {"name": "f", "arguments": arguments}}


CALL = call("k1", "")
STREAMS = {
    "text with usage in a last event": (
        events(delta(role="assistant", content=""), delta(content="po"), delta(content="ng"), delta(finish="stop"), {"id": "c1", "choices": [], "usage": USAGE}),
        whole(said("pong"), usage=USAGE),
    ),
    "CRLF, comments, blank lines, no space, no DONE": (
        b": keep-alive\r\n\r\n\r\n: OPENROUTER PROCESSING\r\n\r\nevent: message\r\n"
        + events(delta(content="po"), delta(content="ng", finish="stop"), ending="\r\n\r\n", done=False).replace(b"data: ", b"data:"),
        whole(said("pong")),
    ),
    "reasoning_content": (
        events(delta(reasoning_content="hm"), delta(reasoning_content="m"), delta(content="pong"), delta(finish="stop")),
        whole(said("pong", reasoning_content="hmm")),
    ),
    "reasoning, refusal and fields of tomorrow": (
        events(delta(reasoning="a", refusal="no", thoughts="x"), delta(reasoning="b", thoughts="y"), delta(finish="stop")),
        whole(said(None, reasoning="ab", refusal="no", thoughts="xy")),
    ),
    "two choices, mixed": (
        events(delta(1, content="b"), delta(0, content="a"), delta(1, content="d", finish="stop"), delta(0, content="c", finish="length")),
        whole(said("ac", "length"), said("bd", index=1)),
    ),
    "tool calls by index": (
        events(
            delta(role="assistant", content=None, tool_calls=[{"index": 0, **CALL}]),
            delta(tool_calls=[{"index": 0, "function": {"arguments": '{"a"'}}]),
            delta(tool_calls=[{"index": 1, "id": "k2", "type": "function", "function": {"name": "g", "arguments": "{}"}}]),
            delta(tool_calls=[{"index": 0, "id": "", "function": {"name": None, "arguments": ": 1}"}}]),
            delta(finish="tool_calls"),
        ),
        whole(
            said(
                None,
                "tool_calls",
                tool_calls=[
                    {"id": "k1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
                    {"id": "k2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
                ],
            )
        ),
    ),
    "content in parts (Mistral)": (
        events(
            delta(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "h"}]}]),
            delta(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "m"}]}]),
            delta(content="po"),
            delta(content="ng"),
            delta(finish="stop"),
        ),
        whole(
            said(
                [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                    {"type": "text", "text": "pong"},
                ]
            )
        ),
    ),
    "content in parts that take turns": (
        events(
            delta(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "h"}]}]),
            delta(content=[{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "u"}]),
            delta(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "m"}]}], finish="stop"),
        ),
        whole(
            said(
                [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "h"}]},
                    {"type": "text", "text": "a"},
                    {"type": "image_url", "image_url": "u"},
                    {"type": "thinking", "thinking": [{"type": "text", "text": "m"}]},
                ]
            )
        ),
    ),
    "tool calls that all have the same index (Gemini)": (
        events(delta(tool_calls=[{"index": 0, **call("k1", "{1}")}]), delta(tool_calls=[{"index": 0, **call("k2", "{2}")}]), delta(finish="tool_calls")),
        whole(said(None, "tool_calls", tool_calls=[call("k1", "{1}"), call("k2", "{2}")])),
    ),
    "tool calls without index, whole": (
        events(delta(tool_calls=[call("", "{1}"), call("", "{2}")]), delta(tool_calls=[call("k3", "{3}")]), delta(finish="tool_calls")),
        whole(said(None, "tool_calls", tool_calls=[call("", "{1}"), call("", "{2}"), call("k3", "{3}")])),
    ),
    "tool calls without index, in pieces": (
        events(delta(tool_calls=[call("k1", "{")]), delta(tool_calls=[{"function": {"arguments": "}"}}]), delta(tool_calls=[call("k2", "{}")]), delta(finish="tool_calls")),
        whole(said(None, "tool_calls", tool_calls=[call("k1", "{}"), call("k2", "{}")])),
    ),
    "a tool call that repeats its id": (
        events(delta(tool_calls=[{"index": 0, **call("k1", "{")}]), delta(tool_calls=[{"index": 0, **call("k1", "}")}]), delta(finish="tool_calls")),
        whole(said(None, "tool_calls", tool_calls=[call("k1", "{}")])),
    ),
    "details of reasoning (OpenRouter)": (
        events(
            delta(reasoning_details=[{"type": "reasoning.text", "text": "h", "format": "f", "index": 0}]),
            delta(reasoning_details=[{"type": "reasoning.text", "text": "m", "format": "f", "index": 0}]),
            delta(reasoning_details=[{"type": "reasoning.encrypted", "data": "x", "format": "f", "index": 0}]),
            delta(content="pong", finish="stop"),
        ),
        whole(
            said(
                "pong",
                reasoning_details=[
                    {"type": "reasoning.text", "text": "hm", "format": "f", "index": 0},
                    {"type": "reasoning.encrypted", "data": "x", "format": "f", "index": 0},
                ],
            )
        ),
    ),
    "a choice without index": (
        events({"choices": [{"delta": {"content": "po"}}]}, {"choices": [{"delta": {"content": "ng"}, "finish_reason": "stop"}]}),
        {"object": "chat.completion", "choices": [{"message": {"role": "assistant", "content": "pong"}, "finish_reason": "stop"}]},
    ),
    "a message in place of the last delta": (
        events({"choices": [said("pong")]}),
        {"object": "chat.completion", "choices": [said("pong")]},
    ),
    "an event about something else": (
        events({"id": "c1", "metadata": {"a": 1}}, delta(content="pong", finish="stop")),
        whole(said("pong"), metadata={"a": 1}),
    ),
    "usage inside the choice (Moonshot)": (
        events(delta(content="pong"), {**delta(), "choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": USAGE}]}),
        whole({**said("pong"), "usage": USAGE}, usage=USAGE),
    ),
    "usage of Groq": (
        events(delta(content="pong"), {**delta(finish="stop"), "x_groq": {"id": "g", "usage": USAGE}}),
        whole(said("pong"), usage=USAGE, x_groq={"id": "g", "usage": USAGE}),
    ),
    "usage that grows with every event": (
        events({**delta(content="po"), "usage": {"prompt_tokens": 3, "completion_tokens": 1}}, {**delta(content="ng", finish="stop"), "usage": {"prompt_tokens": 3, "completion_tokens": 2}}),
        whole(said("pong"), usage={"prompt_tokens": 3, "completion_tokens": 2}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_streams(name: str) -> None:
    """A stream becomes the reply that the same request without streaming would have given."""
    raw, expected = STREAMS[name]
    assert assemble_stream(raw) == (expected, "")


def test_logprobs_of_a_stream_are_strung_together() -> None:
    """The tokens of all pieces stand in one list."""
    tokens = [
        {"token": t, "logprob": -0.5, "bytes": [112], "top_logprobs": [{"token": t, "logprob": -0.5}]} for t in "pong"
    ]
    pieces = [delta(content=token["token"], finish="stop" if token is tokens[-1] else None) for token in tokens]
    for piece, token in zip(pieces, tokens, strict=True):
        piece["choices"][0]["logprobs"] = {"content": [token], "refusal": None}
    reply, _ = assemble_stream(events(*pieces))
    assert reply == whole({**said("pong"), "logprobs": {"content": tokens, "refusal": None}})


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b": keep-alive\n\n",
        b"<html>",
        events({"choices": []}),
        events(delta(content="po")),
        events(delta(content="po"), done=False) + b'data: {"choices": [{"ind',
        events(delta(content="a", finish="stop"), delta(1, content="b")),
        b"data: [1]\n\n",
        b"data: \xff\n\n",
        b"data: " + b"[" * 10**5,
    ],
)
def test_streams_that_break_off(raw: bytes) -> None:
    """Without a finish reason for every choice there is no reply, but a reason."""
    reply, why = assemble_stream(raw)
    assert reply is None
    assert "broke off" in why


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"code": 502, "message": "upstream"}},
        {"object": "error", "message": "upstream", "code": 502},
        {**delta(), "error": {"code": 502, "message": "upstream"}},
    ],
)
def test_an_error_inside_a_stream_is_judged_like_any_error(error: dict[str, Any]) -> None:
    """The error event is handed on as the reply."""
    reply, why = assemble_stream(events(delta(content="po"), error))
    assert not why
    found = judge(Reply(status=200, body=reply), PROVIDERS["openrouter"], "chat")
    assert (found.action.name, found.kind, "upstream" in found.message) == ("RETRY", "server_error", True)


pieces_of = st.lists(st.text(max_size=5), max_size=8)


@given(pieces_of, pieces_of, pieces_of)
@settings(max_examples=100, deadline=None)
def test_how_a_text_is_cut_does_not_matter(content: list[str], reasoning: list[str], arguments: list[str]) -> None:
    """Any cut of texts and arguments into deltas gives the same reply."""
    stream = [delta(role="assistant", content="", reasoning_content="", tool_calls=[{"index": 0, **CALL}])]
    stream += [delta(reasoning_content=piece) for piece in reasoning] + [delta(content=piece) for piece in content]
    stream += [delta(tool_calls=[{"index": 0, "function": {"arguments": piece}}]) for piece in arguments]
    reply, _ = assemble_stream(events(*stream, delta(finish="stop")))
    call = {**CALL, "function": {"name": "f", "arguments": "".join(arguments)}}
    assert reply == whole(said("".join(content), reasoning_content="".join(reasoning), tool_calls=[call]))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "delta", "index", "content", "type", "id", "tool_calls", "error"]), inner
        )
    ),
    max_leaves=15,
)


@given(st.lists(values, max_size=4))
@settings(max_examples=200, deadline=None)
def test_no_stream_is_too_strange(chunks: list[Any]) -> None:
    """Whatever stands in the events, the result is a reply or a reason."""
    reply, why = assemble_stream(events(*chunks))
    assert (reply is None) == bool(why)


def test_a_long_stream_is_assembled() -> None:
    """A long text in pieces of four characters comes out whole."""
    reply, _ = assemble_stream(events(*[delta(content="abcd")] * 20_000, delta(finish="stop")))
    assert reply is not None
    assert len(reply["choices"][0]["message"]["content"]) == 80_000


def test_gateway_round_trip(tmp_path: Path) -> None:
    """The request goes out as a text under the user name; the reply inside comes back with the credits beside it."""
    body = {"model": "m", "messages": [{"role": "user", "content": "grüße \ud800"}]}
    played = play(tmp_path, [{**body, "metadata": {"id": 1}}], path="/gpt", api_key="lab_user_7")
    sent = json.loads(played.stats.calls_seen[0]["body"])
    assert (sent["username"], json.loads(sent["request"])) == ("lab_user_7", body)
    assert not {"authorization", "x-api-key"} & played.stats.calls_seen[0]["headers"].keys()
    [[request, reply, metadata, details]] = played.lines
    assert (request, metadata) == (body, {"id": 1})
    assert reply["choices"][0]["message"]["content"].startswith("You said: grüße")
    assert details.keys() == {"credits_consumed", "credits_total"}


@pytest.mark.parametrize(
    "body", [{}, {"detail": "no credits"}, None, [], "x", {"raw": None}, {"raw": "<html>"}, {"raw": {}}]
)
def test_gateway_replies_without_raw_are_failures(body: Any) -> None:
    """A gateway reply without a usable `raw` has a problem, and keeps the gateway's words."""
    reply, _, problem = unwrap_gateway(body)
    assert reply is None
    assert problem
    assert "no credits" in problem or "detail" not in (body or {})


# ==== every row in real runs ==========================================================================================


def ask(shape: str, text: str) -> dict[str, Any]:
    """A request of each shape that says this."""
    messages = [{"role": "user", "content": text}]
    bodies: dict[str, dict[str, Any]] = {
        "chat": {"model": "m", "messages": messages},
        "anthropic": {"model": "m", "max_tokens": 64, "messages": messages},
        "gemini": {"contents": [{"role": "user", "parts": [{"text": text}]}]},
        "dashscope": {"model": "m", "input": {"messages": messages}},
        "completions": {"model": "m", "prompt": text},
    }
    return bodies.get(shape, {"model": "m", "input": text})


ROWS = {(name, shape): urlsplit(url).path.rstrip("/") for url, name, shape, _ in URLS if "llm.example.com" not in url}
OUTCOMES = {  # what the provider answers to a question: how it ends
    "plain": "",
    "requests": "",
    "overloaded": "",
    "internal": "",
    "filtered": "content_filter",
    "missing": "bad_request",
    "bad_request": "bad_request",
}


@pytest.mark.parametrize(("name", "shape"), ROWS)
def test_every_row_in_a_run(tmp_path: Path, name: str, shape: str) -> None:
    """Each provider's key, answers, token counts, refusals and errors, over sockets, in its own dialect."""
    requests = [{**ask(shape, f"question {kind}."), "metadata": {"id": i}} for i, kind in enumerate(OUTCOMES)]
    once = {"requests", "overloaded", "internal"}
    rules = [
        {"contains": f"question {kind}.", "kind": kind, "times": 1 if kind in once else 99}
        for kind in OUTCOMES
        if kind != "plain"
    ]
    options = Options(provider=name, api_key=KEY, statuses=rules)
    played = play(tmp_path, requests, options, path=ROWS[name, shape], provider=name, save_details=True)
    for i, (kind, expected) in enumerate(OUTCOMES.items()):
        _, outcome, _, details = played.by_id[i]
        if expected:
            told = name not in ("deepinfra", "json_gateway", "local", "anthropic") and shape != "anthropic"  # in a code
            kinds = [[expected]] if told else [[expected], ["bad_request"]]
            assert [error["kind"] for error in outcome] in kinds, (kind, outcome)
        else:
            assert isinstance(outcome, dict), (kind, outcome)
            assert shape == "moderations" or details["tokens"] > 0
    assert KEY not in played.results.read_text("utf-8")


@pytest.mark.parametrize("kind", ["auth", "no_money"])
@pytest.mark.parametrize(("name", "shape"), ROWS)
def test_every_row_stops_for_a_key_or_for_money(tmp_path: Path, name: str, shape: str, kind: str) -> None:
    """A refused key or an empty account ends the run, and leaves the rest for later."""
    options = Options(provider=name, statuses=[{"kind": kind}])
    played = play(tmp_path, [ask(shape, "hi")] * 5, options, path=ROWS[name, shape], provider=name, give_up_minutes=1)
    assert played.tally.exit_code == 3
    assert not played.lines or (name, kind) == ("jiekou", "no_money")  # says of a rate limit that the balance is gone


@pytest.mark.parametrize("reasoning", [False, True])
@pytest.mark.parametrize("name", [name for name, shape in ROWS if shape == "chat" and name != "json_gateway"])
def test_every_row_streams_what_it_answers(tmp_path: Path, name: str, reasoning: bool) -> None:
    """A stream becomes what the same provider answers without: text, reasoning, tool calls, usage."""
    tool = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "required"}
    found = []
    for stream in (False, True):
        requests = [{**ask("chat", "hi"), **more, "stream": stream} for more in ({}, {"n": 2}, {"max_tokens": 3}, tool)]
        options = Options(provider=name, reasoning=reasoning, stream_comments=True, stream_piece_bytes=7)
        folder = tmp_path / str(stream)
        folder.mkdir()
        played = play(folder, requests, options, path=ROWS[name, "chat"], provider=name)
        found.append({json.dumps({**line[0], "stream": 0}): line[1] for line in played.lines})
    assert found[0] == found[1]


def test_the_likely_mistake_stands_in_the_result(tmp_path: Path) -> None:
    """Where a run does not stop for it, the failed line says what is probably wrong."""
    rules = [{"contains": "000.", "kind": "missing"}]
    played = play(tmp_path, chats(3), Options(statuses=rules))
    [error] = played.by_id[0][1]
    assert error["message"].startswith("The model `gpt-4o-mini` does not exist.")
    assert 'Check "model"' in error["message"]


MISTAKES = [
    ("https://api.openai.com/v1/chat/completions", "sk-ant-abc", 401, None, "anthropic"),
    ("https://api.anthropic.com/v1/messages", "gsk_abc", 401, None, "groq"),
    ("https://api.openai.com/v1/chat/completions", "AIzaSyabc", 401, None, "gemini"),
    ("https://api.openai.com/v1/chat/completions", "sk-or-v1-abc", 401, None, "openrouter"),
    ("https://api.deepseek.com/chat/completions", "sk-proj-abc", 401, None, "looks like one of openai"),
    ("https://api.deepseek.com/chat/completions", f"{'0a' * 16}.abcdefgh", 401, None, "zhipu"),
    ("https://dashscope-intl.aliyuncs.com/compatible-mode/v1/chat/completions", "sk-1", 401, None, "region"),
    ("https://api.moonshot.ai/v1/chat/completions", "sk-1", 401, None, "api.moonshot.ai"),
    ("https://api.groq.com/openai/v1/chat/completions", "sk-1", 401, None, "GROQ_API_KEY"),
    ("https://api.openai.com/v1/chat/completions", "sk-1", 402, None, "Top up"),
    ("https://api.openai.com/v2/chat/completions", "sk-1", 404, None, "/v2/chat/completions"),
    ("https://api.openai.com/v1/chat/completions", "sk-1", 404, {"error": {"code": "model_not_found", "message": "m"}}, '"model"'),
    ("https://api.openai.com/v1/chat/completions", "sk-1", 400, {"error": {"message": "m"}}, ""),
    ("https://api.openai.com/v1/chat/completions", "sk-1", 400, {"error": {"message": "This model's maximum context length is 8"}}, ""),
    ("https://api.openai.com/v1/chat/completions", "sk-1", 503, {"error": {"message": "model not found yet"}}, ""),
    ("https://open.bigmodel.cn/api/paas/v4/chat/completions", "sk-1", 400, {"error": {"code": "1211", "message": "模型不存在，请检查模型代码。"}}, '"model"'),
    ("https://api.mistral.ai/v1/chat/completions", "sk-1", 400, {"message": "Invalid model: m", "type": "invalid_model", "code": "1500"}, '"model"'),
    ("https://api.siliconflow.cn/v1/chat/completions", "sk-1", 400, {"code": 20012, "message": "Model does not exist. Please check it."}, '"model"'),
    ("https://openrouter.ai/api/v1/chat/completions", "sk-1", 400, {"error": {"code": 400, "message": "m is not a valid model ID"}}, '"model"'),
    ("https://api.anthropic.com/v1/messages", "sk-1", 404, {"error": {"type": "not_found_error", "message": "model: m"}}, '"model"'),
]  # fmt: skip


@pytest.mark.parametrize(("url", "key", "status", "body", "expected"), MISTAKES)
def test_likely_mistakes(url: str, key: str, status: int, body: Any, expected: str) -> None:
    """A key of another provider, a wrong region, path or model are named in a sentence."""
    provider = find_provider(url)
    endpoint: Any = SimpleNamespace(url=url + "?secret=1", provider=provider, shape="chat", key=key)
    reply = Reply(status=status, body=body)
    found = likely_mistake(endpoint, judge(reply, provider, "chat"), reply)
    assert (expected in found) if expected else not found
    assert "secret" not in found
    assert key not in found
