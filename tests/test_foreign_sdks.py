"""The local provider as the official clients see it: if they accept what it answers, it is shaped right.

Skipped without the clients. To run them: pip install openai anthropic google-genai mistralai dashscope groq
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from api_request_parallel_processor import assemble_stream
from tests.jobs import KEY, ProviderProcess
from tests.local_provider import ERRORS, answer_to, embedding_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]  # what other packages warn of is not ours

SAID = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}}}
STRICT = {**SCHEMA, "required": ["text"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "echo", "parameters": STRICT, "strict": True}}
CALLING = {"tools": [TOOL], "tool_choice": "required"}


def package(name: str, install: str = "") -> Any:
    """Import the client of a provider, or skip."""
    return pytest.importorskip(name, reason=f"needs: pip install {install or name}")


def checked(raw: Any) -> Any:
    """Parse a raw reply, and hold its text against the client's own types, which it does not do by itself."""
    reply = raw.parse()
    type(reply).model_validate_json(raw.http_response.content)
    return reply


def without_nulls(value: Any) -> Any:
    """Leave out fields that hold nothing."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return value


def control(server: ProviderProcess, **options: Any) -> None:
    """Change options of the local provider for this test."""
    server.ask("/_control", options)


# ==== openai ==========================================================================================================


@pytest.fixture
def openai(provider: ProviderProcess) -> Iterator[Any]:
    """OpenAI's client of the local provider."""
    with package("openai").OpenAI(base_url=f"{provider.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("more", [{}, {"n": 2}, {"max_tokens": 3}, CALLING], ids=["plain", "n", "cut", "tools"])
def test_openai_chat(openai: Any, more: dict[str, Any]) -> None:
    """Answers, several of them, ones that are cut off, and tool calls."""
    reply = checked(openai.chat.completions.with_raw_response.create(model="gpt-4o-mini", messages=SAID, **more))
    assert len(reply.choices) == more.get("n", 1)
    for choice in reply.choices:
        assert choice.finish_reason == (
            "tool_calls" if "tools" in more else "length" if "max_tokens" in more else "stop"
        )
        assert choice.message.content == (None if "tools" in more else answer_to("hi"))
        assert [call.function.name for call in choice.message.tool_calls or ()] == ["echo"] * ("tools" in more)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens > 0


@pytest.mark.parametrize("more", [{}, {"n": 2}, {"max_tokens": 3}, CALLING], ids=["plain", "n", "cut", "tools"])
@pytest.mark.parametrize("row", ["openai", "deepseek", "openrouter"])
def test_openai_stream(openai: Any, provider: ProviderProcess, row: str, more: dict[str, Any]) -> None:
    """The client puts the same reply together from a stream as we do, which is the reply without streaming."""
    control(provider, provider=row, reasoning=row != "openai")
    asked = {"model": "gpt-4o-mini", "messages": SAID, **more}
    options = {"stream_options": {"include_usage": True}}
    try:
        with openai.chat.completions.stream(**asked, **options) as stream:
            theirs = stream.get_final_completion().to_dict()
    except package("openai").LengthFinishReasonError as cut:
        theirs = cut.completion.to_dict()
    raw = openai.chat.completions.with_raw_response.create(stream=True, **asked, **options).http_response.read()
    ours, why = assemble_stream(raw)
    assert not why
    plain = checked(openai.chat.completions.with_raw_response.create(**asked)).to_dict()
    assert ours == plain
    for choice in theirs["choices"]:  # it adds what it parsed, and keeps the numbers of tool calls
        for call in choice["message"].get("tool_calls") or ():
            del call["index"], call["function"]["parsed_arguments"]
    assert without_nulls(theirs) == without_nulls(plain)


def test_openai_stream_that_fails_midway(openai: Any, provider: ProviderProcess) -> None:
    """An error event in the middle of a stream is an error for the client too."""
    control(provider, fault_script=["error_200"])
    with pytest.raises(package("openai").APIError) as raised:
        list(openai.chat.completions.create(model="m", messages=SAID, stream=True))
    assert raised.value.type == "server_error"


def test_openai_embeddings(openai: Any) -> None:
    """Vectors as the client asks for them (base64), and as numbers."""
    reply = openai.embeddings.create(model="text-embedding-3-small", input=["a", "b"])
    assert [item.embedding for item in reply.data] == [
        pytest.approx(embedding_of(text, 8), abs=1e-6) for text in ("a", "b")
    ]
    raw = openai.embeddings.with_raw_response.create(model="m", input="a", encoding_format="float", dimensions=3)
    assert checked(raw).data[0].embedding == embedding_of("a", 3)


@pytest.mark.parametrize("reasoning", [False, True])
def test_openai_responses(openai: Any, provider: ProviderProcess, reasoning: bool) -> None:
    """The newer endpoint, with reasoning and without."""
    control(provider, reasoning=reasoning)
    reply = checked(openai.responses.with_raw_response.create(model="gpt-5", input="hi"))
    assert reply.output_text == answer_to("hi")
    assert [item.type for item in reply.output] == ["reasoning"] * reasoning + ["message"]
    assert (reply.status, reply.usage.total_tokens > 0) == ("completed", True)
    cut = checked(openai.responses.with_raw_response.create(model="gpt-5", input="hi", max_output_tokens=3))
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_openai_completions_and_moderations(openai: Any) -> None:
    """The old completions, several prompts at a time, and moderations."""
    reply = checked(openai.completions.with_raw_response.create(model="davinci-002", prompt=["a", "b"], max_tokens=16))
    assert [choice.text for choice in reply.choices] == [answer_to("a"), answer_to("b")]
    verdict = checked(openai.moderations.with_raw_response.create(model="omni-moderation-latest", input="a"))
    assert not verdict.results[0].flagged


OPENAI_ERRORS = [
    ("auth", "AuthenticationError"),
    ("bad_request", "BadRequestError"),
    ("filtered", "BadRequestError"),
    ("missing", "NotFoundError"),
    ("path", "NotFoundError"),
    ("requests", "RateLimitError"),
    ("tokens", "RateLimitError"),
    ("no_money", "RateLimitError"),
    ("internal", "InternalServerError"),
    ("overloaded", "InternalServerError"),
]


@pytest.mark.parametrize(("kind", "error"), OPENAI_ERRORS)
def test_openai_errors(openai: Any, provider: ProviderProcess, kind: str, error: str) -> None:
    """Each error has the client's own class, with code, type and message."""
    control(provider, statuses=[{"kind": kind}])
    with pytest.raises(getattr(package("openai"), error)) as raised:
        openai.chat.completions.create(model="m", messages=SAID)
    status, code, kind_of_error, _ = ERRORS["openai"][kind]
    assert (raised.value.status_code, raised.value.code, raised.value.type) == (status, code, kind_of_error)
    assert raised.value.body["message"]


def test_openai_connections(openai: Any, provider: ProviderProcess) -> None:
    """A reset and a silence are the client's connection errors."""
    control(provider, fault_script=["reset", "hang"])
    with pytest.raises(package("openai").APIConnectionError):
        openai.chat.completions.create(model="m", messages=SAID)
    with pytest.raises(package("openai").APITimeoutError):
        openai.chat.completions.create(model="m", messages=SAID, timeout=0.5)


def test_openai_rate_headers(openai: Any, provider: ProviderProcess) -> None:
    """Limits stand in the headers, and the client waits as long as a refusal asks for."""
    control(provider, requests_per_minute=600, tokens_per_minute=6000, told_wait=0.05)
    raw = openai.chat.completions.with_raw_response.create(model="m", messages=SAID)
    assert (raw.headers["x-ratelimit-limit-requests"], raw.headers["x-ratelimit-limit-tokens"]) == ("600", "6000")
    assert raw.headers["x-ratelimit-remaining-requests"] == "599"
    assert raw.headers["x-ratelimit-reset-requests"].endswith("ms")
    control(provider, statuses=[{"kind": "requests", "times": 2}])
    patient = openai.with_options(max_retries=2)
    assert patient.chat.completions.create(model="m", messages=SAID).choices[0].message.content
    assert provider.ask("/_stats")["statuses"] == {"200": 2, "429": 2}


def test_azure_by_openai(provider: ProviderProcess) -> None:
    """Azure's deployment URLs, its key header and its error."""
    openai = package("openai")
    control(provider, api_key=KEY)

    where = {"azure_endpoint": provider.url, "api_version": "2024-10-21", "max_retries": 0}
    with openai.AzureOpenAI(api_key=KEY, **where) as client:
        assert checked(client.chat.completions.with_raw_response.create(model="dep", messages=SAID)).model == "dep"
    with openai.AzureOpenAI(api_key="sk-of-somebody-else", **where) as client:
        with pytest.raises(openai.AuthenticationError) as raised:
            client.chat.completions.create(model="dep", messages=SAID)
        assert raised.value.code == "401"


# ==== anthropic =======================================================================================================


@pytest.fixture
def anthropic(provider: ProviderProcess) -> Iterator[Any]:
    """Anthropic's client of the local provider."""
    with package("anthropic").Anthropic(base_url=provider.url, api_key=KEY, max_retries=0) as client:
        yield client


MESSAGE = {"model": "claude-x", "max_tokens": 64, "messages": SAID}


@pytest.mark.parametrize("thinking", [False, True])
def test_anthropic_messages(anthropic: Any, provider: ProviderProcess, thinking: bool) -> None:
    """Text, thinking, what came from the cache, and an answer that is cut off."""
    control(provider, api_key=KEY, reasoning=thinking, cached_tokens=2)
    reply = checked(anthropic.messages.with_raw_response.create(**MESSAGE))
    assert [block.type for block in reply.content] == ["thinking"] * thinking + ["text"]
    assert (reply.content[-1].text, reply.stop_reason) == (answer_to("hi"), "end_turn")
    assert (reply.usage.cache_read_input_tokens, reply.usage.output_tokens) == (2, 16)
    assert (
        checked(anthropic.messages.with_raw_response.create(**MESSAGE | {"max_tokens": 3})).stop_reason == "max_tokens"
    )


def test_anthropic_tools(anthropic: Any) -> None:
    """A tool that must be used is used."""
    tools = {"tools": [{"name": "echo", "input_schema": SCHEMA}], "tool_choice": {"type": "any"}}
    reply = checked(anthropic.messages.with_raw_response.create(**MESSAGE, **tools))
    assert reply.stop_reason == "tool_use"
    assert [(block.type, block.name, block.input) for block in reply.content] == [("tool_use", "echo", {"text": "hi"})]


ANTHROPIC_ERRORS = [
    ("auth", "AuthenticationError"),
    ("bad_request", "BadRequestError"),
    ("filtered", "BadRequestError"),
    ("missing", "NotFoundError"),
    ("too_large", "RequestTooLargeError"),
    ("requests", "RateLimitError"),
    ("internal", "InternalServerError"),
    ("overloaded", "OverloadedError"),
    ("no_money", "APIStatusError"),
]


@pytest.mark.parametrize(("kind", "error"), ANTHROPIC_ERRORS)
def test_anthropic_errors(anthropic: Any, provider: ProviderProcess, kind: str, error: str) -> None:
    """Each error has the client's own class and type."""
    from importlib import import_module

    control(provider, statuses=[{"kind": kind}])
    known = vars(import_module("anthropic._exceptions"))
    with pytest.raises(known[error]) as raised:
        anthropic.messages.create(**MESSAGE)
    status, _, kind_of_error, _ = ERRORS["anthropic"][kind]
    assert (raised.value.status_code, raised.value.body["error"]["type"]) == (status, kind_of_error)
    assert raised.value.request_id == raised.value.body["request_id"]


def test_anthropic_rate_headers(anthropic: Any, provider: ProviderProcess) -> None:
    """Limits stand in the headers, and a refusal is tried again."""
    control(provider, requests_per_minute=600, tokens_per_minute=60000)
    raw = anthropic.messages.with_raw_response.create(**MESSAGE)
    assert (raw.headers["anthropic-ratelimit-requests-limit"], raw.headers["anthropic-ratelimit-tokens-limit"]) == (
        "600",
        "60000",
    )
    control(provider, statuses=[{"kind": "requests", "times": 1}], told_wait=0.05)
    assert anthropic.with_options(max_retries=1).messages.create(**MESSAGE).content


# ==== google-genai ====================================================================================================


@pytest.fixture
def genai(provider: ProviderProcess) -> Iterator[Any]:
    """Google's client of the local provider."""
    google = package("google.genai", "google-genai")
    client = google.Client(api_key=KEY, http_options={"base_url": provider.url})
    yield client
    client.close()


@pytest.mark.parametrize("thinking", [False, True])
def test_gemini_content(genai: Any, provider: ProviderProcess, thinking: bool) -> None:
    """Text, thoughts apart from it, several candidates, usage."""
    control(provider, api_key=KEY, reasoning=thinking)
    reply = genai.models.generate_content(model="gemini-x", contents="hi", config={"candidate_count": 2})
    assert reply.text == answer_to("hi")
    assert [bool(part.thought) for part in reply.candidates[1].content.parts] == [True] * thinking + [False]
    assert [candidate.finish_reason.name for candidate in reply.candidates] == ["STOP", "STOP"]
    usage = reply.usage_metadata
    spent = usage.prompt_token_count + usage.candidates_token_count + (usage.thoughts_token_count or 0)
    assert (usage.total_token_count, bool(usage.thoughts_token_count)) == (spent, thinking)


@pytest.mark.parametrize(
    ("kind", "code", "status"),
    [
        ("auth", 400, "INVALID_ARGUMENT"),
        ("missing", 404, "NOT_FOUND"),
        ("requests", 429, "RESOURCE_EXHAUSTED"),
        ("overloaded", 503, "UNAVAILABLE"),
    ],
)
def test_gemini_errors(genai: Any, provider: ProviderProcess, kind: str, code: int, status: str) -> None:
    """Errors as Google words them."""
    errors = package("google.genai.errors", "google-genai")
    control(provider, statuses=[{"kind": kind}])
    with pytest.raises(errors.ServerError if code >= 500 else errors.ClientError) as raised:
        genai.models.generate_content(model="gemini-x", contents="hi")
    assert (raised.value.code, raised.value.status) == (code, status)
    assert raised.value.message


def test_gemini_blocks_a_prompt(genai: Any, provider: ProviderProcess) -> None:
    """A blocked prompt has no candidates, but a reason."""
    control(provider, statuses=[{"kind": "filtered"}])
    reply = genai.models.generate_content(model="gemini-x", contents="hi")
    assert (reply.candidates, reply.prompt_feedback.block_reason.name) == (None, "PROHIBITED_CONTENT")


# ==== mistralai, dashscope, groq ======================================================================================


@pytest.mark.parametrize("thinking", [False, True])
def test_mistral_chat(provider: ProviderProcess, thinking: bool) -> None:
    """Content as a text, or as a list of thinking and text; a stream of it; an error."""
    sdk = package("mistralai.client", "mistralai")
    control(provider, provider="mistral", reasoning=thinking)
    with sdk.Mistral(api_key=KEY, server_url=provider.url) as client:
        content = client.chat.complete(model="magistral", messages=SAID).choices[0].message.content
        assert (content[1].text if thinking else content) == answer_to("hi")
        chunks = [event.data.choices[0] for event in client.chat.stream(model="magistral", messages=SAID)]
        assert chunks[-1].finish_reason == "stop"
        texts = [chunk.delta.content for chunk in chunks if isinstance(chunk.delta.content, str)]
        assert "".join(texts) == answer_to("hi")
        assert any(isinstance(chunk.delta.content, list) for chunk in chunks) == thinking
        control(provider, statuses=[{"kind": "missing"}])
        with pytest.raises(package("mistralai.client.errors", "mistralai").SDKError) as raised:
            client.chat.complete(model="magistral", messages=SAID)
        assert raised.value.status_code == 400


@pytest.mark.parametrize("result_format", ["text", "message"])
def test_dashscope_generation(provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch, result_format: str) -> None:
    """The native API in both of its formats, and its error."""
    sdk = package("dashscope")
    monkeypatch.setattr(sdk, "base_http_api_url", f"{provider.url}/api/v1")
    asked = {"model": "qwen-plus", "api_key": KEY, "messages": SAID, "result_format": result_format}
    reply = sdk.Generation.call(**asked)
    output = reply.output
    assert (reply.status_code, reply.usage.total_tokens > 0) == (200, True)
    found = output.text if result_format == "text" else output.choices[0].message.content
    assert found == answer_to("hi")
    control(provider, statuses=[{"kind": "filtered"}])
    refused = sdk.Generation.call(**asked)
    assert (refused.status_code, refused.code, refused.output) == (400, "DataInspectionFailed", None)


def test_groq_chat(provider: ProviderProcess) -> None:
    """Groq's client: an answer with reasoning, and its two errors of capacity."""
    sdk = package("groq")
    control(provider, provider="groq", reasoning=True)
    with sdk.Groq(api_key=KEY, base_url=provider.url, max_retries=0) as client:
        reply = checked(client.chat.completions.with_raw_response.create(model="m", messages=SAID))
        assert reply.choices[0].message.reasoning
        for kind, status in (("too_large", 413), ("overloaded", 498)):
            control(provider, statuses=[{"kind": kind}])
            with pytest.raises(sdk.APIStatusError) as raised:
                client.chat.completions.create(model="m", messages=SAID)
            assert raised.value.status_code == status
