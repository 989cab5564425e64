"""Station 2, estimate: charges counted by hand, vocabularies without a network, learning from usage."""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.util
import json
import socket
import struct
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import api_request_parallel_processor as program
from api_request_parallel_processor import (
    Cost,
    Estimate,
    LearnedTokens,
    Tokenizer,
    Usage,
    UsageError,
    estimate_text,
    estimate_tokens,
    read_vocabulary,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SHAPES = "chat completions embeddings responses moderations dashscope deepinfra anthropic gemini".split()
O200K = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
O200K_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"

# The example of the OpenAI cookbook's notebook on counting tokens; OpenAI billed 124 tokens for it on gpt-4o.
JARGON = [
    (
        "system",
        "",
        "You are a helpful, pattern-following assistant that translates corporate jargon into plain English.",
    ),
    ("system", "example_user", "New synergies will help drive top-line growth."),
    ("system", "example_assistant", "Things working well together will increase revenue."),
    (
        "system",
        "example_user",
        "Let's circle back when we have more bandwidth to touch base on opportunities for increased leverage.",
    ),
    ("system", "example_assistant", "Let's talk later when we're less busy about how to do better."),
    ("user", "", "This late pivot means we don't have time to boil the ocean for the client deliverable."),
]
WEATHER_MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant that can answer to questions about the weather."},
    {"role": "user", "content": "What's the weather like in San Francisco?"},
]
WEATHER_FUNCTION = {
    "name": "get_current_weather",
    "description": "Get the current weather in a given location",
    "parameters": {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
            "unit": {
                "type": "string",
                "description": "The unit of temperature to return",
                "enum": ["celsius", "fahrenheit"],
            },
        },
        "required": ["location"],
    },
}


def words(text: str) -> int:
    """A counting function that can be checked by hand: one token per word."""
    return len(text.split())


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def prompt_of(body: Any, shape: str = "chat") -> int:
    return estimate_tokens(body, shape, words).prompt


@pytest.fixture(scope="module")
def exact() -> Tokenizer:
    """A tokenizer with the real vocabularies, which the bpe-openai package carries."""
    pytest.importorskip("tiktoken")
    if importlib.util.find_spec("bpe_openai") is None:
        pytest.skip("needs the bpe-openai package")
    return Tokenizer()


@pytest.fixture
def no_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with empty caches, without bpe-openai and without a network; gives the folder of its own cache."""
    registry = pytest.importorskip("tiktoken.registry")
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "XDG_CACHE_HOME"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(registry, "ENCODINGS", {})
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bpe_openai" else find_spec(name))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    return tmp_path / "XDG_CACHE_HOME" / "api_request_parallel_processor"


@pytest.fixture
def silent_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All https goes to a listener that accepts connections and never says a word, like a filtering middlebox."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        yield


# ------------------------------------------------------------------------------------------------------------ chats


def test_cookbook_example_counts_what_openai_billed(exact: Tokenizer) -> None:
    """The cookbook's six messages have 124 tokens on gpt-4o and 129 on gpt-4, names included."""
    messages = [{"role": r, "content": c, **({"name": n} if n else {})} for r, n, c in JARGON]
    for model, tokens in (("gpt-4o", 124), ("gpt-4", 129)):
        body = {"model": model, "messages": messages}
        assert estimate_tokens(body, "chat", exact.counter(model)).prompt == tokens


