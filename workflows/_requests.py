"""Request bodies: a conversation and parameters become what the endpoint of a URL takes."""

from __future__ import annotations

import contextlib
import re
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import quote, urlsplit

from api_request_parallel_processor import PROVIDERS, UsageError, find_provider, find_shape

Turn = tuple[str, str]  # role (user, assistant), text

# What is appended to a base URL, by its host and path; elsewhere an OpenAI-compatible chat.
ENDPOINTS = {
    "api.anthropic.com": "/v1/messages",
    "api.anthropic.com/v1": "/messages",
    "generativelanguage.googleapis.com/v1*": "/models/{model}:generateContent",
    "*aiplatform.googleapis.com/*/publishers/google": "/models/{model}:generateContent",
    "api.deepinfra.com/v1/inference": "/{model}",
    "*.aliyuncs.com/api/v1": "/services/aigc/text-generation/generation",
}
BASE_URLS = {  # of providers that have one
    "openai": "https://api.openai.com/v1",
    "moonshot": "https://api.moonshot.cn/v1",
    "ark": "https://ark.cn-beijing.volces.com/api/v3",
    "baichuan": "https://api.baichuan-ai.com/v1",
    "jiekou": "https://api.jiekou.ai/openai/v1",
    "zhipu": "https://open.bigmodel.cn/api/paas/v4",
    "deepseek": "https://api.deepseek.com",
    "dashscope": "https://dashscope.aliyuncs.com/compatible-mode/v1",
    "siliconflow": "https://api.siliconflow.cn/v1",
    "infinigence": "https://cloud.infini-ai.com/maas/v1",
    "deepinfra": "https://api.deepinfra.com/v1/openai",
    "mistral": "https://api.mistral.ai/v1",
    "gemini": "https://generativelanguage.googleapis.com/v1beta",
    "anthropic": "https://api.anthropic.com/v1",
    "openrouter": "https://openrouter.ai/api/v1",
    "together": "https://api.together.xyz/v1",
    "groq": "https://api.groq.com/openai/v1",
}
OPENAI_ALIKE = ("*/openai", "*/openai/v1", "*/endpoints/openapi")
# What parameters are called and where they stand, where that is not as in OpenAI's chat.
NAMES = {
    "responses": {"max_tokens": "max_output_tokens"},
    "deepinfra": {"max_tokens": "max_new_tokens"},
    "anthropic": {"stop": "stop_sequences"},
    "gemini": {
        "max_tokens": "maxOutputTokens",
        "top_p": "topP",
        "top_k": "topK",
        "stop": "stopSequences",
        "n": "candidateCount",
        "presence_penalty": "presencePenalty",
        "frequency_penalty": "frequencyPenalty",
        "logprobs": "responseLogprobs",
    },
}
NESTED = {"gemini": "generationConfig", "dashscope": "parameters"}
REASONING_MODELS = re.compile(r"(?:.*/)?(?:o\d|gpt-5)")  # of OpenAI; they refuse max_tokens
ANTHROPIC_MAX_TOKENS = 4096  # the field is mandatory there


def endpoint_of(base_url: str, model: str) -> str:
    """Append to a base URL the endpoint of its family; a URL that has one already stays as it is."""
    url = base_url.strip().rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"base_url {base_url!r} is no http(s) address such as https://api.openai.com/v1")
    with contextlib.suppress(UsageError):
        find_shape(parts.path, PROVIDERS["openai"])
        return url
    place = f"{parts.hostname}{parts.path}"
    alike = any(fnmatchcase(place, pattern) for pattern in OPENAI_ALIKE)
    fitting = (ending for pattern, ending in ENDPOINTS.items() if not alike and fnmatchcase(place, pattern))
    ending = next(fitting, "/chat/completions").format(model=quote(model, safe="/-._~"))
    return parts._replace(path=parts.path + ending).geturl()


def shape_for(url: str, provider: str = "auto") -> str:
    """The shape of requests that a URL takes, as the processor sees it."""
    return find_shape(urlsplit(url).path, find_provider(url, provider))


def build_body(
    shape: str, model: str, turns: list[Turn], system: str = "", parameters: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Build the body of one request.

    build_body("chat", "m", [("user", "hi")], "be brief", {"temperature": 0})
    -> {"model": "m", "messages": [{"role": "system", ...}, {"role": "user", ...}], "temperature": 0}
    Parameters have the names of OpenAI's chat; None leaves one out; unknown ones are passed on as they are.
    """
    given = {name: value for name, value in (parameters or {}).items() if value is not None}
    if shape == "chat" and REASONING_MODELS.match(model) and "max_tokens" in given:
        given["max_completion_tokens"] = given.pop("max_tokens")
    given = {NAMES.get(shape, {}).get(name, name): value for name, value in given.items()}
    body = conversation(shape, model, turns, system)
    if shape == "anthropic":
        given.setdefault("max_tokens", ANTHROPIC_MAX_TOKENS)
    if place := NESTED.get(shape):
        body[place] = {**body.get(place, {}), **given}
        return {name: value for name, value in body.items() if value != {}}
    return body | given


def conversation(shape: str, model: str, turns: list[Turn], system: str) -> dict[str, Any]:
    """Build the part of a body that says who said what."""
    messages = [{"role": role, "content": text} for role, text in turns]
    with_system = [{"role": "system", "content": system}, *messages] if system else messages
    joined = "\n\n".join(filter(None, [system, *(text for _, text in turns)]))
    if shape == "chat":
        return {"model": model, "messages": with_system}
    if shape == "anthropic":
        return {"model": model, **({"system": system} if system else {}), "messages": messages}
    if shape == "gemini":
        roles = {"assistant": "model"}
        contents = [{"role": roles.get(role, role), "parts": [{"text": text}]} for role, text in turns]
        return {**({"systemInstruction": {"parts": [{"text": system}]}} if system else {}), "contents": contents}
    if shape == "dashscope":
        return {"model": model, "input": {"messages": with_system}, "parameters": {"result_format": "message"}}
    if shape == "responses":
        body = {"model": model, "input": turns[0][1] if len(turns) == 1 else messages}
        return {**body, **({"instructions": system} if system else {})}
    if shape == "completions":
        return {"model": model, "prompt": joined}
    return {"input": joined} if shape == "deepinfra" else {"model": model, "input": joined}
