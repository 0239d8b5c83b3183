"""Data of several files, mixed by weight; columns within columns; variables of a chat template."""

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_data import CHAT, USER, prompts, refusal, write
from test_data import checkpoint as checkpoint  # the fixture

import data
import prepare
import presets
import task
from bridge.flags import parse_flags
from config import Config, RolloutConfig
from ranks import run_dir
from ranks.checkpoint import CheckpointError
from rollout import Node


def rows_of(name, count):
    return [{"prompt": f"{name}{i}", "answer": name} for i in range(count)]


@pytest.fixture
def files(tmp_path):
    """Two data sets, of 3 and of 7 rows."""
    counts = {"a": 3, "b": 7}
    return [write(tmp_path / f"{name}.jsonl", rows_of(name, n)) for name, n in counts.items()]


def examples_of(*given):
    return prepare.load_examples(
        presets.parse_config(["--model", "m/m", "--dry-run", "--data", *given])
    )


# ---- several files -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["a:0.7", "b:0.3"], (["a", "b"], [700, 300])),
        (["a:7", "b.jsonl:3."], (["a", "b.jsonl"], [700, 300])),
        (["o/a:main:1", "b:1", "c:1"], (["o/a:main", "b", "c"], [334, 333, 333])),
        (["a", "b:main"], (["a", "b:main"], [])),
        (["o/years:2024"], (["o/years:2024"], [])),  # alone it needs no weight
    ],
)
def test_weights_are_read_and_become_whole_prompts_of_a_block(given, found):
    assert data.mix_of(tuple(given)) == found


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["a:0.7", "b"], "--data b: has no weight, and others have; all or none, as b:1"),
        (["a:1", "b:1", "a:2"], "--data a: is named twice"),
        (["a", "a"], "--data a: is named twice"),
        (["a:1", "b:0"], "--data b:0: a weight of 0 is below 1/1000 of all"),
        (["a:-1", "b:2"], "--data a:-1: a weight of -1 is below 1/1000 of all"),
        (["a:5000", "b:1"], "--data b:1: a weight of 1 is below 1/1000 of all"),
    ],
)
def test_a_mix_that_means_nothing_is_one_line_before_a_file_is_read(given, why):
    with pytest.raises(ValueError) as refused:
        presets.parse_config(["--model", "m/m", "--dry-run", "--data", *given])
    assert str(refused.value).startswith(why)


def test_a_mix_has_its_weights_in_every_block_and_each_file_its_own_epochs(files):
    a, b = files
    examples = examples_of(f"{a}:1", f"{b}:3")
    mixed = task.Prompts(examples, seed=5)
    order = [mixed.row(i) for i in range(3000)]
    for start in (0, 1000, 2000):
        assert sum(row < 3 for row in order[start : start + 1000]) == 250
    of_a, of_b = [r for r in order if r < 3], [r for r in order if r >= 3]
    for rows, size in ((of_a, 3), (of_b, 7)):
        whole = len(rows) // size * size
        epochs = np.array(rows[:whole]).reshape(-1, size)
        assert (np.sort(epochs) == np.sort(epochs[0])).all()  # no prompt twice in an epoch
        assert len({tuple(epoch) for epoch in epochs}) > 1
    assert {mixed[i]["answer"] for i in range(50)} == {"a", "b"}
    # the place alone decides, whatever was asked for before
    places = np.random.RandomState(0).permutation(3000).tolist()
    again = task.Prompts(examples, seed=5)
    assert [again.row(i) for i in places] == [order[i] for i in places]
    assert [task.Prompts(examples, seed=6).row(i) for i in range(3000)] != order


def test_files_without_weights_are_one_data_set_of_all_their_rows(files):
    mixed = task.Prompts(examples_of(*files), seed=5)
    for epoch in range(3):
        assert sorted(mixed.row(10 * epoch + i) for i in range(10)) == list(range(10))
    found = sorted(mixed[i]["prompt"] for i in range(10))
    assert found == [row["prompt"] for row in rows_of("a", 3) + rows_of("b", 7)]


