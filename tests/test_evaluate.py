"""evaluate.py: models by data sets without a trainer, scored as a validation scores."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from programs import run_program

import evaluate as evaluate_module
from evaluate import LIKE
from presets import parse_config
from task import task_examples

REPO = Path(__file__).resolve().parent.parent


def evaluate(cwd, *argv):
    return run_program(REPO / "evaluate.py", *argv, cwd=cwd, timeout_s=240)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


GRADED = """
def score(completion, example):
    solved = completion == example["answer"]
    return {"reward": example["worth"] if solved else 0.1, "solved": solved, "form": 0.25}
"""


def test_two_models_by_two_data_sets_are_scored_and_a_tenth_solves_nothing(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    rows = task_examples("reverse", 8, seed=5)
    for name, part, worth in (("a", rows[:5], 1.0), ("b", rows[5:], 0.9)):
        lines = [json.dumps({**row, "worth": worth}) + "\n" for row in part]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "my.py").write_text(GRADED)
    node = f"--vllm-command '{fake_vllm_command}' --dir {tmp_path / 'node'}"
    # as a validation does: by its own reward
    flags = ["--data", "a.jsonl", "hard=b.jsonl", "--samples", 3, "--val-reward", "my.py:score"]
    models = [shutil.copytree(tiny_checkpoint, tmp_path / name) for name in ("m", "n")]
    done = evaluate(tmp_path, *models, *flags, "--rollout-args", node, "--out", "e")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "vLLM is up" in done.stdout and "rollout:" not in done.stdout  # there is no node
    assert "Warning" not in done.stderr + done.stdout
    scores, samples = read(tmp_path / "e/scores.jsonl"), read(tmp_path / "e/samples.jsonl")
    of = [(s["model"], s["data"], s["prompts"]) for s in scores]
    assert of == [(str(m), d, n) for m in models for d, n in (("a.jsonl", 5), ("hard", 3))]
    assert len(samples) == 2 * (8 * 3 + 8) and "hard: avg@3" in done.stdout
    for s in scores:
        mine = [x for x in samples if (x["model"], x["data"]) == (s["model"], s["data"])]
        assert s["reward/form"] == 0.25 and mine[0]["parts"]["form"] == 0.25
        solved = [x["parts"]["solved"] for x in mine if not x["greedy"]]
        assert s["reward/solved"] == pytest.approx(sum(solved) / len(solved))
        drawn = [x["reward"] for x in mine if not x["greedy"]]
        greedy = [x["reward"] for x in mine if x["greedy"]]
        assert s["avg@3"] == pytest.approx(sum(drawn) / len(drawn))
        assert s["greedy"] == pytest.approx(sum(greedy) / len(greedy))
        solved = [max(drawn[i : i + 3]) >= 1 for i in range(0, len(drawn), 3)]
        assert s["pass@3"] == pytest.approx(sum(solved) / len(solved))
    assert scores[0]["pass@3"] > 0 == scores[1]["pass@3"]  # 0.9 is no pass
    again = evaluate(tmp_path, tiny_checkpoint, *flags, "--rollout-args", node, "--out", "e")
    assert again.returncode == 2 and "--out e: it has scores already" in again.stderr + again.stdout


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--data", "none.jsonl"], "none.jsonl': no such file"),
        (["--data", "d.jsonl", "d.jsonl"], "error: --data 'd.jsonl d.jsonl': one or more, each on"),
        (["--data", "x=d.jsonl", "x=e.jsonl"], "error: --data 'x=d.jsonl x=e.jsonl': one or mo"),
        (["--data", "d.jsonl", "--samples", 0], "error: --samples 0: must be at least 1"),
        (["--data", "d.jsonl", "--temperature", -1], "error: --temperature -1.0: must be at least"),
        (
            ["--data", "d.jsonl", "--temperature", 0],
            "error: --samples 8: --temperature 0 is greedy",
        ),
        (["--data", "d.jsonl", "--rewardd", "exact"], "--rewardd"),
        (
            ["--data", "d.jsonl", "--like", "runs/x"],
            "error: --like runs/x: no directory of a run, run",
        ),
    ],
)
def test_what_cannot_work_is_one_line_before_vllm_starts(tmp_path, tiny_checkpoint, argv, says):
    (tmp_path / "d.jsonl").write_text('{"prompt": "ab", "answer": "ba"}\n')
    done = evaluate(tmp_path, tiny_checkpoint, *argv, "--out", "e")
    said = done.stdout + done.stderr
    assert done.returncode == 2 and says in said and "Traceback" not in said, said
    assert "vLLM is up" not in said and not (tmp_path / "e").exists()


def test_a_checkpoint_of_the_trainer_is_no_model_and_says_how_it_becomes_one(tmp_path):
    saved = tmp_path / "step-000015"
    saved.mkdir()
    (saved / "checkpoint.json").write_text("{}")
    done = evaluate(tmp_path, saved, "--data", "d.jsonl")
    assert done.returncode == 2
    assert f"{saved} is a checkpoint of the trainer; export it first: python tools/export.py" in (
        done.stdout + done.stderr
    )


def test_a_model_is_asked_as_in_its_run_and_what_is_given_wins(tmp_path, tiny_checkpoint, capsys):
    (tmp_path / "d.jsonl").write_text('{"q": "ab", "a": "ba", "worth": 1}\n' * 3)
    (tmp_path / "my.py").write_text(GRADED)
    data, reward = str(tmp_path / "d.jsonl"), f"{tmp_path / 'my.py'}:score"
    flags = "--prompt-column q --answer-column a --no-chat-template --max-new-tokens 17 --lr 0.5"
    flags += f" --reward {reward} --prompt-template=--{{problem}}=?"
    ran = parse_config([*flags.split(), "--data", data, "--model", str(tiny_checkpoint)])
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(ran)))
    argv = [str(tiny_checkpoint), "--data", data, "--like", str(tmp_path)]
    ((found,),) = evaluate_module.read(*evaluate_module.parse(argv))
    assert {n: getattr(found.cfg, n) for n in LIKE} == {n: getattr(ran, n) for n in LIKE}
    assert not found.cfg.chat_template and found.cfg.max_new_tokens == 17
    said = capsys.readouterr().out
    assert f"as in {tmp_path}, unless given here: --max-new-tokens 17" in said
    assert "--no-chat-template" in said and "--publish-dtype" not in said  # the preset's
    ((found,),) = evaluate_module.read(
        *evaluate_module.parse([*argv, "--max-new-tokens", "9", "--chat-template"])
    )
    assert found.cfg.max_new_tokens == 9 and found.cfg.chat_template
