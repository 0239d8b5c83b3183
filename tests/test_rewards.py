"""rewards.py: what a sample is worth, by each of the built-in functions, and how own ones are found and called."""

import asyncio

import pytest

import rewards
from workers import RewardWorkers


@pytest.mark.parametrize(("completion", "answer", "worth"), [
    ("so it is 42", "42", 1), ("42 apples, or 43", 42, 0), ("$1,024.00.", "1024", 1), ("(-7%)", "-7", 1),
    ("**3**", 3, 1),
    ("no number", "1", 0), ("", "1", 0), ("0.30", "0.3", 1), ("0.30000000000000004", "0.3", 0), ("1e3", "1000", 1),
    ("nan", "1", 0), ("inf", "1", 0),
])  # fmt: skip
def test_numeric_compares_the_last_number(completion, answer, worth):
    assert rewards.numeric_match(completion, {"answer": answer}) == worth


def test_numeric_refuses_an_answer_without_a_number():
    with pytest.raises(ValueError, match="the answer 'x' holds no number"):
        rewards.numeric_match("1", {"answer": "x"})


@pytest.mark.parametrize(("completion", "answer", "worth"), [
    ("<think> 3 or 4? </think> It is \\boxed{\\frac{1}{2}}.", "0.5", 1), ("I get $x=5$", "5", 1),
    ("3/4", "\\frac{3}{4}", 1),
    ("\\boxed{(1, 2)}", "(1,2)", 1), ("\\boxed{6}", "5", 0), ("", "5", 0), ("\\boxed{", "5", 0),
    ("\\boxed{1/0}", "5", 0),
])  # fmt: skip
def test_math_compares_what_the_answers_mean(completion, answer, worth):
    assert rewards.math_match(completion, {"answer": answer}) == worth


def test_own_rewards_are_loaded_and_a_wrong_spec_says_what_is_wrong(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("SCALE = 2\n")
    file = tmp_path / "my.py"
    file.write_text("from neighbour_of_mine import SCALE\n"
                    "def length(completion, example):\n    return len(completion) * SCALE\nother = 3\n")  # fmt: skip
    assert rewards.load_reward(f"{file}:length")("abc", {}) == 6
    assert len(rewards.reward_digest(f"{file}:length")) == 64 and rewards.reward_digest("math") == ""
    for spec, reason in [
        (f"{file}:nothing", "has no function"), (f"{file}:other", "has no function"),
        (f"{tmp_path}/no.py:f", "expected exact, numeric, math, or FILE.py:FUNCTION"), ("length", "expected exact"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            rewards.load_reward(spec)


def score(spec, completions, example, timeout_s=30.0):
    async def run():
        workers = RewardWorkers(spec, 1, timeout_s)
        try:
            return await workers.score(completions, example), workers.failed
        finally:
            await workers.close()

    return asyncio.run(run())


def test_what_sympy_cannot_do_in_time_is_no_wrong_answer():
    """Of three completions the second takes sympy for ever; the worker goes on."""
    found, failed = score("math", ["\\boxed{4}", "\\boxed{10^{10^{10}}}", "\\boxed{5}"], {"answer": "4"})
    assert (found[0], found[2]) == (1.0, 0.0) and found[1].startswith("it raised TimeoutError")
    assert failed == {"timed_out": 1}


def test_samples_of_an_async_reward_are_scored_together_and_answered_in_order(tmp_path):
    """Each waits until all four have been called: one after the other none would ever end."""
    (tmp_path / "my.py").write_text(
        "import asyncio\ncalled, all_here = [], asyncio.Event()\n"
        "async def score(completion, example):\n"
        "    called.append(completion)\n"
        "    if len(called) == 4: all_here.set()\n"
        "    await all_here.wait()\n"
        "    return float(completion)\n"
    )
    found, failed = score(f"{tmp_path / 'my.py'}:score", ["3", "1", "4", "1.5"], {})
    assert found == [3.0, 1.0, 4.0, 1.5] and not failed
