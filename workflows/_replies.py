"""What a reply says, whatever family of APIs it comes from: answer, reasoning, finish reason, refusal, tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from api_request_parallel_processor import dumps, read_usage

# Ends of an answer that is not whole, or not the model's own free words.
TRUNCATED = {"length", "max_tokens", "max_output_tokens", "model_context_window_exceeded", "incomplete"}
FILTERED = set("content_filter sensitive refusal safety recitation blocklist prohibited_content spii".split())
THINK, END_THINK = "<think>", "</think>"
MEDIA = {"audio_tokens": "audio", "image_tokens": "image", "video_tokens": "video"}  # what tokens are if not of text
MAX_TOKENS = 10**12  # more is no count


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; `raw` is its text before thinking was taken out, which is what log-probabilities count by."""

    text: str = ""
    reasoning: str | None = None
    finish: str = ""
    refusal: str | None = None
    raw: str = ""
    logprobs: tuple[tuple[bytes, float], ...] = ()  # token, natural logarithm of its probability

    @property
    def whole(self) -> bool:
        """Neither cut off, nor filtered, nor refused."""
        return self.finish.lower() not in TRUNCATED | FILTERED and not self.refusal


class Tokens(NamedTuple):
    """Tokens that a reply was charged.

    `special` are those among them with a name of their own, and often a price of their own: cache_read and cache_write
    (cache_write_1h of these) are of the prompt, output_reasoning is of the output, and input_audio, output_image and
    the like are what they are called. Zeros are left out.
    """

    prompt: int
    output: int
    special: dict[str, int]


def read_answers(response: Any) -> list[Answer]:
    """Read all answers of a reply (n, best_of and candidateCount make several); [] if it has none."""
    reply = as_dict(response)
    output = reply.get("output")
    choices = reply.get("choices") or as_dict(output).get("choices")  # OpenAI; DashScope
    if choices:
        return [read_choice(as_dict(choice)) for choice in as_list(choices)]
    if isinstance(output, dict):  # DashScope with result_format "text"
        return [
            Answer(*split_thinking(text := str(output.get("text") or "")), str(output.get("finish_reason")), None, text)
        ]
    if isinstance(output, list):
        return [read_response(reply, output)]
    if candidates := as_list(reply.get("candidates")):
        return [read_candidate(as_dict(candidate)) for candidate in candidates]
    if isinstance(reply.get("content"), list):  # Anthropic
        return [read_message(reply["content"], {}, str(reply.get("stop_reason") or ""))]
    results = [as_dict(result) for result in as_list(reply.get("results"))]
    if results and "generated_text" in results[0]:  # DeepInfra
        texts = [str(result["generated_text"]) for result in results]
        return [Answer(*split_thinking(text), raw=text) for text in texts]
    if results:  # moderations
        return [Answer(json_text(results))]
    return [Answer(json_text(as_dict(item).get("embedding", item))) for item in as_list(reply.get("data"))]


def read_answer(response: Any) -> Answer:
    """Read a reply as one answer: several are joined by blank lines, finish reason and the rest are the first's."""
    answers = read_answers(response) or [Answer()]
    if len(answers) == 1:
        return answers[0]
    first, text = answers[0], "\n\n".join(answer.text for answer in answers)
    ends = [answer.finish for answer in answers if not answer.whole]
    return Answer(text, first.reasoning, ends[0] if ends else first.finish, first.refusal, first.raw, first.logprobs)


def read_choice(choice: dict[str, Any]) -> Answer:
    """Read one choice of a chat or of a completion."""
    finish = str(choice.get("finish_reason") or "")
    logprobs = read_logprobs(choice.get("logprobs"))
    if "message" not in choice:
        text = str(choice.get("text") or "")
        return Answer(*split_thinking(text), finish, None, text, logprobs)
    return read_message(as_dict(choice["message"]).get("content"), as_dict(choice["message"]), finish, logprobs)


def read_message(
    content: Any, message: dict[str, Any], finish: str, logprobs: tuple[tuple[bytes, float], ...] = ()
) -> Answer:
    """Read text, parts (Mistral, Anthropic, DashScope) and the vendors' fields for reasoning of one message."""
    parts = [as_dict(part) for part in as_list(content)]
    text = content if isinstance(content, str) else "".join(str(part["text"]) for part in parts if "text" in part)
    own = message.get("reasoning_content") or message.get("reasoning")
    own = own if isinstance(own, str) else "".join(flat_text(part["thinking"]) for part in parts if "thinking" in part)
    answer, reasoning = (text, own) if own else split_thinking(text)
    calls = message.get("tool_calls") or [part for part in parts if part.get("type") == "tool_use"]
    refusal = message.get("refusal")
    return Answer(
        answer or (json_text(calls) if calls else ""),
        reasoning,
        finish,
        refusal if isinstance(refusal, str) and refusal else None,
        text,
        logprobs,
    )


def read_response(reply: dict[str, Any], output: list[Any]) -> Answer:
    """Read the output items of OpenAI's responses."""
    items = [as_dict(item) for item in output]
    parts = [as_dict(part) for item in items if item.get("type") == "message" for part in as_list(item.get("content"))]
    text = "".join(str(part.get("text") or "") for part in parts)
    thoughts = "\n".join(flat_text(item.get("summary")) for item in items if item.get("type") == "reasoning")
    calls = [item for item in items if str(item.get("type")).endswith("_call")]
    finish = as_dict(reply.get("incomplete_details")).get("reason") or reply.get("status") or ""
    refusal = "".join(str(part["refusal"]) for part in parts if part.get("refusal"))
    logprobs = tuple(pair for part in parts for pair in read_logprobs({"content": part.get("logprobs")}))
    answer = text or (json_text(calls) if calls else "")
    return Answer(answer, thoughts or None, str(finish), refusal or None, text, logprobs)