def test_cookbook_tools_example_counts_what_openai_billed(exact: Tokenizer) -> None:
    """The cookbook's weather function has 101 tokens on gpt-4o, as `tools` and as old `functions`."""
    for tools in ({"tools": [{"type": "function", "function": WEATHER_FUNCTION}]}, {"functions": [WEATHER_FUNCTION]}):
        body = {"model": "gpt-4o", "messages": WEATHER_MESSAGES, **tools}
        assert estimate_tokens(body, "chat", exact.counter("gpt-4o")).prompt == 101


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (user("two words"), 3 + 3 + 1 + 2),
        (user(None), 3 + 3 + 1),
        (user([{"type": "text", "text": "two words"}, {"type": "text", "text": "three more words"}]), 7 + 2 + 3),
        ({"messages": [{"role": "a strange role", "content": "two words", "audio": None}]}, 3 + 3 + 1 + 2),
        ({"messages": [{"role": "user", "name": "one", "content": "two words"}]}, 7 + 2 + 1 + 1),
        ({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}, 7 + 1 + 2),
        ({"messages": []}, 3),
    ],
)
def test_chat_overheads(body: Any, tokens: int) -> None:
    """3 for the reply, 3 per message, 1 for the role, 1 beside a name; texts wherever they stand."""
    assert prompt_of(body) == tokens


def test_tool_calls_are_counted_as_name_and_arguments() -> None:
    """An assistant message with content null and tool_calls costs its function's name and arguments, not the ids."""
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "two words"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    answer = {"role": "tool", "tool_call_id": "call_1", "content": "it is sunny"}
    assert prompt_of({"messages": [message, answer]}) == 3 + (3 + 1 + 1 + 1 + 2) + (3 + 1 + 3)


def test_tool_that_is_no_function_costs_something() -> None:
    """Built-in tools and functions of a wrong type are no reason to crash."""
    assert (
        prompt_of(user("x") | {"tools": [{"type": "web_search"}, 7, {"function": {"name": 5, "parameters": 6}}]})
        >= 8 + 12 + 3
    )


@pytest.mark.parametrize("name", ["functionDeclarations", "function_declarations"])
def test_tools_of_gemini_are_counted_one_by_one(name: str) -> None:
    """Google puts all functions into one tool; they cost what they cost elsewhere."""
    one = {"name": "f", "description": "two words", "parameters": {"properties": {"a": {"type": "STRING"}}}}
    elsewhere = prompt_of({"tools": [{"type": "function", "function": one}] * 2}, "chat")
    assert prompt_of({"tools": [{name: [one, one]}]}, "gemini") == elsewhere


def test_nested_schema_counts_as_json_besides_its_property() -> None:
    """A property with items costs `key:type:description` and the JSON text of the rest."""
    properties = {"names": {"type": "array", "description": "all names.", "items": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}
    assert prompt_of(user("x") | {"tools": [tool]}) == 8 + 12 + (7 + 1) + 3 + (3 + 2 + 3)


@pytest.mark.parametrize(
    ("shape", "body", "tokens"),
    [
        (
            "anthropic",
            {"system": "be kind", "max_tokens": 9, **user([{"type": "text", "text": "two words"}])},
            3 + 4 + 2 + 4 + 2,
        ),
        ("gemini", {"contents": [{"role": "user", "parts": [{"text": "two words"}]}]}, 3 + 4 + 2),
        ("dashscope", {"model": "qwen-turbo", "input": user("two words"), "parameters": {}}, 3 + 4 + 2),
        ("dashscope", {"input": {"prompt": "two words"}}, 3 + 4 + 2),
        ("responses", {"instructions": "be kind", "input": "two words"}, 3 + 4 + 2 + 4 + 2),
        (
            "responses",
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "two words"}]}]},
            3 + 4 + 2,
        ),
        ("deepinfra", {"input": "[INST] two words [/INST]"}, 4),
        ("moderations", {"input": ["two words", "three more words"]}, 5),
        ("gemini", {"system_instruction": {"parts": [{"text": "be kind"}]}, "contents": []}, 3 + 2),
        ("gemini", {"contents": [], "generationConfig": {"responseSchema": "two words"}}, 3 + 4 + 2),
        ("completions", {"prompt": "two words", "suffix": "one"}, 3),
    ],
)
def test_other_families(shape: str, body: Any, tokens: int) -> None:
    """Every family's texts are found; a chat family's bare text costs what a message of it would."""
    assert prompt_of(body, shape) == tokens