def test_each_data_set_of_several_has_its_own_reward_and_share(files, tmp_path):
    mixed = task.Prompts(examples_of(f"{files[0]}:1", f"{files[1]}:3"), seed=5)
    worth = {"a": [1.0, 0.5, 0.0], "b": [0.25, 0.0]}  # groups of unequal size
    of = {mixed[i]["answer"]: i for i in range(20)}
    groups = [
        SimpleNamespace(ordinal=of[name], rewards=torch.tensor(worth[name])) for name in "aab"
    ]
    assert mixed.by_data_set(groups) == {
        "train/reward/data/a.jsonl": 0.5,
        "train/share/data/a.jsonl": 0.75,
        "train/reward/data/b.jsonl": 0.125,
        "train/share/data/b.jsonl": 0.25,
    }
    alone = mixed.by_data_set(groups[:1])
    assert alone["train/share/data/b.jsonl"] == 0 and "train/reward/data/b.jsonl" not in alone
    # two of one name are called by their paths
    (tmp_path / "x").mkdir()
    other = write(tmp_path / "x/a.jsonl", rows_of("c", 3))
    assert task.Several(examples_of(files[0], other).parts, []).names() == [files[0], other]
    assert task.Prompts(examples_of(files[0]), seed=5).by_data_set(groups[:1]) == {}


def test_one_file_keeps_the_order_that_older_checkpoints_have(files):
    one = task.Prompts(examples_of(files[1]), seed=5)
    for epoch in range(3):
        order = np.random.RandomState([5, epoch]).permutation(7).tolist()
        assert [one.row(7 * epoch + i) for i in range(7)] == order


def test_another_mix_of_the_same_rows_is_refused_on_resume(files):
    a, b = files
    digest = lambda *given: examples_of(*given).digest()
    made_with = digest(f"{a}:0.7", f"{b}:0.3")
    assert digest(f"{a}:7", f"{b}:3") == made_with
    others = [(f"{a}:0.6", f"{b}:0.4"), (f"{b}:0.7", f"{a}:0.3"), (a, b), (f"{b}:0.3", f"{a}:0.7")]
    cfg = Config(data=(f"{a}:0.6", f"{b}:0.4"))
    saved = {"config": {"seed": 0, "num_prompts_per_step": 16, "model": ""}}
    saved["origin"] = {"data": made_with, "model": "m"}
    run_dir.check_origin("there", saved, cfg, {"data": made_with, "model": "m"})
    for other in others:
        with pytest.raises(CheckpointError, match="in another order or mix: the sequence of promp"):
            run_dir.check_origin("there", saved, cfg, {"data": digest(*other), "model": "m"})


def test_a_flag_that_has_become_a_list_is_compared_with_what_older_runs_wrote():
    assert run_dir.listed("a.jsonl") == run_dir.listed(("a.jsonl",)) == ["a.jsonl"]
    assert run_dir.listed("") == run_dir.listed(()) == run_dir.listed(None) == []
    assert run_dir.listed(("a", "b")) != run_dir.listed("a") and run_dir.listed(0.5) == 0.5
    assert run_dir.shown(["a", "b"]) == "'a' 'b'" and run_dir.shown(()) == "''"


def test_long_prompts_of_the_second_file_are_left_out_and_a_file_of_them_is_refused(
    tmp_path, files, checkpoint, capsys
):
    long = [*rows_of("b", 2), {"prompt": "x" * 300, "answer": "b"}]
    cfg = Config(data=(files[0], write(tmp_path / "c.jsonl", long)), max_total_sequence_length=256)
    found, *_ = prepare.load_prompts(cfg, checkpoint, prepare.load_examples(cfg))
    assert found.skip == {5}  # behind the three of the first
    assert f"1 of 3 prompts of --data {tmp_path}/c.jsonl are left" in capsys.readouterr().out
    cfg = Config(data=(files[0], write(tmp_path / "c.jsonl", long[2:])))
    with pytest.raises(ValueError, match=r"no prompt of --data .*c\.jsonl can be used: all 1 have"):
        prepare.load_prompts(cfg, checkpoint, prepare.load_examples(cfg))


