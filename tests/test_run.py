"""Whole training runs as a user starts them, against a real vLLM. Each takes a minute or two
(`--slow`)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from model import ModelConfig, Qwen3MoE
from tools.export import check

REPO = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
TRAIN = [sys.executable, str(REPO / "train_cispo.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


class Run:
    """A run in a directory of its own; what it prints goes to DIR/out. Leaving the context ends
    it."""

    def __init__(self, cwd, command, out="out", **env):
        self.cwd, self.path = cwd, cwd / out
        env = {**os.environ, **env}
        with open(self.path, "w") as out:
            self.process = subprocess.Popen(
                command, cwd=cwd, stdout=out, stderr=out, start_new_session=True, env=env
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def out(self):
        return self.path.read_text()

    def wait_for(self, text, timeout_s=180):
        deadline = time.monotonic() + timeout_s
        while text not in self.out:
            assert time.monotonic() < deadline and self.process.poll() is None, (
                f"no {text!r}:\n{self.out[-3000:]}"
            )
            time.sleep(0.2)  # polling a file that another program writes

    def finish(self, timeout_s=420):
        """Wait for a good end, check every step, return the records."""
        status = self.process.wait(timeout_s)
        assert status == 0, self.out[-3000:]
        assert (
            self.cwd / "runs/tiny/curves.png"
        ).stat().st_size > 10_000 and "curves: runs/tiny" in self.out
        lines = (self.cwd / "runs/tiny/metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [r["step"] for r in records] == list(range(len(records)))
        for r in records:
            hub = r["hub"]
            states = ("taken", "buffered", "leased", "returned", "set_aside", "skipped")
            assert hub["handed_out"] == sum(hub[state] for state in states)
            assert r["train/max_trajectory_age"] <= 1
            # vLLM's cache is never full here, so nothing holds prompts back
            for node in hub["nodes"].values():
                assert node.get("vllm", {}).get("limit", 16) >= 16
            # two fp32 implementations of the same policy: rounding, no more
            if r["train/tokens_same_version"]:
                assert r["train/gen_kl_error_same_version"] <= 1e-5
                assert r["train/token_mult_prob_error_same_version"] <= 1.002
        return records


def learned(records):
    rewards = [r["train/reward"] for r in records]
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    return first <= 0.5 and last >= 0.9, (first, last)


def test_the_first_command_of_the_readme_learns():
    """bash launch.sh, but under another name, so that nobody's runs/tiny is overwritten."""
    done = subprocess.run(
        ["bash", "launch.sh", "--use-cispo", "--name", "test"], cwd=REPO, timeout=420, check=False
    )
    assert done.returncode == 0
    lines = (REPO / "runs/test/metrics.jsonl").read_text().splitlines()
    ok, rewards = learned([json.loads(line) for line in lines])
    assert ok, rewards


def test_without_use_cispo_the_ppo_clip_learns(tmp_path):
    with Run(
        tmp_path,
        [*TORCHRUN, "--nproc-per-node", "1", TRAIN[1], "--no-use-cispo", "--max-num-steps", "120"],
    ) as run:
        records = run.finish()
    ok, rewards = learned(records)
    assert ok, rewards
    assert max(r["train/probs_ratio_clamped_max"] for r in records) == pytest.approx(1.2)


def test_at_age_0_every_token_of_60_weight_updates_has_the_trainer_s_own_logprob(tmp_path):
    """The proof of the whole bridge: after each of 60 updates, what vLLM sampled with is what the
    trainer has."""
    with Run(tmp_path, [*TRAIN, "--max-trajectory-age-steps", "0", "--max-num-steps", "61"]) as run:
        records = run.finish()
    assert len(records) == 61
    for r in records:
        assert r["train/max_trajectory_age"] == 0 and r["train/tokens_older_version"] == 0
        assert r["train/tokens_same_version"] > 0
        assert r["train/gen_kl_error"] <= 1e-5 and r["train/token_mult_prob_error"] <= 1.002
        assert 0.9999 < r["train/sampling_importance_ratio"] < 1.0001


def test_a_vllm_killed_in_mid_run_comes_back_on_the_current_weights(tmp_path):
    with Run(tmp_path, [*TRAIN, "--max-num-steps", "40"]) as run:
        run.wait_for("step   10")
        servers = [
            p
            for p in psutil.Process(run.process.pid).children(recursive=True)
            if "vllm.entrypoints.openai.api_server" in " ".join(p.cmdline())
        ]
        assert servers
        servers[0].kill()
        records = run.finish()
    assert len(records) == 40
    log = (tmp_path / "runs/tiny/rollout.log").read_text()
    # noticed by whoever spoke to it first: the watch, or a weight update under way
    assert log.count("vLLM is up") == 2 and (
        "vLLM ended with status" in log or "vLLM is started again" in log
    )
    # the version it came back on is a late one, and it stayed current to the end
    assert records[-1]["hub"]["nodes"].popitem()[1]["version"] >= 38


def test_interrupting_the_launcher_ends_every_process_it_started(tmp_path):
    command = ["bash", str(REPO / "launch.sh"), "--use-cispo", "--name", "test-interrupt"]
    with Run(tmp_path, command) as run:
        run.wait_for("step    1 ")
        started = [run.process, *psutil.Process(run.process.pid).children(recursive=True)]
        assert any("vllm" in " ".join(p.cmdline()) for p in started[1:])
        os.killpg(run.process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
        assert run.process.wait(30) == 130
        _, alive = psutil.wait_procs(started[1:], timeout=30)
        assert not alive, [p.cmdline() for p in alive]


def test_the_preset_qwen3_0_6b_trains_a_tied_checkpoint_that_stores_its_head_too(tmp_path):
    """As Qwen/Qwen3-0.6B is published: dense, tied, bf16, with lm_head.weight. Two layers of small
    widths, a ChatML tokenizer of bytes; a reward that differs between samples, so that there is a
    gradient."""
    cfg = ModelConfig(
        vocab_size=264,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**cfg.to_hf(256), "torch_dtype": "bfloat16"}))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>", "<|im_start|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    turn = "'<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n'"
    template = (
        f"{{% for m in messages %}}{{{{ {turn} }}}}{{% endfor %}}{{{{ '<|im_start|>assistant\\n' "
        "}}"
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": template,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    model = Qwen3MoE(cfg)
    model.init_weights(torch.Generator().manual_seed(0))
    tensors = {name: t.bfloat16() for name, t in model.hf_tensors()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors")
    rows = [{"problem": f"What is {n} + {n}?", "expected_answer": str(2 * n)} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my.py").write_text(
        "def score(completion, example):\n    return len(completion) % 7 / 7\n"
    )
    flags = (
        f"--preset qwen3-0.6b --name tiny --model {path} --data {tmp_path}/rows.jsonl "
        f"--data-split train --reward {tmp_path}/my.py:score --val-every-steps 0 --max-num-steps "
        "2 --num-prompts-per-step 4 --num-generations-per-prompt 4 --train-global-batch-size 8 "
        "--max-total-sequence-length 256 --max-input-seq-length 224 --max-new-tokens 16 "
        "--no-compile"
    )
    with Run(tmp_path, ["bash", str(REPO / "launch.sh"), *flags.split()]) as run:
        first, second = run.finish()
    assert first["train/grad_norm"] > 0 and first["train/gen_kl_error"] < 1e-6
    # v1 went as a delta
    assert 0 < second["weights/delta_bytes"] < 0.5 * second["weights/full_bytes"]
    assert list((tmp_path / "runs/tiny/weights/v1").glob("*.delta"))
    assert "whole, 24 tensors" in check(tmp_path / "runs/tiny/weights/v2")
