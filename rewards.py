"""Rewards: what a sample is worth. They run in processes of their own on the rollout node (`python rewards.py SPEC`).

The contract of a reward function, `--reward FILE.py:FUNCTION`:
    def score(completion: str, example: dict) -> float        or        async def score(...)
`completion` is the sample's text, without the end token. `example` is the whole row of the data set, and besides
example["prompt"] and example["answer"] whatever their columns are called. The result is one finite number. A function
that raises, returns anything else, exits, or takes longer than the node's --reward-timeout-s costs that sample and no
more: the sample is left out, counted by kind (hub counts `reward_*`) and named in the node's log. Samples of a plain
function are scored one after the other in each of --reward-workers processes; those of an async one together.
"""

import asyncio
import hashlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import sys
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path


def exact_match(completion: str, example: dict) -> float:
    """1.0 if the completion is the answer, else 0.0."""
    return float(completion.strip() == str(example["answer"]).strip())


def numeric_match(completion: str, example: dict) -> float:
    """1.0 if the last number of the completion equals the answer: 1,024 is 1024.0; 7 % and $7 are 7.

    Raises: ValueError when the answer holds no number.
    """
    answer = last_number(str(example["answer"]))
    if answer is None:
        raise ValueError(f"the answer {example['answer']!r} holds no number")
    return float(last_number(completion) == answer)


def last_number(text: str) -> Decimal | None:
    """Exact: 0.1 + 0.2 is not what anybody wrote."""
    for word in reversed(text.split()):
        try:
            number = Decimal(word.strip("$€£%()[]{}*=:;.!?\"'").replace(",", ""))
        except InvalidOperation:
            continue
        if number.is_finite():
            return number
    return None


def math_match(completion: str, example: dict) -> float:
    """1.0 if the completion's final answer, in \\boxed{} or as the last expression, equals the answer as mathematics.

    Raises: TimeoutError when it takes sympy more than 5 s, which is no wrong answer (where sympy does not hear of it,
    this process is ended); ValueError when the answer itself cannot be read.
    Source: NeMo RL's hf_math_verify; the answer is read as LaTeX in \\boxed{}, the completion as LaTeX or plain.
    """
    import math_verify  # half a second: only who needs it
    from math_verify.errors import TimeoutException

    latex, plain = math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()
    try:
        gold = math_verify.parse(f"\\boxed{{{example['answer']}}}", [latex], raise_on_error=True)
        if not gold:
            raise ValueError(f"the answer {example['answer']!r} is not mathematics")
        found = math_verify.parse(completion, [plain, latex], raise_on_error=True)
        return float(math_verify.verify(gold, found, raise_on_error=True))
    except TimeoutException as e:  # a BaseException
        raise TimeoutError(str(e)) from None


REWARDS = {"exact": exact_match, "numeric": numeric_match, "math": math_match}


def load_reward(spec: str) -> Callable[[str, dict], float]:
    """The reward function of `--reward`.

    Raises: ValueError when the file or the function is not there.
    """
    if spec in REWARDS:
        return REWARDS[spec]
    file, colon, function = spec.rpartition(":")
    if not colon or not Path(file).is_file():
        names = ", ".join(REWARDS)
        raise ValueError(f"--reward {spec!r}: expected {names}, or FILE.py:FUNCTION with an existing file")
    sys.path.insert(0, str(Path(file).resolve().parent))  # it may import its neighbours
    module_spec = importlib.util.spec_from_file_location("reward_module", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"--reward {spec!r}: {file} has no function {function!r}")
    return getattr(module, function)


def reward_digest(spec: str) -> str:
    """Of the file that the function is in, "" if it is one of ours: a node must run what the trainer means.
    Raises: ValueError when the file is not there."""
    if spec in REWARDS:
        return ""
    file = Path(spec.rpartition(":")[0])
    if not file.is_file():
        raise ValueError(f"--reward {spec!r}: there is no file {file} in {Path.cwd()}")
    return hashlib.sha256(file.read_bytes()).hexdigest()


# ---- the worker ----------------------------------------------------------------------------------------------
def judge(value) -> dict:
    """What a reward function returned, as an answer."""
    if not isinstance(value, numbers.Real):
        what = f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else type(value).__name__
        return {"error": f"it returned {value!r:.100} ({what}), expected one number", "kind": "wrong_type"}
    if not math.isfinite(value):
        return {"error": f"it returned {value}", "kind": "not_finite"}
    return {"reward": float(value)}


def raised(e: Exception) -> dict:
    return {"error": f"it raised {e!r}"[:300], "kind": "timed_out" if isinstance(e, TimeoutError) else "raised"}


def serve_rewards(spec: str) -> None:
    """A line of JSON in ("completion", "example") and one out ("reward", or "error" and "kind"), in the same order,
    until stdin ends. What the function prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    reward = load_reward(spec)
    if inspect.iscoroutinefunction(reward):
        asyncio.run(serve_async(reward, answers))
        return
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = judge(reward(job["completion"], job["example"]))
        except Exception as e:  # any: the user's code
            answer = raised(e)
        answers.write(json.dumps(answer) + "\n")


async def serve_async(reward, answers) -> None:
    """The same for a function that waits, for a judge model say: all jobs at hand run together."""
    jobs: asyncio.Queue[asyncio.Task] = asyncio.Queue()
    lines = asyncio.StreamReader(limit=1 << 28)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)

    async def one(job: dict) -> dict:
        try:
            return judge(await reward(job["completion"], job["example"]))
        except Exception as e:  # any: the user's code
            return raised(e)

    async def answer() -> None:
        while True:
            answers.write(json.dumps(await (await jobs.get())) + "\n")
            jobs.task_done()

    teller = asyncio.create_task(answer())
    while line := await lines.readline():
        jobs.put_nowait(asyncio.create_task(one(json.loads(line))))
    await jobs.join()
    teller.cancel()


if __name__ == "__main__":
    serve_rewards(sys.argv[1])