@pytest.mark.parametrize("shape", ["embeddings", "completions"])
@pytest.mark.parametrize(
    ("texts", "tokens"),
    [("two words", 2), (["two words", "one"], 3), ([15339, 1917, 0], 3), ([[15339, 1917], [0]], 3), ([], 0), ("", 0)],
)
def test_strings_and_token_ids(shape: str, texts: Any, tokens: int) -> None:
    """Embeddings and completions take a text, texts, token ids, or lists of token ids, without any overhead."""
    assert prompt_of({"input" if shape == "embeddings" else "prompt": texts}, shape) == tokens


# ------------------------------------------------------------------------------------------------- caps and answers


@pytest.mark.parametrize(
    ("shape", "body", "cap", "answers"),
    [
        ("chat", {"max_tokens": 10, "n": 3}, 30, 3),
        ("chat", {"max_tokens": 10, "max_completion_tokens": 20}, 20, 1),
        ("chat", {}, None, 1),
        ("chat", {"max_tokens": None}, None, 1),
        ("chat", {"max_tokens": "many", "n": "two"}, None, 1),
        ("chat", {"max_tokens": True}, None, 1),
        ("chat", {"max_tokens": -1}, None, 1),
        ("chat", {"max_tokens": 1e2}, 100, 1),
        ("chat", {"max_tokens": 10**400, "n": 10**400}, None, 1),
        ("completions", {"prompt": "x"}, 16, 1),
        ("completions", {"prompt": ["x", "y"], "n": 2, "best_of": 3}, 96, 6),
        ("completions", {"prompt": [1, 2, 3]}, 16, 1),
        ("completions", {"prompt": [[1, 2], [3]], "max_tokens": 5}, 10, 2),
        ("embeddings", {"input": "x", "max_tokens": 5}, 0, 1),
        ("moderations", {"input": "x"}, 0, 1),
        ("responses", {"max_output_tokens": 7}, 7, 1),
        ("anthropic", {"max_tokens": 7}, 7, 1),
        ("dashscope", {"parameters": {"max_tokens": 10, "n": 2}}, 20, 2),
        ("dashscope", {"parameters": "none"}, None, 1),
        ("deepinfra", {"input": "x", "max_new_tokens": 64}, 64, 1),
        ("deepinfra", {"input": "x", "max_new_tokens": 64, "num_responses": 2}, 128, 2),
        ("gemini", {"generationConfig": {"maxOutputTokens": 8, "candidateCount": 2}}, 16, 2),
        ("gemini", {"generation_config": {"max_output_tokens": 8, "candidate_count": 2}}, 16, 2),
    ],
)
def test_output_cap(shape: str, body: Any, cap: int | None, answers: int) -> None:
    """The cap is read where each family has it, times the answers; a cap of a wrong type is none."""
    found = estimate_tokens(body, shape, words)
    assert (found.output_cap, found.answers) == (cap, answers)


# ------------------------------------------------------------------------------------------------------------ media


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height) + bytes(5000)


def jpeg(width: int, height: int) -> bytes:
    """A JPEG with the notes of a camera, 30 kB that hold a thumbnail with its own header, before the frame header."""
    thumbnail = b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, 120, 160, 3) + bytes(9)
    notes = b"\xff\xe1" + struct.pack(">H", 30_002) + thumbnail.ljust(30_000, b"\1")
    return b"\xff\xd8" + notes + b"\xff\xc2" + struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes(5000)


def image(data: bytes, **more: Any) -> dict[str, Any]:
    url = "data:image/any;base64," + base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": url, **more}}


def image_price(model: str, part: Any) -> int:
    return prompt_of({"model": model, **user([part])}) - 7


