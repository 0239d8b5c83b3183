"""Qwen3's own tokenizer and chat template, and problems of competitions (tests/real_material.py), in
a model of that vocabulary: trained, resumed and evaluated with a real vLLM."""

import json
import random
import subprocess
import sys

import pytest
import real_material
from real_material import NEXT, problems, write_model, write_tokenizer
from test_run import REPO, TRAIN, Run

import task
from rewards import math_match

pytestmark = pytest.mark.slow
TEMPLATE = "{problem} Put the answer in \\boxed{}."
NO_THOUGHTS = '{"enable_thinking": false}'


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """transformers' tokenizer of the package's own files."""
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "qwen3"
    write_tokenizer(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "qwen3-moe"
    write_model(path)
    return path


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["sh", "-c", "echo out of reach >&2; exit 1"], "out of reach"),
        (["no-such-client"], "No such file"),
        (["touch", "a.tgz"], "another digest"),
    ],
)
def test_a_package_that_is_not_to_be_had_fails_ci_and_is_a_reason_to_skip_elsewhere(
    tmp_path, monkeypatch, command, why
):
    monkeypatch.setattr(real_material, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(real_material, "PACKAGES", {"a.tgz": (command, "0" * 64)})
    for ci, outcome in (("true", pytest.fail.Exception), ("", pytest.skip.Exception)):
        monkeypatch.setenv("CI", ci)
        with pytest.raises(outcome, match=f"a.tgz cannot be fetched by `{command[0]}.*{why}"):
            real_material.fetched("a.tgz")
    assert not list((tmp_path / "cache").iterdir())


def as_asked(problem: str) -> list[dict]:
    return [{"role": "user", "content": TEMPLATE.replace("{problem}", problem)}]


def test_the_chat_template_gives_transformers_token_ids_and_special_tokens_are_read_as_it_reads_them(
    qwen, model
):
    assert task.eos_token_ids(model) == [151645, 151643]
    for told in ({}, {"enable_thinking": False}):
        codec = task.Codec(model, template=TEMPLATE, kwargs=told)
        for row in problems():
            chats = [
                {"role": {"System": "system", "User": "user"}.get(m["role"], "assistant")}
                | {"content": m["text"]}
                for m in row["chat"]
            ]
            pairs = ((row["problem"], as_asked(row["problem"])), (chats, chats))
            for prompt, chat in pairs:
                wanted = qwen.apply_chat_template(chat, add_generation_prompt=True, **told)
                assert codec.encode({"prompt": prompt}) == wanted["input_ids"]
    # any ids, of half a character, or above the tokenizer's 151,669
    rng = random.Random(0)
    for _ in range(300):
        ids = [
            rng.choice((rng.randrange(151_936), rng.randrange(151_630, 151_936))) for _ in "x" * 8
        ]
        for special in (False, True):
            assert codec.decode(ids, special) == qwen.decode(ids, skip_special_tokens=not special)


def test_the_solution_of_every_problem_is_right_and_with_another_answer_wrong():
    rows = problems()
    for row, other in zip(rows, rows[1:] + rows[:1]):
        said = "<think>\n{}\n</think>\n\nThe answer is \\boxed{{{}}}."
        thought = "\n".join(row["steps"])
        assert math_match(said.format(thought, row["answer"]), row) == 1, row["answer"]
        if math_match(f"\\boxed{{{row['answer']}}}", other) == 0:
            assert math_match(said.format(other["answer"], row["answer"]), other) == 0


def test_a_model_of_qwen3_s_vocabulary_trains_goes_on_and_is_evaluated(tmp_path, qwen, model):
    rows = [{"problem": row["problem"], "answer": row["answer"]} for row in problems()]
    known, others = (
        [row for row in rows if (row["answer"] in NEXT["{"]) == ok] for ok in (True, False)
    )
    train, test = [*known[12:], *others[:30]], known[:12]
    for name, part in (("train", train), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    asking = ["--reward", "math", "--prompt-template", TEMPLATE]
    asking += ["--max-new-tokens", "96", "--max-total-sequence-length", "384"]
    sizes = ["--num-prompts-per-step", "8", "--num-generations-per-prompt", "4"]
    sizes += ["--train-global-batch-size", "32", "--max-trajectory-age-steps", "0"]
    flags = ["--model", str(model), "--data", "train.jsonl", *asking, *sizes, "--log-samples", "16"]
    for steps in ("2", "3"):  # the second goes on where the first has ended
        command = [*TRAIN, *flags, "--resume", "auto", "--max-num-steps", steps]
        with Run(tmp_path, command) as run:
            records = run.finish()
        assert "is 1 for nothing but the same words for " in run.out
    assert len(records) == 3 and max(r["train/grad_norm"] for r in records) > 0
    assert all(r["train/gen_kl_error"] < 1e-5 for r in records)
    assert not [count for count in records[-1]["hub"]["counts"] if count.startswith("reward_")]
    samples = [
        json.loads(line) for line in (tmp_path / "runs/tiny/samples.jsonl").read_text().splitlines()
    ]
    asked = {
        qwen.apply_chat_template(
            as_asked(row["problem"]), add_generation_prompt=True, tokenize=False
        )
        for row in train
    }
    assert len(samples) >= 24 and {sample["prompt"] for sample in samples} <= asked
    assert {ending(sample) for sample in samples} >= {"<|im_end|>", "<|endoftext|>"}
    assert {sample["reward"] for sample in samples} == {0.0, 1.0}

    command = [sys.executable, str(REPO / "evaluate.py"), "runs/tiny/weights/v3", "--out", "scores"]
    command += ["--data", "test.jsonl", "--samples", "2", *asking]
    command += ["--chat-template-kwargs", NO_THOUGHTS]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=240)
    (scores,) = map(json.loads, (tmp_path / "scores/scores.jsonl").read_text().splitlines())
    assert scores["prompts"] == 12 and not scores["prompts_failed"] + scores["samples_dropped"]
    # the likeliest answer of all to any problem, and no thought before it
    assert scores["greedy"] == sum(math_match("\\boxed{0}", row) for row in test) / 12 > 0
    for line in (tmp_path / "scores/samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        assert sample["prompt"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert not sample["greedy"] or sample["completion"] == "\\boxed{0}<|im_end|>"
        ending(sample)


def ending(sample: dict) -> str:
    """The token that ended a sample, the only one of its kind in it; "" where it was cut off."""
    ends = [end for end in ("<|im_end|>", "<|endoftext|>") if end in sample["completion"]]
    if sample["truncated"]:
        assert not ends and sample["tokens"] == 96
        return ""
    assert len(ends) == sample["completion"].count(ends[0]) == 1
    assert sample["completion"].endswith(ends[0])
    return ends[0]
