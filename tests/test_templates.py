"""data.py: columns in a template, lengths as the model gets them."""

import os
import subprocess
import sys

import pytest
from test_data import CHAT, REPO, USER, prompts, refusal, write
from test_data import checkpoint as checkpoint  # the fixture
from test_hub import hub as hub  # the fixture

import config
import prepare
import task


# ---- templates -----------------------------------------------------------------------------------
def test_columns_are_filled_into_the_template_and_braces_stay(tmp_path, checkpoint):
    row = {"question": "Which?", "choices": ["x {problem}", 2], "level": 3, "answer": "x"}
    path = write(tmp_path / "d.jsonl", [row])
    filled = lambda template: prompts(
        path, checkpoint, prompt_template=template, chat_template=False
    )[0]
    assert filled("{problem} {choices} in \\boxed{}") == "Which? x {problem}\n2 in \\boxed{}"
    # the prompt by its column
    assert filled("L{level}: {question} in \\boxed{}") == "L3: Which? in \\boxed{}"
    assert (
        filled("{prompt} {{answer}} {1} { level } \\frac{{a}}")
        == "Which? {answer} {1} { level } \\frac{a}"
    )
    assert filled("{} {level}") == "Which? 3"
    for template, why in [
        ("{problem} {options}", "{options} is no column of --data"),
        ("{problem} {answer}", "give the answer away"),
        ("{level}", "expected {problem}, or a lone {}, once"),
        ("{} {problem} {question}", "once"),
    ]:
        assert why in refusal(path, checkpoint, prompt_template=template)


@pytest.mark.parametrize("value", [None, {"a": 1}, [["a"]], [], "a\ud83d"])
def test_a_column_without_a_text_for_the_template_is_refused_with_its_row(
    tmp_path, checkpoint, value
):
    rows = [
        {"prompt": "a", "answer": "b", "choices": "c"},
        {"prompt": "a", "answer": "b", "choices": value},
    ]
    said = refusal(
        write(tmp_path / "d.jsonl", rows), checkpoint, prompt_template="{problem} {choices}"
    )
    assert "d.jsonl line 2: 'choices' " in said


def test_chats_are_not_put_into_a_template_and_a_line_says_so(tmp_path, checkpoint, capsys):
    path = write(tmp_path / "d.jsonl", [{"messages": [USER], "answer": "b"}])
    assert prompts(path, checkpoint, prompt_template="x {}") == ["<user>What is 2+2?<assistant>"]
    assert (
        "--prompt-template is for prompts that are text, and 1 are chats" in capsys.readouterr().out
    )


# ---- the limit of length -------------------------------------------------------------------------
def test_prompts_that_a_template_repeats_or_unicode_lengthens_are_measured_as_the_model_gets_them(
    tmp_path, checkpoint
):
    from tokenizers import Tokenizer, normalizers

    def left_out(text):
        path = write(
            tmp_path / "d.jsonl", [{"prompt": text, "answer": "b"}, {"prompt": "a", "answer": "b"}]
        )
        cfg = config.Config(data=(path,), max_total_sequence_length=128)
        return prepare.load_prompts(cfg, checkpoint, prepare.load_examples(cfg))[0].skip

    assert left_out("a" * 60) == set()
    template = CHAT.replace(
        "m.role + '>' + content", "m.role + '>' + content + ' Again: ' + content"
    )
    (checkpoint / "chat_template.jinja").write_text(template)
    assert left_out("a" * 60) == {0} and left_out("a" * 20) == set()
    (checkpoint / "chat_template.jinja").write_text(CHAT)
    path = str(checkpoint / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(path)
    # two letters, of three bytes each
    assert left_out("\u0958" * 20) == {0} and left_out("\u0958" * 5) == set()


# ---- the built-in tasks --------------------------------------------------------------------------
def single_digits(rng):
    a, b = rng.randrange(10), rng.randrange(10)
    return {"prompt": f"{a}+{b}=", "answer": str(a + b)}


HELD_OUT = """
import sys, config, data, prepare, task
from test_templates import single_digits
task.TASKS["add"] = (single_digits, task.TASKS["add"][1])
cfg = config.Config(task="add")
examples = data.Examples(task.task_examples("add", int(sys.argv[1]), 0))
print(len(prepare.load_held_out(cfg, examples)["add"]))
"""


def test_a_task_with_few_prompts_validates_on_what_is_left_or_says_that_nothing_is():
    env = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'tests'}"}
    run = lambda count: subprocess.run(
        [sys.executable, "-c", HELD_OUT, str(count)],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    nothing, few = run(20_000), run(100)
    assert "ValueError: --task add: all of its 100 prompts are trained on" in nothing.stderr
    said, count = few.stdout.splitlines()
    assert 0 < int(count) < 64 and f"all but {count} of its prompts are trained on" in said


def test_an_edited_task_gets_a_warm_start_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(
        task, "warm_start", lambda path, *_: (made.append(path), path.mkdir(parents=True))
    )
    find = lambda: prepare.resolve_model(config.Config(task="add"), 0)
    assert find() == find() and len(made) == 1
    monkeypatch.setitem(task.TASKS, "add", (single_digits, task.TASKS["add"][1]))
    assert find() == made[-1] and len(made) == 2


def test_a_warm_start_that_is_not_reached_or_lacks_a_character_is_one_line(tmp_path, monkeypatch):
    make = lambda rng: {"prompt": f"{rng.randrange(10)}=", "answer": str(rng.randrange(2, 9))}
    monkeypatch.setitem(task.TASKS, "guess", (make, "0123456789="))
    monkeypatch.setattr(task, "MAX_WARM_STEPS", 3, raising=False)
    with pytest.raises(
        ValueError, match=r"--warm-start-accuracy 0.9: --task guess has 0.0. after 3 steps"
    ):
        task.warm_start(tmp_path / "a", "guess", 0, 0.9, lambda line: None)
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(task.TASKS, "guess", (make, "0123456789"))
    with pytest.raises(ValueError, match="has '=', which is not among the task's characters"):
        task.warm_start(tmp_path / "a", "guess", 0, 0.9, lambda line: None)


def test_two_first_runs_at_once_both_get_the_warm_start(tmp_path):
    """The second begins while the first has half of it on disk, and is done before."""
    from model import Qwen3MoE

    path, seen = tmp_path / "tiny", []

    def another(line):
        if not seen:
            seen.append(line)
            task.warm_start(path, "reverse", 0, 0.0, lambda line: None)

    task.warm_start(path, "reverse", 0, 0.0, another)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny"] and seen and Qwen3MoE
    assert (path / "model.safetensors").is_file() and (path / "tokenizer.json").is_file()
