"""task.py: data that is malformed is named by line; an ordinal names one prompt; rewards are what
they say."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import data
import task
from rewards import exact_match

REPO = Path(__file__).resolve().parent.parent


def write(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


GOOD = '{"prompt": "1+1=", "answer": 2}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"answer": "2"}', "line 2: 'prompt' must be a"),
        (
            '{"prompt": "", "answer": "2"}',
            "line 2: 'prompt' must be a text or chat messages, not empty",
        ),
        ('{"prompt": 3, "answer": "2"}', "line 2: 'prompt' must be"),
        ('{"prompt": "a"}', "line 2: 'answer' is missing"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path, line, reason):
    with pytest.raises(ValueError, match=reason):
        data.read_data(write(tmp_path, GOOD, line, GOOD))


def test_good_lines_keep_all_their_fields_and_blank_lines_are_skipped(tmp_path):
    more = {"prompt": "é", "answer": [1, {"a": None}], "level": 3}
    found = data.read_data(write(tmp_path, GOOD, "", json.dumps(more)))
    assert list(found) == [json.loads(GOOD), more]
    chat = {"messages": [{"role": "user", "content": "hi"}], "expected_answer": "x"}
    (row,) = data.read_data(write(tmp_path, json.dumps(chat)))
    assert row == {**chat, "prompt": chat["messages"], "answer": "x"}


def test_an_empty_or_missing_file_is_refused(tmp_path):
    for lines in ([""], ["", " "]):
        with pytest.raises(ValueError, match="holds no example"):
            data.read_data(write(tmp_path, *lines))
    (tmp_path / "data.jsonl").write_text("")
    for path, reason in [
        ("data.jsonl", "holds no example"),
        ("no.jsonl", "no such file"),
        ("no.parquet", "no such"),
    ]:
        with pytest.raises(ValueError, match=reason):
            data.read_data(str(tmp_path / path))


ROWS = [
    {"problem": f"{i}+{i}", "expected_answer": str(2 * i), "generated_solution": "long"}
    for i in range(5)
]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved", "saved splits"])
def test_all_forms_of_a_data_set_give_the_same_examples(tmp_path, monkeypatch, form):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    path, rows = tmp_path / f"d.{form}", datasets.Dataset.from_list(ROWS)
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif form == "parquet":
        rows.to_parquet(str(path))
    else:
        (
            rows if form == "saved" else datasets.DatasetDict(train=rows, test=rows.select([0]))
        ).save_to_disk(path)
    found = data.read_data(str(path))
    assert list(found) == [
        {**row, "prompt": row["problem"], "answer": row["expected_answer"]} for row in ROWS
    ]
    assert (
        data.read_data(str(path), "train", "generated_solution", "problem")[1]["prompt"] == "long"
    )
    with pytest.raises(
        ValueError, match=r"has the columns problem, .*: which is the prompt. --prompt-column text"
    ):
        data.read_data(str(path), "train", "text")
    if form != "saved":
        with pytest.raises(ValueError, match="data-split 'nowhere'"):
            data.read_data(str(path), "nowhere")
    if form == "saved splits":
        assert len(data.read_data(str(path), "test")) == 1


def test_two_columns_that_could_be_the_prompt_have_to_be_told_apart(tmp_path):
    path = write(tmp_path, json.dumps({"prompt": "a", "question": "b", "answer": "c"}))
    with pytest.raises(ValueError, match=r"which is the prompt\? --prompt-column prompt\|question"):
        data.read_data(path)
    assert data.read_data(path, prompt_column="question")[0]["prompt"] == "b"


def test_a_data_set_out_of_reach_is_one_line_that_says_what_would_help(tmp_path):
    """The library's own errors, in a process of its own: it reads HF_HUB_OFFLINE when it is
    imported."""
    code = "import sys, data\ntry: data.read_data(sys.argv[1])\nexcept ValueError as e: print(e)"
    for name, words in [
        (
            "nvidia/OpenMathInstruct-2",
            "ct-2', --data-split 'train': ConnectionError: Couldn't reach 'nvidia/OpenMath",
        ),
        ("openai/gsm8k:main", "Couldn't reach 'openai/gsm8k' on the Hub"),
        ("a/b/c", "Couldn't find any data file"),
    ]:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code, name],
            cwd=REPO,
            env=env,
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        (line,) = done.stdout.strip().splitlines()
        assert words in line and "HF_HUB_OFFLINE is set: only what is in the cache" in line, line


def test_gated_and_missing_repositories_say_what_to_do(monkeypatch):
    """The texts are those of `datasets` 5.2 for such repositories; no hub can be asked here."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    from datasets.exceptions import DatasetNotFoundError

    gated = DatasetNotFoundError(
        "Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated to access it."
    )
    assert str(data.hub_error("--data 'a/b'", gated)).endswith(
        "; accept its terms on the Hub and set HF_TOKEN"
    )
    missing = DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.")
    assert str(data.hub_error("--data 'a/b'", missing)).endswith("; if it is private, set HF_TOKEN")


