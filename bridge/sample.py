"""A sample in the making: a prompt, and then turn by turn what the policy writes and what is put
between.

Token in, token out. Ids are appended and never encoded again, so what the trainer sees is what the
policy saw. Every token has its log-prob and the version that sampled it, or NOT_SAMPLED.
"""

import base64
import io
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import numpy as np

from bridge.groups import NOT_SAMPLED, damage

THINK_END = "</think>"  # Qwen3's


class Damaged(Exception):
    """What vLLM sent is no sample that can be trained on."""


class Turn(NamedTuple):
    """What came of one turn."""

    token_ids: list[int]  # that are new, those that an interruption has put in among them
    finish: str  # "stop": it ended by itself; "length": no token is left, or max_tokens are reached


# (insert, max_tokens, stop) -> Turn; as Sample.__call__
Ask = Callable[[Sequence[int], int | None, Sequence[str]], Awaitable[Turn]]


class Sample:
    """One sample. `request(context, sampling)` is a request to vLLM and gives its one choice;
    `most` bounds the response's tokens, those put in included. experts: for router replay."""

    def __init__(
        self, prompt_ids: list[int], sampling: dict, most: int, request, experts: bool = False
    ):
        self.prompt_ids, self.sampling, self.most = prompt_ids, sampling, most
        self.request, self.wants_experts = request, experts
        self.begin()

    def begin(self) -> None:
        """Nothing but the prompt: an episode is played again from here."""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []  # in nats; 0 of a token that was put in
        self.versions: list[int] = []
        self.experts: list[np.ndarray] = []  # (n, L, K): of the token before each
        self.truncated = False  # no token was left
        self.turns = 0  # that the policy was asked for
        self.generate_s = 0.0  # how long it has waited for vLLM,
        self.environment_s = 0.0  # and for its environment

    @property
    def left(self) -> int:
        return self.most - len(self.token_ids)

    async def __call__(
        self, insert: Sequence[int] = (), max_tokens: int | None = None, stop: Sequence[str] = ()
    ) -> Turn:
        """Put tokens into the context and let the policy go on. Where none is left for the policy
        nothing is put in either. Raises: Damaged, and what `request` raises."""
        room = self.left - len(insert)
        if room < 1 and not self.token_ids:
            raise Damaged("no tokens: the prompt, or what was put in, leaves no room")
        if room < 1:
            self.truncated = True
            return Turn([], "length")
        limit = min(room, max_tokens or room)
        sampling = {**self.sampling, "n": 1, "max_tokens": limit}
        if stop:  # vLLM looks for them in the text
            sampling |= {"stop": list(stop), "detokenize": True}
        # vLLM has chosen experts for every token but the last, which nobody has read yet
        first = len(self.prompt_ids) + len(self.token_ids) - 1
        if self.wants_experts:
            sampling["routed_experts_prompt_start"] = first
        start = time.perf_counter()
        choice = await self.request([*self.prompt_ids, *self.token_ids, *insert], sampling)
        self.generate_s += time.perf_counter() - start
        if why := damage(choice, limit):
            raise Damaged(why)
        if self.wants_experts:
            self.experts.append(experts_of(choice, len(insert) + len(choice["token_ids"])))
        self.add(insert, choice)
        cut = choice["finish_reason"] == "length" and not self.left
        self.truncated = cut and (max_tokens is None or max_tokens > room)  # it was to be longer
        return Turn(choice["token_ids"], choice["finish_reason"])

    def add(self, insert: Sequence[int], choice: dict) -> None:
        """What was put in, and what vLLM has made of it."""
        self.token_ids += [*insert, *choice["token_ids"]]
        self.logprobs += [0.0] * len(insert)
        self.logprobs += [entry["logprob"] for entry in choice["logprobs"]["content"]]
        self.versions += [NOT_SAMPLED] * len(insert)
        for span in choice["weight_versions"]:
            self.versions += [int(span["version"])] * (span["end"] - span["start"])


def experts_of(choice: dict, rows: int) -> np.ndarray:
    """The experts in vLLM's answer, (rows, L, K). Raises: Damaged when they are not so many."""
    try:
        experts = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))
    except (KeyError, TypeError, ValueError, EOFError) as e:
        raise Damaged(f"its experts cannot be read: {e!r:.100}") from None
    if experts.ndim != 3 or len(experts) != rows:
        raise Damaged(f"experts of shape {list(experts.shape)}, expected {rows} rows")
    return experts.astype(np.uint8 if experts.dtype == np.uint8 else np.int16)


def interrupted(sample: Sample, at: int, text_ids: list[int], decode) -> Ask:
    """`sample` with --interrupt-at-tokens (ScaleRL): a turn that is not done after `at` tokens goes
    on after the text that ends its thinking, unless it has ended that itself, or the text would
    leave no room to answer."""

    async def ask(
        insert: Sequence[int] = (), max_tokens: int | None = None, stop: Sequence[str] = ()
    ) -> Turn:
        room = sample.left - len(insert)
        limit = min(room, max_tokens or room)
        if not 0 < at < limit - len(text_ids):
            return await sample(insert, max_tokens, stop)
        thought = await sample(insert, at, stop)
        if thought.finish != "length":
            return thought
        put = [] if THINK_END in decode(thought.token_ids, special=True) else text_ids
        rest = await sample(put, max_tokens and limit - at - len(put), stop)
        return Turn([*thought.token_ids, *put, *rest.token_ids], rest.finish)

    return ask


def what_was_wrong(scores: list, example: dict) -> str:
    """Of samples without a reward: how many, and why; "" if there is none."""
    wrong = [str(x) for x in scores if isinstance(x, Damaged)]
    wrong += [f"reward: {x}" for x in scores if isinstance(x, str)]
    # time-outs differ by their time of day
    kinds = [bad.partition(" since ")[0] for bad in wrong]
    reasons = ", ".join(
        f"{kinds.count(kind)} x {wrong[kinds.index(kind)]}" for kind in dict.fromkeys(kinds)
    )
    return f"samples dropped: {reasons[:600]}; of {str(example)[:200]}" if wrong else ""
