"""examples/: a tool and a judge, as a rollout node runs them, and chats of several turns through a
template that thinks."""

import asyncio
import json

import pytest
from aiohttp import web
from test_data import checkpoint as checkpoint  # the fixture: single bytes and a chat template
from test_episodes import played

from bridge import episodes
from bridge.processes import REPO
from bridge.reward_pool import RewardWorkers
from bridge.sample import Sample
from task import Codec

# In the form of Qwen3's: thinking of earlier turns is dropped when a chat is rendered again, and a
# tool speaks as a user.
THINKS = """
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|im_start|>assistant\\n' + m.content.split('</think>')[-1] + '<|im_end|>\\n' }}
{%- elif m.role == 'tool' -%}
{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif m.role in ('user', 'system') -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- else -%}{{ raise_exception('unknown role ' + m.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

NO_ANSWERS = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}"


@pytest.fixture
def thinker(checkpoint):
    """A checkpoint's tokenizer with Qwen3's marks as single tokens."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.add_special_tokens(
        [AddedToken(f"<|im_{x}|>", special=True) for x in ("start", "end")]
    )
    tokenizer.add_tokens([AddedToken(f"<{x}think>", normalized=False) for x in ("", "/")])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    (checkpoint / "chat_template.jinja").write_text(THINKS)
    return checkpoint


class Writer:
    """A policy that writes these turns, and remembers what it was asked to go on with."""

    def __init__(self, codec, *turns, ends=True):
        self.codec, self.turns, self.ends, self.contexts = codec, list(turns), ends, []

    async def __call__(self, context, sampling):
        self.contexts.append(list(context))
        ids = self.codec.ids(self.turns.pop(0) + ("<|im_end|>" if self.ends else ""))
        return {
            "token_ids": ids,
            "finish_reason": "stop",
            "logprobs": {"content": [{"logprob": -0.1}] * len(ids)},
            "weight_versions": [{"version": "0", "start": 0, "end": len(ids)}],
        }


def play(checkpoint, spec, writer, example, prompt):
    """An episode of the chat, in a process of its own."""

    async def run():
        workers = RewardWorkers(spec, 1, 10.0)
        players = episodes.Players(workers)
        players.codec = writer.codec
        sample = Sample(writer.codec.encode({"prompt": prompt}), {}, 4000, writer)
        try:
            await workers.start()
            return await players.play(sample, sample, example), sample, workers.failed
        finally:
            await workers.close()

    return asyncio.run(run())


def call(expression) -> str:
    words = json.dumps({"name": "calculate", "arguments": {"expression": expression}})
    return f"<think>hm</think><tool_call>\n{words}\n</tool_call>"


def test_the_calculator_answers_calls_and_tells_what_is_wrong_with_one(thinker):
    codec = Codec(thinker)
    calls = [call("(3 + 4) * 2"), call("9 ** 9"), call("1 / 0"), "<tool_call>{</tool_call>"]
    writer = Writer(codec, *calls, "It is 14")
    spec = f"{REPO}/examples/calculator.py:play"
    reward, sample, failed = play(thinker, spec, writer, {"answer": "14"}, "(3 + 4) * 2?")
    assert reward == 1.0 and not failed and sample.turns == 5
    text = codec.decode(sample.token_ids, special=True)
    assert "<|im_end|>\n<|im_start|>user\n<tool_response>\n14\n</tool_response><|im_end|>\n" in text
    assert "error: KeyError" in text and "error: ZeroDivisionError" in text
    assert "error: JSONDecodeError" in text and text.endswith("It is 14<|im_end|>")
    wrong = Writer(codec, "It is 15")
    assert play(thinker, spec, wrong, {"answer": "14"}, "(3 + 4) * 2?")[0] == 0.0