IMAGES = {
    "png": png(2048, 4096),
    "jpeg": jpeg(2048, 4096),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_image_size_is_read_from_the_first_bytes(kind: str) -> None:
    """A 2048 x 4096 image costs 1105 tokens on gpt-4o, whatever its format; low detail 85."""
    assert image_price("gpt-4o", image(IMAGES[kind])) == 1105
    assert image_price("gpt-4o", image(IMAGES[kind], detail="low")) == 85


@pytest.mark.parametrize(
    ("model", "size", "tokens"),
    [
        ("gpt-4o", (1024, 1024), 765),
        ("openai/gpt-4o", (512, 512), 85 + 170),
        ("gpt-4o-mini", (1024, 1024), 2833 + 4 * 5667),
        ("gpt-5", (1024, 1024), 70 + 4 * 140),
        ("o1", (1024, 1024), 75 + 4 * 150),
        ("claude-sonnet", (750, 100), 112),
        ("gemini-pro", (384, 384), 258),
        ("unheard-of", (1024, 1024), 765),
    ],
)
def test_image_prices(model: str, size: tuple[int, int], tokens: int) -> None:
    """Tiles and areas by the model's own rule; unknown models as gpt-4o."""
    assert image_price(model, image(png(*size))) == pytest.approx(tokens, rel=0.02)


def test_image_of_unknown_size_is_taken_as_1024_square() -> None:
    """A URL, broken base64 or an unknown format cost what 1024 x 1024 costs, in every family's spelling."""
    link = "https://example.com/cat"
    assert image_price("gpt-4o", {"type": "image_url", "image_url": {"url": link}}) == 765
    assert image_price("gpt-4o", {"type": "input_image", "image_url": link}) == 765
    assert image_price("gpt-4o", {"type": "image", "source": {"type": "url", "url": link}}) == 765
    assert image_price("gpt-4o", {"image": link}) == 765
    assert image_price("gpt-4o", image(b"")) == 765
    assert image_price("gpt-4o", {"type": "image_url", "image_url": {"url": "data:image/png;base64,\xe9!"}}) == 765


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "PNG"}},
        {"inlineData": {"mimeType": "image/png", "data": "PNG"}},
        {"inline_data": {"mime_type": "image/png", "data": "PNG"}},
        {"image": "data:image/png;base64,PNG"},
        {"type": "input_image", "image_url": "data:image/png;base64,PNG"},
    ],
)
def test_image_in_every_spelling(part: Any) -> None:
    """Anthropic, Gemini, DashScope and Responses images are found and sized too."""
    part = json.loads(json.dumps(part).replace("PNG", base64.b64encode(png(2048, 4096)).decode()))
    assert image_price("gpt-4o", part) == 1105


def test_base64_is_never_counted_as_text() -> None:
    """Sound, files and unknown objects with base64 in them cost by rule, and count never sees the data."""
    data, seen = base64.b64encode(bytes(range(256)) * 400).decode(), []
    parts = [
        {"type": "input_audio", "input_audio": {"data": data, "format": "mp3"}},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64," + data}},
        {"type": "odd", "blob": {"b64": data}},
    ]
    found = estimate_tokens(user(parts), "chat", lambda text: seen.append(text) or 0)  # type: ignore[func-returns-value]
    assert max(map(len, seen), default=0) < 100
    assert found.prompt == 3 + 4 + len(data) // 2000 + (len(data) + 28) // 50


# ---------------------------------------------------------------------------------------------------- never raises

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["\ud800", "user"])
    | st.just(5000).map(lambda digits: 10**digits),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*sorted(program.PART_KEYS), "type"]) | st.text(), inner, max_size=4)
    ),
    max_leaves=12,
)
BODY_KEYS = sorted({*program.KEY_KINDS, "model"})


