"""task.py: data that is malformed is named by line; an ordinal names one prompt; rewards are what they say."""

import json
from collections import Counter

import pytest

import task


def write(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


GOOD = '{"prompt": "1+1=", "answer": 2}'


@pytest.mark.parametrize(("line", "reason"), [
    ("{", "line 2: not JSON"), ("[1]", "line 2: expected an object"), ('{"answer": "2"}', "line 2: expected an object"),
    ('{"prompt": "a", "messages": [], "answer": "2"}', "line 2: expected an object with either"),
    ('{"prompt": "", "answer": "2"}', 'line 2: "prompt" must be a non-empty text'),
    ('{"prompt": 3, "answer": "2"}', 'line 2: "prompt" must be'), ('{"prompt": "a"}', 'line 2: "answer" is missing'),
])  # fmt: skip
def test_a_malformed_line_is_named_by_its_number(tmp_path, line, reason):
    with pytest.raises(ValueError, match=reason):
        task.read_examples(write(tmp_path, GOOD, line, GOOD))


def test_good_lines_keep_all_their_fields_and_blank_lines_are_skipped(tmp_path):
    chat = {"messages": [{"role": "user", "content": "hi"}], "answer": "x", "level": 3}
    assert task.read_examples(write(tmp_path, GOOD, "", json.dumps(chat))) == [json.loads(GOOD), chat]


def test_an_empty_or_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no example"):
        task.read_examples(write(tmp_path, ""))
    with pytest.raises(ValueError, match="no such file"):
        task.read_examples(str(tmp_path / "nowhere.jsonl"))


def test_every_epoch_is_a_permutation_of_its_own_and_any_process_agrees():
    examples = [{"prompt": str(i), "answer": ""} for i in range(50)]
    prompts, again = task.Prompts(examples, seed=3), task.Prompts(examples, seed=3)
    epochs = [[prompts[50 * epoch + i]["prompt"] for i in range(50)] for epoch in range(3)]
    assert all(Counter(epoch) == Counter(str(i) for i in range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert again[149] == prompts[149]  # asked first for the last, it says the same
    assert [task.Prompts(examples, seed=4)[i]["prompt"] for i in range(50)] != epochs[0]


def test_own_rewards_are_loaded_and_a_wrong_spec_says_what_is_wrong(tmp_path):
    file = tmp_path / "my.py"
    file.write_text("def length(completion, example):\n    return len(completion) * example['scale']\nother = 3\n")
    assert task.load_reward(f"{file}:length")("abc", {"scale": 2}) == 6
    for spec, reason in [
        (f"{file}:nothing", "has no function"), (f"{file}:other", "has no function"),
        (f"{tmp_path}/no.py:f", "expected FILE.py:FUNCTION"), ("length", "expected FILE.py:FUNCTION"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            task.load_reward(spec)


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
        assert task.exact_match(completion, example) == 1.0
        assert task.exact_match(completion + "x", example) == 0.0


def test_the_tokenizer_opens_in_transformers_and_chats_go_through_its_template(tmp_path):
    from transformers import AutoTokenizer

    task.write_char_tokenizer(tmp_path, "abcdefghijklmnopqrstuvwxyz>")
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    hf = AutoTokenizer.from_pretrained(tmp_path)
    assert hf("abc>").input_ids == task.Codec(tmp_path).encode({"prompt": "abc>"})
    assert hf.eos_token_id == 1 and task.eos_token_ids(tmp_path) == [1]
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    chat = {"messages": [{"role": "user", "content": "abc"}]}
    assert task.Codec(tmp_path).encode(chat) == hf("abc>").input_ids
