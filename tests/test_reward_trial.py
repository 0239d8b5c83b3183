"""A reward is tried on the data before anything starts: what can judge no sample is refused."""

import json
from pathlib import Path

import pytest
from programs import run_program

from prepare import check_rewards, load_examples, load_held_out
from presets import parse_config

REPO = Path(__file__).resolve().parent.parent

MINE = """
import asyncio, time

def column(completion, example):
    return float(completion == example["solution"])

def inner(completion, example):
    return float(example["answer"] == {"a": 1}["b"])

def module(completion, example):
    import nowhere_to_be_found
    return 1.0

def name(completion, example):
    return scoore(completion)

def nothing(completion, example):
    print(completion)

def text(completion, example):
    return "1.0"

def few(completions, example):
    return [1.0]

def picky(completion, example):
    return float(completion.split("=")[1] == example["answer"])

def away(completion, example):
    raise ConnectionError("nobody there")

def slow(completion, example):
    time.sleep(60)

def good(completion, example):
    return {"reward": float(completion == example["answer"]), "length": len(completion)}

async def judge(completions, example):
    return [float(c == example["answer"]) for c in completions]

async def play(sample, example):
    return example["no such thing"]
"""


@pytest.fixture
def files(tmp_path, monkeypatch, tiny_checkpoint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_checkpoint)
    (tmp_path / "mine.py").write_text(MINE)
    rows = [{"prompt": f"say {i}", "answer": str(i), "level": 3} for i in range(3)]
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def flags_for(function, *flags):
    few = ["--model", "model", "--lr", "1e-4", "--max-new-tokens", "8", "--data", "a.jsonl"]
    return [*few, "--reward", f"mine.py:{function}", *flags]


def tried(function, *flags):
    cfg = parse_config(flags_for(function, *flags))
    examples = load_examples(cfg)
    check_rewards(cfg, examples.parts, [*load_held_out(cfg, examples).values()])


@pytest.mark.parametrize(
    "function, says",
    [
        (
            "column",
            "it raised KeyError: 'solution' (mine.py line 5); the row has prompt, answer, level",
        ),
        ("inner", "it raised KeyError: 'b' (mine.py line 8); the row has "),
        ("module", "it raised ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("name", "it raised NameError: name 'scoore' is not defined"),
        ("nothing", "it returned None (NoneType), expected one number"),
        ("text", "it returned '1.0' (str of 3), expected one number"),
        ("few", "it returned [1.0], expected a list of 2 numbers"),
    ],
)
def test_what_can_judge_no_sample_is_refused(files, function, says):
    with pytest.raises(ValueError) as e:
        tried(function)
    known = f"--reward mine.py:{function}: tried on the answer of --data a.jsonl row 0, {says}"
    assert str(e.value).startswith(known) and "\n" not in str(e.value)


def test_what_a_sample_or_a_service_may_cause_is_only_said(files, capsys, monkeypatch):
    monkeypatch.setattr("bridge.reward_pool.TRIAL_S", 0.5)
    for function, says in (
        ("picky", "it raised IndexError: list index out of range (mine.py line"),
        ("away", "it raised ConnectionError: nobody there"),
        ("slow", "wait 'reward': rollout node waits for the reward function"),
    ):
        tried(function)
        said = capsys.readouterr().out
        assert (
            f"warning: --reward mine.py:{function}: tried on the answer of --data a.jsonl" in said
        )
        assert says in said and len(said.splitlines()) == 1
    for function in ("good", "judge", "play"):  # the last makes its samples by a model
        tried(function)
        assert capsys.readouterr().out == ""


def test_each_data_set_is_tried_by_the_reward_that_is_its(files, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"prompt": "x", "solution": "2", "answer": "1"}\n')
    validated = ("--val-data", "b.jsonl", "--val-every-steps", "5")
    tried("good", *validated, "--val-reward", "mine.py:column")
    with pytest.raises(
        ValueError, match=r"^--val-reward mine.py:text: tried .* b.jsonl row 0, it "
    ):
        tried("good", *validated, "--val-reward", "mine.py:text")
    with pytest.raises(ValueError, match=r"^--reward mine.py:column: tried .* a.jsonl row 0, it "):
        tried("column", "--data", "b.jsonl", "a.jsonl")


@pytest.mark.parametrize(
    "program", ["train_cispo.py", "train_cispo.py --dry-run", "evaluate.py model"]
)
def test_the_programs_refuse_it_before_vllm_starts(files, tmp_path, program):
    script, *more = program.split()
    flags = flags_for("column")[2 * (script == "evaluate.py") :]
    done = run_program(REPO / script, *more, *flags, cwd=tmp_path, timeout_s=120)
    said = done.stdout + done.stderr
    assert done.returncode == 2 and said.count("KeyError: 'solution'") == 1, said
    assert "Traceback" not in said and "vLLM is up" not in said
