"""rewards.py: what a sample is worth, by each of the built-in functions, and how own ones are found
and called."""

import asyncio
import math
import time
from pathlib import Path

import pytest

import rewards
from bridge import reward_process
from bridge.reward_pool import RewardWorkers

# What is right, whatever it is written in; and what is not, though the right number stands in it.
NUMERIC = [
    (r"so \boxed{72}", 72, 1),
    ("x=72", 72, 1),
    ("**72**", 72, 1),
    ("#### 72", 72, 1),
    (r"72\]", 72, 1),
    ("<answer>72</answer>", 72, 1),
    ("72USD", 72, 1),
    ("72-", 72, 1),
    (r"5 steps; \boxed{72}", 72, 1),
    (r"5 steps; \boxed{72}", 5, 0),
    ("so it is 42.", "42", 1),
    ("42 apples, or 43", 42, 0),
    ("$1,024.00.", "1024", 1),
    ("(-7%)", "-7", 1),
    ("no number", 1, 0),
    ("", 1, 0),
    ("1e3", "1000", 1),
    ("nan", 1, 0),
    ("inf", 1, 0),
    ("0.30000000000000004", "0.3", 0),
    ("1/2", "0.5", 1),
    (r"\boxed{\frac{1}{2}}", "1/2", 1),
    (r"\(\dfrac12\)", "0.5", 1),
    (r"-\frac{1}{2}", "-0.5", 1),
    ("½", "0.5", 1),
    ("3½", "3.5", 1),
    ("3 1/2", "3.5", 1),
    (r"\boxed{3\frac{1}{2}}", "3.5", 1),
    ("1 000", "1000", 1),
    (r"\boxed{1\,000}", "1000", 1),
    ("10{,}000", "10000", 1),
    ("1'000", 1000, 1),
    ("-$5", "-5", 1),
    ("$-5", "-5", 1),
    ("US$72", 72, 1),
    ("72 km/h", 72, 1),
    (r"72\text{ km/h}", 72, 1),
    (r"\boxed{72\text{ m}^2}", 72, 1),
    ("72 m^2", 72, 1),
    ("72 cm³", 72, 1),
    ("72°C", 72, 1),
    (r"72^\circ", 72, 1),
    ("$x = 72$.", 72, 1),
    (r"\[ x = 72 \]", 72, 1),
    ("Answer: 72", 72, 1),
    ("Answer:72", 72, 1),
    ("A - so it is \u22125", "-5", 1),
    (r"\boxed{- 5}", "-5", 1),
    ("x = - 5", "-5", 1),
    ("Result:\n- 72", 72, 1),
    ("8*9=72", 72, 1),
    ("8 * 9 = 72", 72, 1),
    (r"8 \times 9 = 72", 72, 1),
    (r"3 \times 10^4", "30000", 1),
    ("3 \u00d7 10^{4}", 30000, 1),
    ("2 million", 2000000, 1),
    ("$2.5 million", "2500000", 1),
    ("5k", 5000, 1),
    ("72 patients had COVID-19", 72, 1),
    ("72 apples on the 3rd day", 72, 1),
    (r"\textbf{72}", 72, 1),
    (r"\boxed{\text{72}}", 72, 1),
    (r"\boxed{\$72}", 72, 1),
    (r"\boxed{72\%}", 72, 1),
    ("<b>72</b>", 72, 1),
    ("-> 72", 72, 1),
    ("=> 72", 72, 1),
    ("part 1: 72", 72, 1),
    ("> 72", 72, 1),
    ("72 (seventy-two)", 72, 1),
    ("`72`", 72, 1),
    ("#### $1,080", 1080, 1),
    ("#### 72\n\nI used 3 steps.", 72, 1),
    ("#### 3. Add them\nThe sum is 72", 72, 1),
    ("<think>5</think>\n72", 72, 1),
    ("<think>72", 72, 0),
    ("<think>72</think>\n", 72, 0),
    ("<think>\\boxed{72}</think>\n\n\\boxed{5}", 72, 0),
    ("thinking 5</think>72", 72, 1),
    ("<answer>It is 72.</answer> in 3 steps", 72, 1),
    (r"<answer>\boxed{72}</answer>", 72, 1),
    (r"\boxed{72} takes 3 steps", 72, 1),
    (r"\boxed{5}, no: \boxed{72}", 72, 1),
    (r"\boxed{5}, no: \boxed{72}", 5, 0),
    (r"\boxed{72} or \boxed{7", 72, 0),
    (r"\boxed{x=72}", 72, 1),
    (r"\boxed{x=1, y=2}", 2, 0),
    (r"\boxed{x=1,y=2}", 2, 0),
    (r"\boxed{(1,2)}", 2, 0),
    (r"\boxed{(1, 2)}", 2, 0),
    ("so (1, 2)", 2, 0),
    (r"\boxed{2^{10}}", 10, 0),
    ("2^10", 10, 0),
    ("2**10", 10, 0),
    ("10^3", 3, 0),
    ("2x", 2, 0),
    ("so y is 2x.", 2, 0),
    (r"3\sqrt{2}", 2, 0),
    (r"3\sqrt{2}", 3, 0),
    ("√2", 2, 0),
    ("2π", 2, 0),
    (r"2\pi", 2, 0),
    ("3 + 4", 4, 0),
    ("10 - 3", 3, 0),
    ("3*4", 4, 0),
    ("5-10", 10, 0),
    ("5\u201310", 10, 0),
    ("3:2", 2, 0),
    ("12:30", 30, 0),
    ("2024-01-05", 5, 0),
    ("3,5", 35, 0),
    ("3,5", 5, 0),
    ("x > 72", 72, 0),
    (r"x \geq 72", 72, 0),
    ("x ≥ 72", 72, 0),
    ("72 apples and 5 pears", 72, 0),
    ("72 apples and 5 pears", 5, 1),
    (r"\boxed{72 apples and 5 pears}", 5, 0),
    (r"\boxed{72 apples and 5 pears}", 72, 0),
    (r"\boxed{1, 2}", 2, 0),
    (r"\boxed{5 \text{ or } 6}", 6, 0),
    ("5x^2+3x+7", 7, 0),
    ("log_2(8)", 8, 0),
    (r"\log_2 8", 8, 0),
    ("f(2)", 2, 0),
    ("5 million", 5, 0),
    ("5k", 5, 0),
    (r"\frac{\sqrt{3}}{2}", 2, 0),
    (r"since 12, \frac{\sqrt{12}}{2}", 12, 0),
    ("1/2", 2, 0),
    ("1/0", 0, 0),
    ("1e999999999", 1, 0),
    ("9" * 5000, 1, 0),
    ("3.14.15", "3.14", 0),
    ("1,234", 1.234, 0),
    ("-72", 72, 0),
    ("72", -72, 0),
    ("7.2", 72, 0),
    ("72", "72.0", 1),
    ("72", 72.0, 1),
    ("72", [72], 1),
    ("72", "[72]", 1),
    ("72", "She has 3.\n#### 72", 1),
    ("72", {"ground_truth": "72"}, 1),
    ("72", "$72", 1),
    ("72", "72 apples", 1),
    ("72", r"so \boxed{72}", 1),
    ("1000000", "1,000,000", 1),
    ("1,00,000", "100000", 1),
    ("the answer is 72", 72, 1),
    ("72 is the answer", 72, 1),
    ("He has 72 — 5 more", 5, 1),
    ("$5$", 5, 1),
    (r"\$5", 5, 1),
    ("72 miles per hour", 72, 1),
    ("It's 72!", 72, 1),
    ("72/day", 72, 1),
    ("$1.50/day", 1.5, 1),
    ("72 years-old", 72, 1),
    ("72-year-old", 72, 1),
    ("She pays $72$ dollars", 72, 1),
    ("x ≈ 72", 72, 1),
    (r"\approx 72", 72, 1),
    ("**Answer:** 72", 72, 1),
    ("**Answer: 72**", 72, 1),
    ("2. Answer: 72\n", 72, 1),
    ("72 x 2", 2, 0),
    ("3x4", 4, 0),
    ("(72)", 72, 1),
    ("{72}", 72, 1),
    ("[72]", 72, 1),
    ('"72"', 72, 1),
    ("'72'", 72, 1),
    ("72,", 72, 1),
    ("72;", 72, 1),
    (".5", 0.5, 1),
    ("0.50", "1/2", 1),
    ("007", 7, 1),
    ("100%", 100, 1),
    ("1_000", 1000, 1),
    ("±5", 5, 0),
    (r"\pm 5", 5, 0),
    ("3 ± 2", 2, 0),
    ("72 dollars and 50 cents", 72, 0),
    (r"The answer is $\boxed{72}$ dollars, i.e. \$72.00", 72, 1),
    ("**Final Answer**\n\n\\[\n\\boxed{72}\n\\]", 72, 1),
    (r"\boxed{\mathbf{72}}", 72, 1),
    (r"\boxed{72 \, \text{km}}", 72, 1),
    (r"\boxed{72\ \mathrm{km/h}}", 72, 1),
    (r"\boxed{\text{The answer is } 72}", 72, 1),
    (r"\boxed{n = 72}", 72, 1),
    (r"\boxed{-\frac{3}{4}}", "-0.75", 1),
    (r"\boxed{\frac{-3}{4}}", "-3/4", 1),
    (r"\boxed{\left(72\right)}", 72, 1),
    (r"\boxed{72,000}", 72000, 1),
    (r"\boxed{0.\overline{3}}", 0, 0),
    (r"\boxed{\frac{1}{3}}", "1/3", 1),
    (r"\boxed{1.5 \times 10^{3}}", 1500, 1),
    (r"\boxed{1500}", "1.5e3", 1),
    (r"\boxed{72^\circ}", 72, 1),
    (r"\boxed{72^{\circ}}", 72, 1),
    (r"\boxed{72°}", 72, 1),
    (r"\boxed{\$72.50}", 72.5, 1),
    (r"\boxed{72\text{ dollars and }50\text{ cents}}", 72, 0),
    (r"\boxed{3:30}", 3, 0),
    (r"\boxed{x \le 72}", 72, 0),
    (r"\boxed{72!}", 72, 0),
    (r"\boxed{\binom{5}{2}}", 5, 0),
    (r"\boxed{\binom{5}{2}}", 2, 0),
    (r"\boxed{5\%}", 5, 1),
    (r"\boxed{i}", 1, 0),
    (r"\boxed{2i}", 2, 0),
    (r"\boxed{|72|}", 72, 0),
    (r"\boxed{\lfloor 7.5 \rfloor}", 7.5, 0),
    (r"\boxed{72_8}", 72, 0),
    (r"\boxed{72_{8}}", 72, 0),
    (r"\boxed{1010_2}", 1010, 0),
    ("a_{72}", 72, 0),
    (r"\sqrt[3]{72}", 72, 0),
    (r"\sqrt{72}", 72, 0),
    (r"2\cdot 36", 36, 0),
    (r"36\cdot2 = 72", 72, 1),
    ("I think 72. Actually no.", 72, 1),
    ("**72**.", 72, 1),
    ("72.\n\n", 72, 1),
    ("Total = $72", 72, 1),
    ("Total: 72€", 72, 1),
    ("72,-", 72, 1),
    ("\u00a372", 72, 1),
    ("\u20b972", 72, 1),
    ("72 %", 72, 1),
    ("72 percent", 72, 1),
    ("72/100", 72, 0),
    ("72 out of 100", 72, 0),
    ("72 out of 100", 100, 1),
    ("approximately 72.0", 72, 1),
    ("~72", 72, 1),
    ("72±1", 72, 0),
    ("1.2.3", 3, 0),
    ("192.168.0.1", 1, 0),
    ("1st", 1, 0),
    ("no. 72", 72, 1),
    ("#72", 72, 1),
    ("Q72", 72, 0),
    ("-1", 1, 0),
    ("- 1", 1, 1),
    ("1-", 1, 1),
    ("--1", 1, 0),
    ("(\u22121)", -1, 1),
    ("1e3", "3", 0),
    ("1E+3", 1000, 1),
    ("0x10", 10, 0),
    ("0x10", 0, 0),
    ("10 000 000", 10000000, 1),
    ("1.000", 1, 1),
    ("1.000,50", 1, 0),
    ("1.000,50", 1000.5, 0),
    ("72\\\\", 72, 1),
    (r"\begin{aligned} x &= 72 \end{aligned}", 72, 1),
    (r"x &= 8 \\ y &= 72", 72, 1),
    ("The answer is: seventy two (72).", 72, 1),
    ("72 (or 73)", 72, 0),
    ("<answer>72", 72, 1),
    ("<answer>72 or 73</answer>", 73, 0),
    ("<ANSWER>72</ANSWER>", 72, 1),
    ("<answer></answer>", 72, 0),
    ("<answer></answer> 72", 72, 0),
    (r"\boxed{}", 72, 0),
    (r"72 \boxed{}", 72, 0),
    (r"\boxed", 72, 0),
    ("</think>72", 72, 1),
    ("<think>a</think>5<think>72", 72, 0),
    ("<think>a</think>72<think>", 72, 0),
    ("x^2 + 72 = 0", 72, 0),
    ("2 72", 72, 1),
    ("3 1/2 cups", 3.5, 1),
    ("1 / 2", 0.5, 1),
    ("1/ 2", 0.5, 1),
    ("½ cup", 0.5, 1),
    ("0,5", 0.5, 0),
    ("0,5", 5, 0),
    ("1,5", 15, 0),
    ("12,34", 1234, 0),
    ("The ratio 3 : 2", 2, 0),
    ("3 to 2", 2, 1),
    ("at 5pm", 5, 1),
    ("in 2024", 2024, 1),
    ("72\xa0km", 72, 1),
    ("\uff17\uff12", 72, 1),
    ("\u0667\u0662", 72, 1),
    ("x=72,y=3", 72, 0),
    ("x=72, y=3", 72, 0),
    ("1 + 2 = 3 apples.", 3, 1),
    ("1+2=3, not 4", 3, 0),
    ("3(4)", 4, 0),
    ("(3)(4)", 4, 0),
    ("3 (4)", 4, 1),
    ("2³", 2, 0),
    ("2²", 2, 0),
    ("10\u2074", 10, 0),
    (r"\frac{72}{1}", 72, 1),
    (r"\frac{144}{2}", 72, 1),
    (r"\frac{x}{72}", 72, 0),
    (r"\frac{72}{x}", 72, 0),
    ("72/x", 72, 0),
    ("x/72", 72, 0),
    ("72x", 72, 0),
    ("72 x", 72, 0),
    ("72xyz", 72, 1),
    ("e^{72}", 72, 0),
    ("e^72", 72, 0),
    (r"\ln 72", 72, 0),
    ("ln(72)", 72, 0),
    ("log 72", 72, 1),
    ("72 mod 5", 5, 1),
    ("10 choose 2", 2, 1),
    ("five", 5, 0),
]
MATH = [
    ("<think>\nMaybe \\boxed{5}. Wait, no.\n</think>\n\nThe answer is \\boxed{4}.", "4", 1),
    ("<think>\nMaybe \\boxed{5}. Wait, no.\n</think>\n\nThe answer is \\boxed{4}.", "5", 0),
    (r"<think> \boxed{4}", "4", 0),
    (r"\boxed{4}", "#### 4", 1),
    (r"\boxed{2}", {"ground_truth": "2"}, 1),
    (r"\boxed{\frac12}", "½", 1),
    (r"\boxed{0.5}", "½", 1),
    (r"\boxed{½}", "0.5", 1),
    (r"\boxed{\sqrt2}", "√2", 1),
    (r"\boxed{√2}", r"\sqrt{2}", 1),
    (r"\boxed{√(2)}", r"\sqrt{2}", 1),
    (r"\boxed{72}", "Natalia sold 48/2 = <<48/2=24>>24.\n#### 72", 1),
    (r"\boxed{72}", r"so we get $\boxed{72}$.", 1),
    (r"<think> 3 or 4? </think> It is \boxed{\frac{1}{2}}.", "0.5", 1),
    ("I get $x=5$", "5", 1),
    ("3/4", r"\frac{3}{4}", 1),
    (r"\boxed{(1, 2)}", "(1,2)", 1),
    (r"\boxed{6}", "5", 0),
    ("", "5", 0),
    (r"\boxed{", "5", 0),
    (r"\boxed{1/0}", "5", 0),
    (r"x=\boxed{1} or x=\boxed{2}", "1, 2", 0),
    (r"\boxed{1, 2}", "1, 2", 1),
    (r"\boxed{siraP}", "Paris", 0),
    (r"\boxed{Paris}", "Paris", 1),
    (r"\boxed{\text{paris}}", "Paris", 1),
    (r"\boxed{no}", "on", 0),
    (r"\boxed{\text{no}}", r"\text{on}", 0),
    (r"\boxed{1 000}", "0", 0),
    (r"\boxed{1 000}", "1000", 1),
    (r"\boxed{10\,000}", "10000", 1),
    (r"\boxed{72.}", "72", 1),
    (r"\boxed{72}", "72.", 1),
    (r"\boxed{**72**}", "72", 1),
    (r"\boxed{$72$}", "72", 1),
    ("<answer>72</answer>", "72", 1),
    ("<answer>The answer is 72.</answer>", "72", 1),
    (r"<answer>\frac{1}{2}</answer>", "0.5", 1),
    ("<answer>x^2+1</answer>", "1+x^2", 1),
    ("<answer>x^2+1</answer>", "x^2+2", 0),
    ("#### 72", "72", 1),
    (r"\boxed{B}", "B", 1),
    (r"\boxed{(B)}", "B", 1),
    (r"\boxed{\text{(B)}}", "B", 1),
    (r"\boxed{C}", "B", 0),
    (r"\boxed{2\pi}", "2π", 1),
    (r"\boxed{5} no \boxed{4", "5", 0),
    (r"\boxed{-5}", "\u22125", 1),
    (r"\boxed{3\frac12}", "3½", 1),
    (r"\boxed{72\text{ apples}}", "72", 1),
    (r"\boxed{72 \text{ apples and } 5 \text{ pears}}", "5", 0),
    (r"\boxed{\infty}", "∞", 1),
    (r"\boxed{x=5}", "5", 1),
    (r"\boxed{5}", "x=5", 1),
    (r"\fbox{5}", "5", 1),
    (r"\boxed 5", "5", 1),
    (r"\boxed{5}", 5, 1),
    (r"\boxed{5}", [5], 1),
    (r"\boxed{\boxed{5}}", "5", 1),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", 1),
    (r"\boxed{\{1,2\}}", r"\{1,2\}", 1),
    (r"$$\boxed{\begin{pmatrix}1\\2\end{pmatrix}}$$", r"\begin{pmatrix}1\\2\end{pmatrix}", 1),
    (r"\boxed{1.000}", "1", 1),
    ("The final answer is $4$. I hope it is correct.", "4", 1),
    ("so the answer is 4", "4", 1),
    (r"\boxed{4}, 5", "4", 1),
    (r"\boxed{even}", "even", 1),
    (r"\boxed{neve}", "even", 0),
]
EXACT = [
    ("42", 42.0, 1),
    ("42.0", 42, 1),
    ("42", ["42"], 1),
    ("edcba", ["edcba"], 1),
    ("b", ["a", "b"], 1),
    ("c", ["a", "b"], 0),
    ("true", True, 1),
    ("True", True, 1),
    ("1", True, 0),
    ("false", False, 1),
    ("<think>..</think>\n\nC", "C", 1),
    ("<think>C", "C", 0),
    (" C\n", "C", 1),
    ("C D", "C  D", 0),
    ("C.", "C", 0),
    ("0.1", 0.1, 1),
    ("nan", math.nan, 0),
    ("72", {"ground_truth": "72"}, 1),
    ("<think>", "", 0),
]