def test_a_split_is_of_those_of_several_that_have_some(tmp_path, files):
    import datasets

    path = str(tmp_path / "p.parquet")
    datasets.Dataset.from_list(rows_of("p", 9)).to_parquet(path)
    found = examples_of(files[0], path, "--data-split", "train[:2]")
    assert [len(part) for part in found.parts] == [3, 2]
    with pytest.raises(ValueError, match="only Parquet files have splits"):
        examples_of(*files, "--data-split", "train[:2]")


# ---- columns within columns ----------------------------------------------------------------------
VERL = [
    {"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": str(i)}, "x": {"y": None}}
    for i in range(2)
]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_a_column_within_a_column_is_the_answer(tmp_path, form):
    path = tmp_path / f"d.{form}"
    if form == "parquet":
        import datasets

        datasets.Dataset.from_list(VERL).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, VERL)) if form == "jsonl" else json.dumps(VERL))
    found = data.read_data(str(path), answer_column="reward_model.ground_truth")
    assert [row["answer"] for row in found] == ["0", "1"] and found[0]["prompt"] == [USER]
    assert found[0]["reward_model"] == VERL[0]["reward_model"]  # rewards get the whole row
    with pytest.raises(ValueError, match=r"which is the answer.*--answer-column") as refused:
        data.read_data(str(path))
    assert "reward_model.style, reward_model.ground_truth" in str(refused.value)
    with pytest.raises(ValueError, match=r"--answer-column reward_model\.truth is none of them$"):
        data.read_data(str(path), answer_column="reward_model.truth")


def test_columns_of_any_depth_are_named_and_a_reward_without_an_answer_told_what_to_do(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": "a", "world": {"gold": {"count": "2"}, "seed": 1}}))
    for column, advice in (("", "name any column"), ("world.gold.cnt", "none of them")):
        with pytest.raises(ValueError, match=rf"world\.seed, world\.gold\.count: .*{advice}$"):
            data.read_data(str(path), answer_column=column)
    assert data.read_data(str(path), answer_column="world.gold.count")[0]["answer"] == "2"


def test_a_column_within_text_is_refused_and_says_that_it_is_text(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('prompt,meta\na,"{""gold"": ""b""}"\n')
    why = r"--answer-column meta\.gold is none of them: meta is text, which has nothing in it"
    with pytest.raises(ValueError, match=why):
        data.read_data(str(path), answer_column="meta.gold")


def test_a_prompt_within_a_column_goes_through_template_and_lengths(tmp_path, checkpoint):
    rows = [{"task": {"text": t}, "note": "n", "answer": "b"} for t in ("a", "x" * 300)]
    path = write(tmp_path / "d.jsonl", rows[:1])
    flags = {"prompt_column": "task.text", "prompt_template": "{note}: {problem}"}
    assert prompts(path, checkpoint, **flags) == ["<user>n: a<assistant>"]
    cfg = Config(data=(write(tmp_path / "d.jsonl", rows),), max_total_sequence_length=256, **flags)
    assert prepare.load_prompts(cfg, checkpoint, prepare.load_examples(cfg))[0].skip == {1}


def test_a_name_with_a_dot_is_a_column_first(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "a", "x.y": "1", "x": {"y": "2"}}])
    assert data.read_data(path, answer_column="x.y")[0]["answer"] == "1"


@pytest.mark.parametrize("second", [{"reward_model": {}}, {"reward_model": "4"}, {}])
def test_a_row_without_it_is_named_with_file_line_and_column(tmp_path, second):
    path = write(tmp_path / "d.jsonl", [VERL[0], {"prompt": [USER], **second}])
    with pytest.raises(ValueError) as refused:
        data.read_data(path, answer_column="reward_model.ground_truth")
    assert str(refused.value) == f"--data {path} line 2: 'reward_model.ground_truth' is missing"


