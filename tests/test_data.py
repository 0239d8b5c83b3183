"""Data as people have it: chats of other forms, values that JSON lacks, files that change,
templates with columns."""

import csv
import datetime
import decimal
import gzip
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_hub import call, lease
from test_hub import hub as hub  # the fixture

import config
import data
import prepare
import presets
import task

REPO = Path(__file__).resolve().parent.parent


# With the logic of Qwen3's: content that is no text, and roles that it does not know, are passed
# over.
CHAT = """{%- for m in messages %}{%- set content = m.content if m.content is string else '' %}
{%- if m.role in ('system', 'user', 'assistant') %}{{- '<' + m.role + '>' + content }}
{%- elif m.role == 'tool' %}{{- '<result>' + content }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"""


USER = {"role": "user", "content": "What is 2+2?"}


@pytest.fixture
def checkpoint(tmp_path):
    """A tokenizer of single bytes and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path / "checkpoint"
    path.mkdir()
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (path / "chat_template.jinja").write_text(CHAT)
    (path / "config.json").write_text(json.dumps(task.tiny_config("reverse").to_hf(1)))
    return path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(path, checkpoint, **flags):
    """The texts that the model gets, as a run has them."""
    cfg = config.Config(
        data=(str(path),), model=str(checkpoint), max_total_sequence_length=256, **flags
    )
    found, codec, _ = prepare.load_prompts(cfg, checkpoint, prepare.load_examples(cfg))
    return [codec.decode(codec.encode(example)) for example in found.examples]


def refusal(path, checkpoint, **flags):
    with pytest.raises(ValueError) as refused:
        prompts(path, checkpoint, **flags)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ---- the tokenizer -------------------------------------------------------------------------------
@pytest.mark.parametrize("left_on", ["padding", "padding to a multiple", "truncation", "dropout"])
def test_what_a_script_left_on_in_tokenizer_json_changes_no_prompt(checkpoint, left_on):
    from tokenizers import Tokenizer, models

    path = str(checkpoint / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    if left_on == "dropout":
        vocab = {**tokenizer.get_vocab(), "ab": 256}
        tokenizer.model = models.BPE(vocab=vocab, merges=[("a", "b")], dropout=1.0)
        tokenizer.save(path)
        assert task.Codec(checkpoint, chat=False).encode({"prompt": "ab"}) == [256]
        return
    if left_on == "truncation":
        tokenizer.enable_truncation(4)
    else:
        tokenizer.enable_padding(
            **{"length": 40} if left_on == "padding" else {"pad_to_multiple_of": 16}
        )
    tokenizer.save(path)
    assert len(task.Codec(checkpoint).encode({"prompt": "2+2?"})) == len("<user>2+2?<assistant>")


# ---- chats ---------------------------------------------------------------------------------------
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "add", "arguments": {}}}],
}


RESULT = {"role": "tool", "content": "4"}


@pytest.mark.parametrize(
    ("chat", "shown"),
    [
        (
            [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
                {"from": "human", "value": "c"},
            ],
            "<system>s<user>a<assistant>b<user>c<assistant>",
        ),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "a"},
                        {"type": "text", "text": "b", "image": None},
                    ],
                }
            ],
            "<user>ab<assistant>",
        ),
        ([USER, CALL, RESULT], "<user>What is 2+2?<assistant><result>4<assistant>"),
        (
            [{**USER, "from": None, "value": None, "tool_calls": None}],
            "<user>What is 2+2?<assistant>",
        ),
    ],
)
@pytest.mark.parametrize("column", ["prompt", "messages", "conversations"])
def test_chats_of_the_usual_forms_are_read(tmp_path, checkpoint, chat, shown, column):
    path = write(tmp_path / "d.jsonl", [{column: chat, "answer": "x"}])
    assert prompts(path, checkpoint) == [shown]
    if "<system>" not in shown:
        assert prompts(path, checkpoint, system_prompt="be good") == ["<system>be good" + shown]


@pytest.mark.parametrize("system_prompt", ["", "be good"])
@pytest.mark.parametrize(
    ("chat", "why"),
    [
        ([{"role": "user", "content": None}], "whose content is not text: None"),
        ([{"role": "user", "content": " "}], "whose content is not text"),
        ([{"role": "user"}], "not text: None"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "a part that is not text"),
        (["a", "b"], "must be messages with a role and content, not 'a'"),
        ([1, 2], "not 1"),
        ([{"content": "x"}], "role None"),
        ([{"role": "critic", "content": "x"}], "role 'critic'"),
        (
            [USER, {"role": "assistant", "content": None}, USER],
            "a assistant message whose content is not text",
        ),
        ([{"role": "system", "content": "s"}], "must have a user's message"),
        ([{"role": "assistant", "content": "s"}], "must have a user's message"),
        ([{"role": "developer", "content": "be terse"}, USER], None),
        ([{"role": "user", "content": "ab\ud83d"}], "half of a character"),
    ],
)
def test_a_chat_that_would_lose_its_text_is_refused_with_its_row(
    tmp_path, checkpoint, chat, why, system_prompt
):
    path = write(
        tmp_path / "d.jsonl", [{"prompt": [USER], "answer": "4"}, {"prompt": chat, "answer": "4"}]
    )
    said = refusal(path, checkpoint, system_prompt=system_prompt)
    assert "d.jsonl line 2: 'prompt' " in said
    assert (why or "loses its developer message 'be terse' in the chat template") in said


def test_the_answer_at_the_end_of_a_chat_is_not_in_the_prompt(tmp_path, checkpoint, capsys):
    said = {"role": "assistant", "content": "The answer is 4."}
    rows = [
        {"messages": [USER, said], "answer": "4"},
        {"messages": [USER, said, USER], "answer": "4"},
        {"messages": [USER, CALL, RESULT, said, said], "answer": "4"},
    ]
    first, second, third = prompts(write(tmp_path / "d.jsonl", rows), checkpoint)
    assert first == "<user>What is 2+2?<assistant>"
    # an earlier turn stays
    assert second == f"<user>What is 2+2?<assistant>{said['content']}{first}"
    assert third == "<user>What is 2+2?<assistant><result>4<assistant>"
    assert (
        "2 of 3 chats end with the assistant's answer, which is left out of the prompt"
        in capsys.readouterr().out
    )


def test_a_template_that_raises_or_drops_a_message_is_one_line_before_the_model_is_loaded(
    tmp_path, checkpoint
):
    path, template = (
        write(tmp_path / "d.jsonl", [{"prompt": "a", "answer": "b"}]),
        checkpoint / "chat_template.jinja",
    )
    template.write_text("{{ raise_exception('System role not supported') }}")
    assert refusal(path, checkpoint).endswith(
        f"the chat template of {checkpoint}: System role not supported"
    )
    template.write_text("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    assert "loses its system message 'be good'" in refusal(
        path, checkpoint, system_prompt="be good"
    )


def test_a_tokenizer_that_cannot_be_read_is_one_line(tmp_path, checkpoint):
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0"')
    path = write(tmp_path / "d.jsonl", [{"prompt": "a", "answer": "b"}])
    assert f"{checkpoint}: tokenizer.json cannot be read: EOF while" in refusal(path, checkpoint)


def test_a_checkpoint_without_an_end_token_is_refused_before_the_model_is_loaded(
    tmp_path, checkpoint
):
    path = write(tmp_path / "d.jsonl", [{"prompt": "a", "answer": "b"}])
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    assert "neither generation_config.json nor config.json names an eos_token_id" in refusal(
        path, checkpoint
    )


# ---- values --------------------------------------------------------------------------------------
def test_columns_that_json_lacks_reach_the_hub_as_text_and_numbers_or_are_left_out_by_name(
    tmp_path, checkpoint, capsys
):
    import pyarrow as pa
    import pyarrow.parquet as pq

    day, columns = (
        datetime.datetime(2025, 1, 2, 3),
        {
            "at": pa.array([datetime.datetime(2025, 1, 2, 3)]),
            "date": pa.array([datetime.date(2025, 1, 2)]),
            "price": pa.array([decimal.Decimal("1.50")]),
            "took": pa.array([datetime.timedelta(seconds=90)]),
            "tests": pa.array([[["a", None], ["b"]]]),
            "meta": pa.array([{"x": 1, "y": [1.5, float("nan")]}]),
            "picture": pa.array([{"bytes": b"\x89PNG", "path": None}]),
            "blob": pa.array([b"x"]),
        },
    )
    path = str(tmp_path / "d.parquet")
    pq.write_table(
        pa.table({"prompt": ["a"], "answer": pa.array([decimal.Decimal("7")]), **columns}), path
    )
    (row,) = data.read_data(path)
    assert json.loads(json.dumps(row, allow_nan=False)) == {
        "prompt": "a",
        "answer": 7,
        "at": day.isoformat(),
        "date": "2025-01-02",
        "price": 1.5,
        "took": 90.0,
        "tests": [["a", None], ["b"]],
        "meta": {"x": 1, "y": [1.5, None]},
    }
    prompts(path, checkpoint)
    assert (
        "rewards do not get the columns picture, blob, which hold bytes" in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match=r"blob.*which hold bytes"):
        data.read_data(path, answer_column="blob")


def test_values_of_a_forked_data_set_are_checked_when_it_is_read():
    import numpy as np

    good = {"prompt": "a", "answer": np.float32(2), "at": datetime.time(1), "x": np.arange(2)}
    assert data.Examples([good])[0] == {"prompt": "a", "answer": 2.0, "at": "01:00:00", "x": [0, 1]}
    with pytest.raises(ValueError, match="row 1: 'blob' a value of type bytes has no form in JSON"):
        data.Examples([good, {**good, "blob": b"x"}])
    with pytest.raises(ValueError, match="row 0: 'answer' is missing"):
        data.Examples([{**good, "answer": float("nan")}])


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        (" \n", "'prompt' must be a text or chat messages, not empty"),
        (str([USER]), "a chat written as one text"),
        (json.dumps([{"from": "human", "value": "a"}], indent=1), "a chat written as one text"),
    ],
)
def test_a_text_that_is_none_is_refused_with_its_row(tmp_path, checkpoint, prompt, why):
    """As CSV has chats: their list as JSON, or as Python shows it."""
    path = write(
        tmp_path / "d.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": prompt, "answer": "b"}]
    )
    said = refusal(path, checkpoint)
    assert "d.jsonl line 2: 'prompt' " in said and why in said


@pytest.mark.parametrize(
    "row", [{"prompt": "ab\ud83d", "answer": "x"}, {"prompt": "a", "answer": ["x\ud83d"]}]
)
def test_half_a_character_in_a_prompt_or_an_answer_is_refused_with_its_row(tmp_path, row):
    with pytest.raises(
        ValueError, match=r"--val-data .*line 2: '(prompt|answer)' holds half of a character"
    ):
        try:
            prepare.load_held_out(
                config.Config(
                    val_data=(write(tmp_path / "d.jsonl", [{"prompt": "a", "answer": "b"}, row]),)
                ),
                data.Examples([{"prompt": "a", "answer": "b"}]),
            )
        except UnicodeError as e:
            pytest.fail(f"the row is not named: {e}")


def test_what_utf_8_lacks_never_stops_the_writing_of_samples(tmp_path):
    import torch

    import report
    from bridge.groups import Group

    group = Group(
        0,
        [1],
        torch.tensor([1]),
        torch.tensor([2]),
        torch.zeros(1),
        torch.zeros(1, dtype=torch.int32),
        torch.ones(1),
        torch.zeros(1, dtype=torch.uint8),
    )
    report.log_samples([group], 0, {0: {"answer": "x\ud83d é"}}, lambda ids: "ü\ude00", tmp_path)
    sample = json.loads((tmp_path / "samples.jsonl").read_text(encoding="utf-8"))
    assert (sample["answer"], sample["completion"]) == ("x\ud83d é", "ü\ude00")


def test_what_utf_8_lacks_never_stops_a_line_of_the_log(capsys):
    import report
    from bridge import processes

    report.say("a judge said é\ud83d")
    processes.log("a judge said é\ud83d")
    assert capsys.readouterr().out.count("a judge said é\\ud83d\n") == 2


def test_a_prompt_that_cannot_be_sent_is_given_back_and_set_aside_while_others_go_on(hub):
    hub.prompts = [{"prompt": "ab>", "answer": b"bytes" if i == 0 else "ba"} for i in range(100)]
    hub.ledger.max_failures = 2
    held = lease(hub, 2) + lease(hub, 2) + lease(hub, 1)
    status = json.loads(call(hub, "GET", "/status")[1])
    assert len(held) == 3 and status["leased"] == 3 and status["set_aside"] == 1
    assert "bytes is not JSON serializable" in hub.ledger.set_aside[0]


# ---- files ---------------------------------------------------------------------------------------
ROWS = [{"prompt": f'é, "{i}"\nand', "answer": str(i)} for i in range(3)]


@pytest.mark.parametrize(
    "form", ["array.json", "lines.json", "d.csv", "d.jsonl.gz", "d.csv.gz", "array.json.gz"]
)
def test_arrays_csv_and_gzipped_files_are_read(tmp_path, form):
    table = io.StringIO()
    writer = csv.DictWriter(table, ["prompt", "answer"])
    writer.writeheader()
    writer.writerows(ROWS)
    text = table.getvalue() if ".csv" in form else json.dumps(ROWS, indent=1)
    text = (
        text
        if "array" in form or ".csv" in form
        else "".join(json.dumps(row) + "\n" for row in ROWS)
    )
    (tmp_path / form).write_bytes(
        gzip.compress(text.encode()) if form.endswith(".gz") else text.encode()
    )
    found = data.read_data(str(tmp_path / form))
    assert list(found) == ROWS and len(found) == 3
    with pytest.raises(ValueError, match="'no': only Parquet files have splits"):
        data.read_data(str(tmp_path / form), "no")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("d.json", b'[{"prompt": "a"},', "begins with [, and is no JSON array"),
        ("d.json", b"[1]", "row 1: not a JSON"),
        (
            "d.csv",
            b"prompt,answer\na\n",
            "line 2: not CSV (a row has not the 2 columns of the first)",
        ),
        ("d.csv", b"prompt,answer\na,b,c\n", "has not the 2 columns"),
        ("d.csv", b"prompt,prompt\na,b\n", "the same name"),
        ("d.csv", b"", "holds no example"),
        ("d.csv", b"prompt,answer\n\xff,a\n", "not CSV ('utf-8' codec"),
        ("d.jsonl.gz", b"no gzip", "Not a gzipped file"),
        ("d.jsonl.gz", gzip.compress(b"{}\n" * 99, mtime=0)[:-9], "end-of-stream"),
        (
            "d.tsv",
            b"prompt\tanswer\n",
            "the name of a file ends with .jsonl, .json, .csv, .jsonl.gz",
        ),
    ],
)
def test_a_file_that_is_none_of_them_is_one_line_that_says_why(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(why)) as refused:
        data.read_data(str(tmp_path / name))
    assert str(tmp_path / name) in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("d.jsonl", "d.csv.gz", "./saved"):
        with pytest.raises(
            ValueError, match=re.escape(f"no such file (looked for {tmp_path / name})")
        ):
            data.read_data(name)
    with pytest.raises(
        ValueError, match=re.escape(f"no such file (looked for {tmp_path / 'system.txt'})")
    ):
        presets.parse_config(["--system-prompt", "system.txt"])
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "nowhere"))):
        presets.parse_config(["--model", "./nowhere"])


REWRITE = """
import sys, data
rows = data.read_data(sys.argv[1])
before = list(rows)
for path in sys.argv[2:]:
    with open(path, "r+b") as file:
        file.write(b"X" * 50)
assert list(rows) == before, "other rows"
for path in sys.argv[2:]:
    open(path, "w").close()
assert list(rows) == before, "other rows"
"""


@pytest.mark.parametrize("form", ["jsonl", "saved", "parquet"])
def test_a_run_keeps_the_rows_it_started_with_while_the_file_is_rewritten_in_place(tmp_path, form):
    """In a process of its own: to read a mapped file that was shortened is a bus error."""
    import datasets

    path = tmp_path / f"d.{form}"
    rows = datasets.Dataset.from_list(
        [{"prompt": f"{i}", "answer": "a" * 100} for i in range(10_000)]
    )
    if form == "saved":
        rows.save_to_disk(path)
    else:
        rows.to_json(path) if form == "jsonl" else rows.to_parquet(path)
    files = [str(file) for file in ([path] if path.is_file() else path.glob("*.arrow"))]
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", REWRITE, str(path), *files],
        cwd=REPO,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    # the copy has no name
    assert {entry.name for entry in tmp_path.iterdir()} <= {path.name, "home"}