@pytest.mark.parametrize(
    ("completion", "answer", "worth"),
    [
        *NUMERIC,
        ("so it is 42", "42", 1),
        ("42 apples, or 43", 42, 0),
        ("$1,024.00.", "1024", 1),
        ("(-7%)", "-7", 1),
        ("**3**", 3, 1),
        ("no number", "1", 0),
        ("", "1", 0),
        ("0.30", "0.3", 1),
        ("0.30000000000000004", "0.3", 0),
        ("1e3", "1000", 1),
        ("nan", "1", 0),
        ("inf", "1", 0),
    ],
)
def test_numeric_compares_the_last_number(completion, answer, worth):
    assert rewards.numeric_match(completion, {"answer": answer}) == worth


def test_numeric_refuses_an_answer_without_a_number():
    with pytest.raises(ValueError, match="the answer 'x' holds no number"):
        rewards.numeric_match("1", {"answer": "x"})
    for answer in (
        "",
        True,
        None,
        [1, 2],
        {"a": 1},
        "3:2",
        "5 apples, 3 pears",
        math.nan,
        "(1, 2)",
    ):
        with pytest.raises(
            ValueError, match=r"the answer .*(holds no number|is not one text or number)"
        ):
            rewards.numeric_match("1", {"answer": answer})


@pytest.mark.parametrize(("completion", "answer", "worth"), EXACT)
def test_exact_compares_what_follows_the_thought(completion, answer, worth):
    assert rewards.exact_match(completion, {"answer": answer}) == worth