def test_every_epoch_is_a_permutation_of_its_own_and_any_process_agrees():
    examples = [{"prompt": str(i), "answer": ""} for i in range(50)]
    prompts, again = task.Prompts(examples, seed=3), task.Prompts(examples, seed=3)
    epochs = [[prompts[50 * epoch + i]["prompt"] for i in range(50)] for epoch in range(3)]
    assert all(Counter(epoch) == Counter(str(i) for i in range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert again[149] == prompts[149]  # asked first for the last, it says the same
    assert [task.Prompts(examples, seed=4)[i]["prompt"] for i in range(50)] != epochs[0]


@pytest.mark.parametrize("name", ["reverse", "add"])
def test_a_task_s_answers_are_right_and_its_tokenizer_round_trips(tmp_path, name):
    vocab = task.write_char_tokenizer(tmp_path, task.TASKS[name][1])
    codec = task.Codec(tmp_path)
    for example in task.task_examples(name, 200, seed=0):
        prompt, answer = example["prompt"], example["answer"]
        if name == "reverse":
            assert answer == prompt[:-1][::-1]
        else:
            assert int(answer) == sum(map(int, prompt[:-1].split("+")))
        ids = codec.encode(example)
        assert len(ids) == len(prompt) and codec.decode(ids) == prompt
        completion = codec.decode([vocab[c] for c in answer] + [vocab[task.EOS]])
        assert exact_match(completion, example) == 1.0
        assert exact_match(completion + "x", example) == 0.0


def test_the_tokenizer_opens_in_transformers_and_chats_go_through_its_template(tmp_path):
    from transformers import AutoTokenizer

    task.write_char_tokenizer(tmp_path, "abcdefghijklmnopqrstuvwxyz>")
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    hf = AutoTokenizer.from_pretrained(tmp_path)
    assert hf("abc>").input_ids == task.Codec(tmp_path).encode({"prompt": "abc>"})
    assert hf.eos_token_id == 1 and task.eos_token_ids(tmp_path) == [1]
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% "
        "endif %}"
    )
    chat = {"prompt": [{"role": "user", "content": "abc"}]}
    assert task.Codec(tmp_path).encode(chat) == hf("abc>").input_ids
    # text is a user's message
    assert task.Codec(tmp_path).encode({"prompt": "abc"}) == hf("abc>").input_ids
    assert task.Codec(tmp_path, chat=False).encode({"prompt": "abc"}) == hf("abc").input_ids
    assert task.Codec(tmp_path, template="x{}y").encode({"prompt": "abc"}) == hf("xabcy>").input_ids
    assert (
        task.Codec(tmp_path, "sys", "x{problem}").encode({"prompt": "{}"})
        == hf("sysx{}>").input_ids
    )
    assert task.Codec(tmp_path, "sys").encode(chat) == hf("sysabc>").input_ids
    own = {"prompt": [{"role": "system", "content": "own"}, *chat["prompt"]]}
    assert task.Codec(tmp_path, "sys").encode(own) == hf("ownabc>").input_ids