# ---- variables of the chat template --------------------------------------------------------------
THINKS = CHAT.removesuffix("{%- endif %}") + (
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think></think>' }}"
    "{%- endif %}{%- endif %}"
)


def test_variables_of_the_chat_template_reach_every_prompt(tmp_path, checkpoint):
    (checkpoint / "chat_template.jinja").write_text(THINKS)
    path = write(tmp_path / "d.jsonl", [{"prompt": "a", "answer": "b"}])
    chat = write(tmp_path / "e.jsonl", [{"prompt": [USER], "answer": "b"}])
    off = {"chat_template_kwargs": '{"enable_thinking": false}'}
    assert prompts(path, checkpoint) == ["<user>a<assistant>"]
    assert prompts(path, checkpoint, **off) == ["<user>a<assistant><think></think>"]
    assert prompts(chat, checkpoint, **off)[0].endswith("?<assistant><think></think>")
    cfg = Config(data=(path,), val_data=(chat,), max_total_sequence_length=256, **off)
    examples = prepare.load_examples(cfg)
    loaded = prepare.load_prompts(cfg, checkpoint, examples, prepare.load_held_out(cfg, examples))
    _, codec, held_out = loaded
    assert codec.decode(codec.encode(held_out["e"][0])).endswith("<think></think>")
    # the rollout node renders what stands between the turns of an episode
    run = prepare.run_for_nodes(cfg, checkpoint, loaded, prepare.torch.float32)
    assert codec.between("user", "c") == "<user>c<assistant><think></think>"
    assert between_of_a_node(run, checkpoint, tmp_path) == codec.between("user", "c")


def test_tools_are_a_variable_of_the_chat_template(tmp_path, checkpoint):
    shown = "{% for tool in tools %}<tool>{{ tool.function.name }}{% endfor %}" + THINKS
    (checkpoint / "chat_template.jinja").write_text(shown)
    path = write(tmp_path / "d.jsonl", [{"prompt": "a", "answer": "b"}])
    tools = [{"type": "function", "function": {"name": "stock"}}]
    found = prompts(path, checkpoint, chat_template_kwargs=json.dumps({"tools": tools}))
    assert found == ["<tool>stock<user>a<assistant>"]


def between_of_a_node(run, checkpoint, tmp_path):
    class Enough(Exception):
        pass

    async def ask(*args, **kwargs):
        raise Enough  # it has its tokenizer by now

    async def started():
        pass

    async def answer():
        node = Node(parse_flags(RolloutConfig, ["http://h:1", "--dir", str(tmp_path / "n")]), None)
        node.serve(run)
        node.run, node.checkpoint, node.ask = run, checkpoint, ask
        node.players.workers.start = started
        node.ready.set()
        try:
            await node.answer_prompts()
        except Enough:
            return node.players.codec.between("user", "c")
        finally:
            await node.players.workers.close()

    return asyncio.run(answer())


@pytest.mark.parametrize("given", ["enable_thinking", "[1]", '{"tokenize": true}'])
def test_variables_that_are_none_are_one_line(given):
    with pytest.raises(ValueError) as refused:
        presets.parse_config([f"--chat-template-kwargs={given}"])
    assert str(refused.value) == (
        f"--chat-template-kwargs {given!r}: expected a JSON object, as "
        '{"enable_thinking": false}, without add_generation_prompt, messages, tokenize'
    )


def test_a_variable_that_the_template_would_pass_over_is_refused(tmp_path, checkpoint):
    (checkpoint / "chat_template.jinja").write_text(THINKS)
    path = write(tmp_path / "d.jsonl", [{"prompt": "a", "answer": "b"}])
    said = refusal(path, checkpoint, chat_template_kwargs='{"enable_thinkin": false}')
    assert said == (
        f"--chat-template-kwargs: the chat template of {checkpoint} has no 'enable_thinkin'"
    )
    off = {"chat_template_kwargs": '{"enable_thinking": false}', "chat_template": False}
    assert "has no chat template, or it is switched off" in refusal(path, checkpoint, **off)
