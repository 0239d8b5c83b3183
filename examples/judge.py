"""Another model judges all samples of a prompt at once: it ranks better than it grades.

    JUDGE_URL=http://judge:8000/rank ... --reward examples/judge.py:rank

The service gets {"question", "answers"} and gives {"scores": [...]}, in the same order. It may be
slow, and it may fail: an error of the network, HTTP 429 or 5xx is no verdict, so the group is asked
for again, for --reward-away-timeout-s of the rollout node. Anything else costs the group.
"""

import os

import aiohttp


async def rank(completions: list[str], example: dict) -> list[float]:
    body = {"question": example["prompt"], "answers": completions}
    async with aiohttp.ClientSession(raise_for_status=True) as session:
        async with session.post(os.environ["JUDGE_URL"], json=body) as response:
            scores = (await response.json())["scores"]
    # By rank: 1 for the best, 0 for the worst, and equal scores are equal.
    return [sum(x > y for y in scores) / max(1, len(scores) - 1) for x in scores]