@pytest.mark.parametrize(
    "text", ["<answer>" * 8000, "-=" * 30000 + "1", "(" + "1," * 30000, "\\boxed{" * 8000]
)
def test_a_long_senseless_sample_costs_no_time(text):
    """It is 0.05 s; a look back from every sign would take minutes."""
    start = time.process_time()
    assert rewards.numeric_match(text, {"answer": 72}) == 0
    assert time.process_time() - start < 5


def test_a_reward_that_cannot_read_the_answers_is_found_at_the_start():
    rows = lambda *answers: [{"prompt": "p", "answer": answer} for answer in answers]
    for spec, answer, why in [
        ("numeric", "seventy-two", "holds no number"),
        ("math", "}", "is not mathematics"),
        ("math", {"value": 2}, "is not one text or number"),
        ("exact", "so 5 #### 5", "--reward numeric"),
    ]:
        with pytest.raises(
            ValueError, match=f"--reward {spec} .* 3 of 3 .*--data x row 0: the answer .*{why}"
        ):
            rewards.check_answers(spec, rows(answer, answer, answer), "--data x")
        found = rewards.check_answers(spec, rows("5", answer, "6"), "--data x")
        assert (
            f"--reward {spec} cannot be 1 for 1 of 3 answers that were tried; --data x row 1: the "
            "answer" in found
        )
    for spec in ("numeric", "math", "exact"):
        assert (
            rewards.check_answers(spec, rows("5", ["5"], {"ground_truth": "5"}, 5.0), "--data x")
            == ""
        )
    assert rewards.check_answers("my.py:score", rows(None), "") == ""
    found = rewards.check_answers("math", rows("No", "0", "3 is the only possible value"), "--data")
    assert "the same words for 1 of 3 answers" in found and found.endswith("' is a sentence")