@pytest.mark.parametrize("ends", [True, False], ids=["ends itself", "is cut off"])
def test_over_four_turns_the_trained_context_is_the_sampled_one_id_by_id(thinker, ends, tmp_path):
    """Nothing is rendered again: thoughts of earlier turns stay, and <|im_end|> is there once."""
    source = """
async def play(sample, example):
    await sample()
    for text in ("more?", "and?"):
        await sample(user=text)
    await sample(tool="42")
    return 1.0
"""
    (tmp_path / "env.py").write_text(source)
    codec = Codec(thinker, system_prompt="Be brief.")
    turns = [f"<think>thought {i}</think>said {i}" for i in range(4)]
    writer = Writer(codec, *turns, ends=ends)
    _, sample, _ = play(thinker, f"{tmp_path}/env.py:play", writer, {}, "well?")
    whole = [*sample.prompt_ids, *sample.token_ids]
    for i, context in enumerate(writer.contexts):
        assert whole[: len(context)] == context  # what the trainer reads is what vLLM read
        went_on = codec.ids(turns[i] + ("<|im_end|>" if ends else ""))
        assert whole[len(context) : len(context) + len(went_on)] == went_on
    text = codec.decode(whole, special=True)
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nwell?<|im_end|>\n"
    said = ["more?", "and?", "<tool_response>\n42\n</tool_response>", None]
    for turn, answer in zip(turns, said):
        expected += f"<|im_start|>assistant\n{turn}<|im_end|>\n"
        expected += f"<|im_start|>user\n{answer}<|im_end|>\n" if answer else ""
    assert text == expected.removesuffix("\n" if ends else "<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "role", "said"),
    [
        (THINKS.replace("'tool'", "'robot'"), "tool", "unknown role tool"),
        (NO_ANSWERS, "user", "loses the assistant's message"),
        ("{% for m in messages %}{{ m.content[:1] }}{% endfor %}", "tool", "loses the tool's"),
    ],
)
def test_a_template_that_cannot_be_cut_between_turns_is_refused(thinker, template, role, said):
    (thinker / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError) as refused:
        Codec(thinker).between(role, "hello")
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_judge_that_is_slow_and_fails_is_asked_again_until_it_answers(monkeypatch):
    asked = []

    async def answer(request):
        asked.append(await request.json())
        await asyncio.sleep(0.2)  # slow: what the test is about
        if len(asked) <= 2:
            raise web.HTTPServiceUnavailable
        return web.json_response({"scores": [len(text) for text in asked[-1]["answers"]]})

    async def run():
        app = web.Application()
        app.router.add_post("/rank", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{runner.addresses[0][1]}/rank")
        workers = RewardWorkers(f"{REPO}/examples/judge.py:rank", 1, 10.0)
        try:
            await workers.start()
            return await workers.score(["aaa", "a", "aa"], {"prompt": "?"}), dict(workers.failed)
        finally:
            await workers.close()
            await runner.cleanup()

    assert asyncio.run(run()) == ([1.0, 0.0, 0.5], {"away": 6})
    assert len(asked) == 3 and asked[0] == {"question": "?", "answers": ["aaa", "a", "aa"]}


def test_roles_that_a_function_asks_for_are_known_before_the_run(thinker, tmp_path):
    """prepare.load_prompts refuses a template that lacks one of them."""
    from bridge.reward_pool import roles_asked_for

    text = (REPO / "examples/calculator.py").read_bytes()
    assert roles_asked_for({"x": text}, "play") == {"tool"}
    assert (
        roles_asked_for({"x": b"def play():\n    other(tool=1)\n    sample('a')"}, "play") == set()
    )


def test_roles_are_those_of_the_function_that_is_named_and_of_what_it_calls():
    from bridge.reward_pool import roles_asked_for

    file = b"""
import games
async def talk(sample):
    await sample(user="well?")
class Chess:
    async def __call__(self, sample, example):
        await talk(sample)
chess = Chess()
async def go(sample, example):
    await games.begin(sample)
    await sample("a")
"""
    sources = {"a.py": file, "games.py": b"async def begin(sample):\n    await sample(tool='b')\n"}
    assert roles_asked_for(sources, "chess") == {"user"}
    assert roles_asked_for(sources, "go") == {"tool"}
    assert roles_asked_for(sources, "Chess") == {"user"}


def test_text_alone_is_put_in_as_it_is(tmp_path, tiny_checkpoint):
    source = (
        "async def play(sample, example):\n    await sample()\n    await sample('ab')\n    return 1"
    )
    (result,), (sample,), _ = played(tmp_path, tiny_checkpoint, source, [{}])
    assert result == 1.0 and sample.token_ids[3:5] == [2, 3]
