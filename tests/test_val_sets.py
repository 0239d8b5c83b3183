"""Validation of several data sets, and by a reward of its own: scores, files, screen, curves, and
which of them names the best checkpoint."""

import json

import pytest
from test_checkpoint import refused
from test_resume import finish, start, trained
from test_validation import answer

import data
import presets
import watch
from bridge import side_by_side
from bridge.validation import Round, Validation, log_validation, read_scores, samples, score
from ranks import run_dir
from task import task_examples

SETS = {"a": 2, "b": 1}


def done():
    """Two prompts of `a`, of which one has failed, and one of `b`."""
    groups = {0: answer(0, 3, [1.0, 0.0]), 2: answer(2, 4, [0.5, 0.5])}
    return Round(3, [], 0.0, groups=groups, failed={1: "why"}, repeated=1)


def test_the_first_set_has_the_plain_names_and_the_others_their_own():
    found = score(done(), 2, sets=SETS)
    alone = score(Round(3, [], 0.0, groups={0: answer(0, 3, [1.0, 0.0])}, failed={1: "why"}), 2)
    plain = {name: x for name, x in found.items() if "/b/" not in name}
    assert plain == {**alone, "versions": [3, 4], "validation/leases_repeated": 1}
    own = {name.removeprefix("validation/b/"): x for name, x in found.items() if "/b/" in name}
    assert (own["avg@2"], own["pass@2"], own["prompts"], own["prompts_failed"]) == (0.5, 0.0, 1, 0)
    assert next(name for name in found if "@" in name) == "validation/avg@2"
    one = score(done(), 2, sets={"any": 3})
    assert one == score(done(), 2) and one["validation/avg@2"] == pytest.approx(2 / 6)


def test_every_sample_says_of_which_set_it_is_where_there_are_several():
    examples = [{"answer": x} for x in "xyz"]
    assert [s["data"] for s in samples(done(), examples, str, SETS)] == ["a", "a", "b", "b"]
    assert "data" not in samples(done(), examples, str, {"a": 3})[0]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["v/aime-24.jsonl.gz", "openai/gsm8k:main"], ["aime-24", "gsm8k"]),
        (["x=v/test.parquet", "y=w/test.parquet"], ["x", "y"]),
        (["my set.v2.csv"], ["my-set-v2"]),
    ],
)
def test_a_set_is_called_after_its_file_or_as_it_is_told(given, names):
    found = data.named(tuple(given))
    assert list(found) == names
    assert list(found.values()) == [text.rpartition("=")[2] for text in given]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["v/test.parquet", "w/test.parquet"], "'test' is the name of two data sets; give another"),
        (["a.jsonl", "reward.jsonl"], "'reward' is the name of a metric"),
    ],
)
def test_two_sets_of_one_name_are_refused_before_a_file_is_read(given, why):
    with pytest.raises(ValueError, match=f"--val-data .*{why}"):
        presets.parse_config(["--val-data", *given])


def test_a_reward_of_validation_that_is_not_there_is_named_by_its_flag():
    with pytest.raises(ValueError, match=r"--val-reward 'none\.py:f': expected exact"):
        presets.parse_config(["--val-reward", "none.py:f"])


def test_scores_of_another_reward_of_validation_are_not_compared():
    saved = {"config": {"reward": "exact", "val_data": "a.jsonl"}, "origin": {"val_data": "d"}}
    same = ["val_data_split", "val_temperature", "overlong_buffer_tokens", "overlong_penalty"]
    cfg = presets.parse_config(["--val-data", "a.jsonl"])
    saved["config"] |= {name: getattr(cfg, name) for name in same}
    assert run_dir.scores_as_before(cfg, {"val_data": "d"}, saved)  # of a run before the flag
    cfg = presets.parse_config(["--val-data", "a.jsonl", "--val-reward", "math"])
    assert not run_dir.scores_as_before(cfg, {"val_data": "d", "val_reward": ""}, saved)


def test_the_console_has_a_line_for_each_set_and_the_curves_all_of_them(tmp_path, capsys):
    books = Validation([{"answer": x} for x in "xyz"], 2, sets=SETS)
    for version in (3, 6):
        found = done()
        found.version = version
        log_validation(found, books, str, tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert "validation of v3, a: avg@2 0.250, pass@2 0.500 on 2 prompts" in said[0]
    assert ", 1 prompts failed, 2 samples dropped, 1 leases repeated" in said[0]
    assert "validation of v3, b: avg@2 0.500, pass@2 0.000 on 1 prompts" in said[1]
    assert read_scores(tmp_path, 2) == {3: 0.25, 6: 0.25}  # the first names the best
    assert side_by_side.scores_of(tmp_path) == [(3, 0.25), (6, 0.25)]


# ---- a whole run on the fake vLLM ----------------------------------------------------------------
REWARDS = """
def train(completion, example):
    return 0.01 * len(completion)

def judge(completion, example):
    return {"reward": 1.0 if example["answer"] == example["prompt"][4::-1] else 0.25, "form": 0.5}
"""


def test_a_run_with_two_files_two_validations_and_a_reward_of_theirs(
    tmp_path, tiny_checkpoint, fake_vllm_command
):
    """Training by one function on a mix; a right-answer set that scores 1 and a wrong one that
    scores 0.25 by the other. The mix is another: refused. The same: each prompt is trained once."""
    rows = task_examples("reverse", 40, seed=7)
    wrong = [{**row, "answer": "x"} for row in rows]
    for name, part in {
        "a": rows[:20],
        "b": rows[20:],
        "right": rows[:6],
        "wrong": wrong[:3],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "my.py").write_text(REWARDS)
    flags = ["--val-data", "wrong.jsonl", "good=right.jsonl", "--val-reward", "my.py:judge"]
    flags += ["--reward", "my.py:train", "--val-every-steps", "2", "--val-samples", "2"]
    flags += ["--checkpoint-every-steps", "2"]
    mix = ["--data", "a.jsonl:3", "b.jsonl:1"]
    finish(start(tmp_path, tiny_checkpoint, fake_vllm_command, 2, *mix, *flags), tmp_path)
    other = ["--data", "a.jsonl:1", "b.jsonl:1", "--num-prompts-per-step", "8"]
    said = refused(tmp_path, tiny_checkpoint, *other, *flags, "--resume", "auto")
    assert "in another order or mix: the sequence of prompts would be another" in said
    flags += ["--resume", "auto"]
    finish(start(tmp_path, tiny_checkpoint, fake_vllm_command, 4, *mix, *flags), tmp_path)
    assert sorted(i for step in trained(tmp_path) for i in step) == list(range(32))

    run, out = tmp_path / "runs/tiny", (tmp_path / "out").read_text()
    assert "resumes with --max-num-steps 4, was 2" in out and "resumes with --data" not in out
    records = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert [r["version"] for r in records] == [0, 2, 4]
    for r in records:
        assert (r["validation/avg@2"], r["validation/prompts"]) == (0.25, 3)
        assert (r["validation/good/avg@2"], r["validation/good/prompts"]) == (1.0, 6)
        assert r["validation/reward/form"] == r["validation/good/reward/form"] == 0.5
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < r["train/reward"] < 0.1 for r in metrics)  # by the other function
    assert "(score 0.250)" in out and "validation of v4, good: avg@2 1.000" in out
    assert (run / "code/reward/my.py").exists() and (run / "code/reward-of-validation").is_dir()
    screen = watch.frame(run)
    assert "validation avg@2, v4" in screen and "validation good/avg@2, v4" in screen
    assert watch.plot(run).stat().st_size > 1000