def test_answers_all_over_a_file_are_tried_however_long_the_first_takes(monkeypatch):
    """It imports math-verify; the half second for the others begins behind it."""
    clock, tried = [0.0], []

    def numeric(completion, example):
        clock[0] += 0.02 if tried else 9.0
        tried.append(example["answer"])
        return float(example["answer"] < 900)

    monkeypatch.setattr(rewards.time, "monotonic", lambda: clock[0])
    monkeypatch.setitem(rewards.MATCH, "numeric", numeric)
    found = rewards.check_answers("numeric", [{"answer": n} for n in range(1000)], "--data x")
    assert len(tried) > 20 and f"row {min(n for n in tried if n >= 900)}:" in found


@pytest.mark.parametrize(
    ("completion", "answer", "worth"),
    [
        *MATH,
        ("<think> 3 or 4? </think> It is \\boxed{\\frac{1}{2}}.", "0.5", 1),
        ("I get $x=5$", "5", 1),
        ("3/4", "\\frac{3}{4}", 1),
        ("\\boxed{(1, 2)}", "(1,2)", 1),
        ("\\boxed{6}", "5", 0),
        ("", "5", 0),
        ("\\boxed{", "5", 0),
        ("\\boxed{1/0}", "5", 0),
    ],
)
def test_math_compares_what_the_answers_mean(completion, answer, worth):
    assert rewards.math_match(completion, {"answer": answer}) == worth


def test_own_rewards_are_loaded_and_a_wrong_spec_says_what_is_wrong(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("SCALE = 2\n")
    file = tmp_path / "my.py"
    file.write_text(
        "from neighbour_of_mine import SCALE\n"
        "def length(completion, example):\n    return len(completion) * SCALE\nother = 3\n"
    )
    assert reward_process.load_reward(f"{file}:length")("abc", {}) == 6
    assert (
        len(reward_process.reward_digest(f"{file}:length")) == 64
        and reward_process.reward_digest("math") == ""
    )
    for spec, reason in [
        (f"{file}:nothing", "has no function"),
        (f"{file}:other", "has no function"),
        (f"{tmp_path}/no.py:f", "expected exact, numeric, math, rounds, or FILE.py:FUNCTION"),
        (f"{tmp_path}/no.py:f", f"there is no file {tmp_path}/no.py$"),
        ("no.py:f", f"there is no file {Path.cwd()}/no.py$"),
        ("length", "expected exact"),
    ]:
        with pytest.raises(ValueError, match=reason):
            reward_process.load_reward(spec)


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
    found, failed = score(
        "math", ["\\boxed{4}", "\\boxed{10^{10^{10}}}", "\\boxed{5}"], {"answer": "4"}
    )
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