@settings(max_examples=200, deadline=None)
@given(body=JSON | st.dictionaries(st.sampled_from(BODY_KEYS), JSON, max_size=5))
def test_estimate_takes_any_json(body: Any) -> None:
    """No JSON value makes the estimate raise, in any shape, and it is never negative."""
    for shape in SHAPES:
        found = estimate_tokens(body, shape, words)
        assert found.prompt >= 0
        assert found.answers >= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_deep_nesting_is_estimated(shape: str) -> None:
    """Objects and lists 900 levels deep are estimated wherever they stand, also from deep in a call stack."""
    for outer, inner in (("[", "]"), ('{"content":', "}"), ('{"properties":', "}"), ('{"image":[', "]}")):
        deep = json.loads(outer * 450 + "1" + inner * 450)
        for _ in range(450):
            deep = [deep]
        for body in (
            deep,
            user(deep),
            {"input": deep},
            {"contents": deep},
            user("x") | {"tools": [{"function": deep}]},
        ):
            assert estimate_tokens(body, shape, words).prompt >= 0


# ------------------------------------------------------------------------------------------------------- tokenizer


def test_special_tokens_and_lone_surrogates_are_ordinary_text(exact: Tokenizer) -> None:
    """`<|endoftext|>` counts as seven tokens of text, a lone surrogate as some, an empty text as none."""
    assert exact.counter("")("<|endoftext|>") == 7
    assert exact.counter("")("\ud800") >= 1
    assert exact.counter("")("") == 0


def test_a_million_spaces_do_not_panic(exact: Tokenizer) -> None:
    """Texts that tiktoken cannot take in one piece are counted in several."""
    assert 1000 < exact.counter("")(" " * 1_000_000) < 100_000


def test_encoding_is_chosen_by_model(exact: Tokenizer) -> None:
    """gpt-4 counts in cl100k_base, gpt-4o and unknown models in o200k_base; a fixed encoding ignores the model."""
    text = "你好世界，今天天气很好"
    old, new = exact.counter("gpt-4")(text), exact.counter("gpt-4o")(text)
    assert old > new == exact.counter("qwen-turbo")(text) == exact.counter("")(text) == exact.counter("gpt-4.1")(text)
    assert exact.counter("openai/gpt-4")(text) == exact.counter("text-embedding-3-small")(text) == old
    assert Tokenizer("cl100k_base").counter("gpt-4o")(text) == old
    assert exact.exact


def test_unknown_encoding_is_a_usage_error_that_lists_what_exists() -> None:
    """A misspelt encoding is refused at once, before any vocabulary is loaded."""
    pytest.importorskip("tiktoken")
    with pytest.raises(UsageError, match=r"o200_base.*auto.*cl100k_base.*o200k_base"):
        Tokenizer("o200_base")


