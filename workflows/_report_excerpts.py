"""Single requests as workflows.report shows them: what was asked, what came back, cut to a length that can be read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workflows._replies import as_dict, as_list, error_text, flat_text, read_answer, tokens_of

if TYPE_CHECKING:
    from workflows._results import Result

HEAD, TAIL = 1500, 500  # characters that are kept of a text
HEADLINE = 120
FACTS = ("line", "attempts", "refusals", "seconds", "estimated_tokens", "tokens")  # numbers of the details
MOST = 1e12  # larger numbers are no count and no time
MESSAGES = ("messages", "contents", "input", "prompt", "inputs")  # where a request has its text


@dataclass(frozen=True, slots=True)
class Excerpt:
    """One request to be opened and read. All texts are as foreign as they were, only shorter."""

    failed: bool
    tag: str  # kind and status of its last error
    headline: str  # the error's message, or the beginning of its answer
    facts: dict[str, Any]  # details that are known, by their names
    sections: dict[str, str]  # what was asked, what came back


def excerpt_of(result: Result) -> Excerpt:
    """Make the excerpt of a result."""
    details = as_dict(result.details)
    facts: dict[str, Any] = {name: number(details.get(name)) for name in FACTS}
    facts["started"] = shortened(details["started"], 40, 0) if isinstance(details.get("started"), str) else None
    sections = dict(request_texts(result.request))
    if result.metadata is not None:
        sections["Metadata"] = pretty(result.metadata)
    if result.succeeded:
        answer = read_answer(result.response)
        facts["tokens"] = facts["tokens"] or tokens_of(result.response)
        sections |= {"Reasoning": answer.reasoning or "", "Answer": answer.text or pretty(result.response)}
        tag, headline = "succeeded", answer.text
    else:
        errors = as_list(result.response)
        error = as_dict(errors[-1] if errors else None)
        tag = " ".join(str(error[name]) for name in ("kind", "status") if error.get(name)) or "failed"
        headline = error_text(errors).removeprefix(f"{tag}: ")
        sections["Errors"] = "\n".join(f"{i}. {one}" for i, one in enumerate(map(error_text, errors[-20:]), 1))
        if response := error.get("response"):
            sections["Last response"] = response if isinstance(response, str) else pretty(response)
    headline = " ".join(shortened(headline, HEADLINE * 2, 0).split())
    shown = {title: shortened(text) for title, text in sections.items() if text}
    known = {name: fact for name, fact in facts.items() if fact is not None}
    return Excerpt(not result.succeeded, shortened(tag, 40, 0), shortened(headline, HEADLINE, 0), known, shown)


def request_texts(request: Any) -> list[tuple[str, str]]:
    """What was asked, as a person reads it, and the parameters beside it."""
    body = as_dict(request)
    name = next((name for name in MESSAGES if body.get(name)), None)
    if name is None:
        return [("Request", request if isinstance(request, str) else pretty(request))]
    asked = body[name]
    turns = as_list(as_dict(asked).get("messages") if isinstance(asked, dict) else asked)  # DashScope nests them
    said = [
        (as_dict(turn).get("role"), flat_text(as_dict(turn).get("content") or turn.get("parts")))
        for turn in turns
        if isinstance(turn, dict)
    ]
    text = "\n\n".join(f"{role or 'user'}: {words}" for role, words in said) if any(words for _, words in said) else ""
    rest = {key: value for key, value in body.items() if key != name}
    return [
        ("Request", text or (asked if isinstance(asked, str) else pretty(asked))),
        ("Parameters", pretty(rest) if rest else ""),
    ]


def pretty(value: Any) -> str:
    """JSON that can be read."""
    return json.dumps(value, ensure_ascii=False, indent=2)


def shortened(text: str, head: int = HEAD, tail: int = TAIL) -> str:
    """A text without its middle, if it is long."""
    if len(text) <= head + tail:
        return text
    if not tail:
        return text[: head - 1] + "…"
    return f"{text[:head]}\n… {len(text) - head - tail:,} characters left out …\n{text[-tail:]}"


def number(value: Any) -> int | float | None:
    """The value if it is a number from 0 up that may be meant, else None."""
    return value if type(value) in (int, float) and 0 <= value < MOST else None
