"""What requests cost live and as a batch: tokens counted of some of them, list prices of genai-prices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workflows._prices import BATCH, Bill, find_tariffs
from workflows._replies import Tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workflows._batch_providers import Target

COUNTED_FIRST, COUNTED_EVERY = 20, 2000  # requests of a model whose tokens are counted: a guess of the rest suffices


@dataclass
class Sample:
    """The requests of one model, and the tokens of those that were counted."""

    requests: int = 0
    counted: int = 0
    prompt: int = 0
    output: int = 0  # at most
    capped: bool = True  # whether all of them say how long the answer may be

    def next(self) -> bool:
        """Take one more request; tells whether its tokens are to be counted."""
        self.requests += 1
        return self.requests <= COUNTED_FIRST or self.requests % COUNTED_EVERY == 0

    def count(self, prompt: int, output_cap: int | None) -> None:
        """Add the tokens of a request; None: it does not say how long the answer may be."""
        self.counted += 1
        self.prompt += prompt
        self.output += output_cap or 0
        self.capped = self.capped and output_cap is not None

    @property
    def tokens(self) -> int:
        """Input tokens of all requests, about."""
        return self.prompt * self.requests // max(1, self.counted)


def cost_words(samples: Mapping[str, Sample], target: Target, url: str, provider: str) -> str:
    """Say what requests cost live and as a batch; "" if the price of a model is not known, and for less than a cent."""
    if not Bill().available:
        return ""
    costs = [[0.0, 0.0], [0.0, 0.0]]  # of input and output; each live and as a batch
    for model, sample in samples.items():
        live, batch = (find_tariffs(model, url, provider, context=context) for context in ((), (BATCH,)))
        if live is None:
            return ""
        prompt, output = sample.prompt // sample.counted, sample.output // sample.counted
        share = 1.0 if batch else 1 - target.transport.saving / 100
        for cost, tokens in zip(costs, (Tokens(prompt, 0, {}), Tokens(0, output, {})), strict=True):
            cost[0] += sample.requests * live.for_prompt(prompt).cost(tokens, requests=0)
            cost[1] += sample.requests * (batch or live).for_prompt(prompt).cost(tokens, requests=0) * share
    if sum(map(sum, costs)) < 0.01:
        return ""
    words = "By list prices the input costs about ${:,.2f} live, ${:,.2f} as a batch".format(*costs[0])
    if all(sample.capped for sample in samples.values()):
        words += "; the output at most ${:,.2f}, or ${:,.2f}".format(*costs[1])
    return f"{words}."