def test_counting_in_threads(exact: Tokenizer) -> None:
    """Threads that count with a fresh tokenizer all get the same numbers."""
    fresh, found = Tokenizer(), []
    threads = [threading.Thread(target=lambda: found.append(fresh.counter("gpt-4")("two words"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [exact.counter("gpt-4")("two words")] * 8


# ------------------------------------------------------------------------------------- vocabularies without a network


def put(folder: Path, url: str, data: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("folder", ["TIKTOKEN_CACHE_DIR", "data-gym-cache", "own"])
def test_valid_cached_file_is_used(
    folder: str, no_vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with the right content is found in each of the caches, under the name that tiktoken gives it."""
    if folder == "TIKTOKEN_CACHE_DIR":
        monkeypatch.setenv(folder, str(tmp_path / folder))
    put(no_vocabulary if folder == "own" else tmp_path / folder, "https://host/x.tiktoken", b"content")
    assert read_vocabulary("https://host/x.tiktoken", hashlib.sha256(b"content").hexdigest()) == b"content"


def test_damaged_files_are_ignored(no_vocabulary: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Cached files of a wrong sha256 are not used; the estimator counts all that follows, and says so once."""
    files = [put(folder, O200K, b"damaged\r\n") for folder in (no_vocabulary, tmp_path / "data-gym-cache")]
    tokenizer = Tokenizer()
    for model in ("gpt-4o", "gpt-4", "gpt-4o"):
        assert tokenizer.counter(model)("Hello, world") == estimate_text("Hello, world")
    assert not tokenizer.exact
    assert caplog.text.count("pip install tiktoken bpe-openai") == 1
    assert [file.read_bytes() for file in files] == [b"damaged\r\n"] * 2


def test_package_is_read_as_data(no_vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compressed copy inside bpe-openai is used if its content is right, and the package is never imported."""
    (tmp_path / "bpe_openai" / "data").mkdir(parents=True)
    (tmp_path / "bpe_openai" / "__init__.py").write_text("raise RuntimeError('imported')")
    packed = tmp_path / "bpe_openai" / "data" / "x.tiktoken.gz"
    packed.write_bytes(gzip.compress(b"content"))
    spec = importlib.util.spec_from_file_location("bpe_openai", tmp_path / "bpe_openai" / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    assert read_vocabulary("https://host/x.tiktoken", hashlib.sha256(b"content").hexdigest()) == b"content"
    packed.write_bytes(gzip.compress(b"content")[:-9])
    with pytest.raises(FileNotFoundError):
        read_vocabulary("https://host/x.tiktoken", hashlib.sha256(b"content").hexdigest())
    assert not no_vocabulary.exists()


def test_download_is_checked_and_kept(no_vocabulary: Path, tmp_path: Path) -> None:
    """A download of the right content lands in our own cache; a wrong one is never used."""
    (tmp_path / "served").write_bytes(b"content")
    url = (tmp_path / "served").as_uri()
    with pytest.raises(FileNotFoundError):
        read_vocabulary(url, hashlib.sha256(b"other").hexdigest())
    assert read_vocabulary(url, hashlib.sha256(b"content").hexdigest()) == b"content"
    assert [file.read_bytes() for file in no_vocabulary.iterdir()] == [b"content"]
    (tmp_path / "served").unlink()
    assert read_vocabulary(url, hashlib.sha256(b"content").hexdigest()) == b"content"


@pytest.mark.usefixtures("no_vocabulary", "silent_host")
def test_silent_host_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that accepts and stays silent costs one deadline of seconds; later models do not wait."""
    waits: list[float] = []
    join = threading.Thread.join
    monkeypatch.setattr(threading.Thread, "join", lambda self, s=None: (waits.append(s or 0), join(self, 0.1))[1])  # type: ignore[func-returns-value]
    tokenizer = Tokenizer()
    assert [tokenizer.counter(model)("Hello") for model in ("gpt-4o", "gpt-4", "gpt-4o")] == [1, 1, 1]
    assert waits == [5]


def test_missing_tiktoken_means_estimates(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without tiktoken the program still counts, and says what to install."""
    monkeypatch.setattr(program, "tiktoken", None)
    tokenizer = Tokenizer("anything")
    assert tokenizer.counter("gpt-4o")("Hello, world") == 3
    assert not tokenizer.exact
    assert "pip install tiktoken" in caplog.text


def test_tiktoken_keeps_its_own_reader(exact: Tokenizer) -> None:
    """Loading leaves tiktoken as it was, for other code in this process."""
    load = pytest.importorskip("tiktoken.load")
    exact.counter("gpt-4")("x")
    assert load.read_file_cached.__module__ == "tiktoken.load"


TEXTS = {
    "english": " ".join(text for _, _, text in JARGON),
    "chinese": "请把下面的句子翻译成英文，并说明其中的语法要点。今天天气很好，我们打算去公园散步，然后一起吃晚饭。",
    "code": Path(__file__).read_text(encoding="utf-8")[2000:6000],
    "json": json.dumps(WEATHER_FUNCTION, indent=2),
    "base64": base64.b64encode(hashlib.sha512(b"x").digest() * 3).decode(),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_estimator_is_near_the_tokenizer(kind: str, exact: Tokenizer) -> None:
    """Without a vocabulary, counts of usual texts are within a quarter of the exact ones."""
    assert estimate_text(TEXTS[kind]) == pytest.approx(exact.counter("")(TEXTS[kind]), rel=0.25)


TRAPS = {
    "spaces": " " * 10**6,
    "letters": "a" * 10**6,
    "paths": "a/" * 10**5,
    "lines": "\n " * 10**5,
    "punctuation": "=" * 10**6,
    "mixed": "a1" * 10**5,
    "long words": ("a" * 998 + " ") * 1000,
}


@pytest.mark.parametrize("kind", TRAPS)
def test_long_runs_take_time_in_proportion(kind: str) -> None:
    """A million characters of one kind are no trap for the estimator, nor inside an unknown object."""
    assert estimate_text(TRAPS[kind]) >= 0
    assert prompt_of(user({"unknown": TRAPS[kind]})) >= 7


# --------------------------------------------------------------------------------------------------------- learning


def test_first_cost_is_the_estimate_and_a_guess_of_the_answer() -> None:
    """Before any reply the input counts as estimated, an answer as 256 tokens, within the cap."""
    learned = LearnedTokens()
    assert learned.cost("m", Estimate(100, None)) == Cost(expected=356, worst=356, prompt=100)
    assert learned.cost("m", Estimate(100, 10_000)) == Cost(expected=356, worst=10_100, prompt=100)
    assert learned.cost("m", Estimate(100, 20)) == Cost(expected=120, worst=120, prompt=100)
    assert learned.cost("m", Estimate(100, None, answers=2)).expected == 612
    assert learned.cost("m", Estimate(100, 0)) == Cost(expected=100, worst=100, prompt=100)


def test_ratio_and_output_are_learned_per_model() -> None:
    """After one reply that used half the input and 10 tokens per answer, the next request of that model costs so."""
    learned = LearnedTokens()
    learned.learn("m", Estimate(100, None, answers=2), Usage(50, 20))
    assert learned.cost("m", Estimate(1000, 5000)) == Cost(expected=510, worst=5500, prompt=500)
    assert learned.cost("other", Estimate(1000, None)).prompt == 1000


def test_ratio_is_weighted_by_tokens() -> None:
    """Ten tokens of template on each request do not inflate the estimates of large requests."""
    learned = LearnedTokens()
    for _ in range(200):
        learned.learn("m", Estimate(10, None), Usage(20, 5))
        learned.learn("m", Estimate(10_000, None), Usage(10_010, 5))
    assert learned.cost("m", Estimate(10_000, 0)).prompt == pytest.approx(10_020, rel=0.01)


def test_learning_follows_a_change() -> None:
    """After a hundred replies of a new kind, the old kind is forgotten."""
    learned = LearnedTokens()
    for used in (100, 200):
        for _ in range(100):
            learned.learn("m", Estimate(100, None), Usage(used, used))
    assert learned.cost("m", Estimate(100, None)).expected == pytest.approx(400, rel=0.02)


@pytest.mark.parametrize("usage", [Usage(0, 0), Usage(-5, -5)])
def test_absurd_usage_is_ignored(usage: Usage) -> None:
    """Usage of zero or below teaches nothing; an input of zero is what a cache hit may report."""
    learned = LearnedTokens()
    learned.learn("m", Estimate(100, None), usage)
    assert learned.cost("m", Estimate(100, None)) == Cost(356, 356, 100)


def test_ratio_is_clamped() -> None:
    """Whatever usage says, the ratio stays between a quarter and four."""
    for used, prompt in ((10**18, 400), (1, 25)):
        learned = LearnedTokens()
        learned.learn("m", Estimate(100, 5), Usage(used, 10**18))
        assert learned.cost("m", Estimate(100, 5)) == Cost(prompt + 5, prompt + 5, prompt)


def test_embeddings_teach_no_output() -> None:
    """A request that generates nothing leaves the expected answer alone."""
    learned = LearnedTokens()
    learned.learn("m", Estimate(100, 0), Usage(100, 50))
    assert learned.cost("m", Estimate(100, None)).expected == 356