def read_candidate(candidate: dict[str, Any]) -> Answer:
    """Read one candidate of Gemini."""
    parts = [as_dict(part) for part in as_list(as_dict(candidate.get("content")).get("parts"))]
    text = "".join(str(part["text"]) for part in parts if "text" in part and not part.get("thought"))
    thoughts = "".join(str(part["text"]) for part in parts if "text" in part and part.get("thought"))
    calls = [part["functionCall"] for part in parts if "functionCall" in part]
    chosen = as_list(as_dict(candidate.get("logprobsResult")).get("chosenCandidates"))
    logprobs = read_logprobs({"content": [{**as_dict(c), "logprob": as_dict(c).get("logProbability")} for c in chosen]})
    answer = text or (json_text(calls) if calls else "")
    return Answer(answer, thoughts or None, str(candidate.get("finishReason") or ""), None, text, logprobs)


def split_thinking(text: str) -> tuple[str, str | None]:
    """Take thinking out of a text: (answer, reasoning).

    <think>a</think>b -> (b, a);  <think>a -> ("", a);  b -> (b, None). A template of the server may have swallowed the
    opening tag: a</think>b -> (b, a).
    """
    before, end, after = text.partition(END_THINK)
    _, start, inside = before.partition(THINK)
    if end:
        return after.strip(), (inside if start else before).strip()
    return ("", inside.strip()) if start else (text, None)


def read_logprobs(found: Any) -> tuple[tuple[bytes, float], ...]:
    """Read the tokens and their log-probabilities, in the shape of chats or of completions; () if there are none."""
    table = as_dict(found)
    tokens = as_list(table.get("tokens"))
    items = [{"token": t, "logprob": p} for t, p in zip(tokens, as_list(table.get("token_logprobs")), strict=False)]
    pairs = []
    for item in map(as_dict, items or as_list(table.get("content"))):
        if not isinstance(item.get("logprob"), int | float):
            return ()
        # subtle: a token may be a part of a character, which only its bytes tell
        raw = item.get("bytes")
        if isinstance(raw, list) and all(type(byte) is int and 0 <= byte < 256 for byte in raw):
            token = bytes(raw)
        else:
            token = str(item.get("token", "")).encode(errors="surrogatepass")
        pairs.append((token, float(item["logprob"])))
    return tuple(pairs)


def tokens_of(response: Any) -> int | None:
    """Tokens that a reply was charged, prompt and output; None if it does not say."""
    tokens = read_tokens(response)
    return tokens.prompt + tokens.output if tokens else None


def read_tokens(response: Any) -> Tokens | None:
    """All that a reply says about the tokens it was charged; None if it does not say."""
    reply = as_dict(response)
    native = "gemini" if "usageMetadata" in reply else "deepinfra" if "inference_status" in reply else ""
    usage = as_dict(reply.get("usageMetadata") or reply.get("usage"))
    known = read_usage(reply, native or ("responses" if "input_tokens" in usage else "chat"))
    if known is None:
        return None
    inputs = as_dict(usage.get("prompt_tokens_details") or usage.get("input_tokens_details"))
    outputs = as_dict(usage.get("completion_tokens_details") or usage.get("output_tokens_details"))
    special = {
        "cache_read": known.cached,
        "cache_write": usage.get("cache_creation_input_tokens") or inputs.get("cache_write_tokens"),
        "cache_write_1h": as_dict(usage.get("cache_creation")).get("ephemeral_1h_input_tokens"),
        "output_reasoning": outputs.get("reasoning_tokens") or usage.get("thoughtsTokenCount"),
    }
    for side, details in (("input", inputs), ("output", outputs)):
        special |= {f"{side}_{medium}": details[name] for name, medium in MEDIA.items() if name in details}
    if native == "gemini":
        for side, name in (("input", "promptTokensDetails"), ("output", "candidatesTokensDetails")):
            for part in map(as_dict, as_list(usage.get(name))):
                if (medium := str(part.get("modality")).lower()) in MEDIA.values():
                    special[f"{side}_{medium}"] = part.get("tokenCount")
    counts = {name: count for name, count in special.items() if type(count) is int and 0 < count < MAX_TOKENS}
    return Tokens(known.prompt, known.output, counts)


def error_text(errors: Any) -> str:
    """The last of a failed result's errors in one line: "rate_limit 429: slow down"; old scripts left plain texts."""
    error = errors[-1] if isinstance(errors, list) and errors else errors
    if not isinstance(error, dict):
        return str(error)
    message = error.get("message") or as_dict(error.get("error")).get("message") or json_text(error)
    kind = " ".join(str(error[name]) for name in ("kind", "status") if error.get(name))
    return f"{kind}: {message}" if kind else str(message)


def flat_text(value: Any) -> str:
    """The text of a string or of text parts."""
    return value if isinstance(value, str) else "".join(str(as_dict(part).get("text") or "") for part in as_list(value))


def json_text(value: Any) -> str:
    """A value as JSON."""
    return dumps(value).decode()


def as_dict(value: Any) -> dict[str, Any]:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """The value if it is an array, else an empty one."""
    return value if isinstance(value, list) else []
