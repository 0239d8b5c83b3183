"""Whole training runs, ours and the GRPOTrainer of TRL: `python tools/bench.py rl [--size
tiny|100m]`. Apart, since a run has nothing in common with its contenders, which take turns at one
function.

The same starting weights, prompts, reward, sampling, sizes, CISPO bounds, AdamW and learning rate;
four updates of a batch of samples. Differences that stay: ours samples with vLLM and trains
meanwhile on the batch before, with its correction for that; TRL generates with transformers, since
its vLLM modes need CUDA, then trains. A third run is ours at age 0 with all cores for the trainer:
its parts do not overlap, so they compare with TRL's.

tiny: the default run, 0.5 M parameters, 256 samples of about 7 tokens, until a sample is right 9
times of 10. 100m: 107 M parameters from random weights, so that a sample ends by chance: 64 of
them, 32 tokens in the mean and 128 at most. It is rewarded for letters of the alphabet's first
half, which is quickly learned.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the program
import task
from bridge.processes import cores
from bridge.reward_process import load_reward
from bridge.weights import write_safetensors
from config import Config
from model import ModelConfig, Qwen3MoE

REPO = Path(__file__).resolve().parent.parent
# TRL's epsilon_high is the bound itself, ours an offset from 1
UPDATES, GENERATIONS, CLIP_HIGH = 4, 16, 5.0
HALF = """
def score(completion, example):
    letters = [c for c in completion if c.isalpha()]
    return float(2 * sum(c < "n" for c in letters) > len(letters))
"""
# prompts of a step, tokens of a sample at most, learning rate, steps of a run, of that at age 0, of
# warm-up
SIZES = {"tiny": (16, 8, 1e-4, 160, 30, 10), "100m": (4, 128, 2e-5, 8, 4, 2)}


# ---- what both start from ------------------------------------------------------------------------
def prepare(size: str, root: Path) -> Path:
    """Checkpoint, data.jsonl and reward.py in a directory."""
    checkpoint = root / "model"
    examples = task.task_examples("reverse", 20_000, seed=0)
    (root / "data.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    if size == "tiny":
        task.warm_start(checkpoint, "reverse", 0, Config().warm_start_accuracy, lambda line: None)
        return checkpoint
    (root / "reward.py").write_text(HALF)
    scratch = root / "scratch"
    vocab = task.write_char_tokenizer(scratch, task.TASKS["reverse"][1])
    cfg = ModelConfig(
        vocab_size=32,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=512,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=256,
        norm_topk_prob=True,
        rope_theta=1e4,
        max_position_embeddings=512,
    )
    (scratch / "config.json").write_text(
        json.dumps({**cfg.to_hf(vocab[task.EOS]), "dtype": "float32"})
    )
    model = Qwen3MoE(cfg)
    model.init_weights(torch.Generator().manual_seed(0))
    write_safetensors(scratch / "model.safetensors", list(model.hf_tensors()))
    return scratch.rename(checkpoint)


# ---- the runs: each writes a record a step -------------------------------------------------------
def our_command(size: str, root: Path, checkpoint: Path, synchronous: bool) -> list[str]:
    prompts, new_tokens, lr, steps, steps_at_0, _ = SIZES[size]
    flags = {
        "max-num-steps": steps_at_0 if synchronous else steps,
        "model": checkpoint,
        "data": root / "data.jsonl",
        "num-prompts-per-step": prompts,
        "num-generations-per-prompt": GENERATIONS,
        "max-new-tokens": new_tokens,
        "max-total-sequence-length": 16 + new_tokens,
        "lr": lr,
        "ratio-clip-max": CLIP_HIGH - 1,
        "train-global-batch-size": prompts * GENERATIONS // UPDATES,
        "checkpoint-every-steps": 0,
    }
    if size != "tiny":
        flags["reward"] = f"{root / 'reward.py'}:score"
    if synchronous:
        flags |= {
            "max-trajectory-age-steps": 0,
            "cpu-threads": cores(),
            "rollout-args": f"--vllm-threads {cores()}",
        }
    return [
        sys.executable,
        str(REPO / "train_cispo.py"),
        *(f"--{name}={value}" for name, value in flags.items()),
    ]


# What TRL is given so that it trains as our run does, and writes nothing.
AS_OURS = {
    "loss_type": "cispo",
    "epsilon_high": CLIP_HIGH,
    "beta": 0.0,
    "num_generations": GENERATIONS,
    "steps_per_generation": UPDATES,
    "temperature": 1.0,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.01,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def train_with_trl(size: str, root: Path, checkpoint: Path, out: Path) -> None:
    """Runs in the environment that has TRL. Its own timers only report to trackers, hence the
    subclass."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    prompts, new_tokens, lr, steps, *_ = SIZES[size]
    torch.set_num_threads(cores())
    reward = load_reward("exact" if size == "tiny" else f"{root / 'reward.py'}:score")
    now = {"start": time.perf_counter(), "generate": 0.0, "rewards": []}

    def score(prompts, completions, answer, **rest):
        now["rewards"] = [reward(c, {"answer": a}) for c, a in zip(completions, answer)]
        return now["rewards"]

    class Timed(GRPOTrainer):
        def _generate(self, prompts):
            start = time.perf_counter()
            try:
                return super()._generate(prompts)
            finally:
                now["generate"] += time.perf_counter() - start

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % UPDATES:
                return
            end = time.perf_counter()
            record = {
                "step": state.global_step // UPDATES - 1,
                "train/reward": sum(now["rewards"]) / len(now["rewards"]),
                "timing/train/total_step_time": end - now["start"],
                "timing/train/exposed_generation": now["generate"],
            }
            now.update(start=end, generate=0.0)
            with open(out, "a") as f:
                f.write(json.dumps(record) + "\n")

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("mlp.gate.weight"))
    config = GRPOConfig(
        output_dir=str(root / "trl"),
        per_device_train_batch_size=prompts * GENERATIONS // UPDATES,
        max_completion_length=new_tokens,
        learning_rate=lr,
        max_steps=UPDATES * steps,
        **AS_OURS,
    )
    Timed(
        model,
        reward_funcs=score,
        args=config,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        train_dataset=Dataset.from_json(str(root / "data.jsonl")),
        callbacks=[Record()],
    ).train()


def follow(command: list[str], cwd: Path, metrics: Path, what: str) -> list[dict]:
    """Run it; its records, each with the seconds since the start at which it was there."""
    cwd.mkdir()
    start, records = time.monotonic(), []
    with open(cwd / "out", "w") as out:
        process = subprocess.Popen(command, cwd=cwd, stdout=out, stderr=out)
    try:
        ended = False
        while not ended:
            ended = process.poll() is not None
            lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
            for line in lines[len(records) :]:
                records.append({**json.loads(line), "at_s": time.monotonic() - start})
                print(
                    f"{what}: step {records[-1]['step']}, reward {records[-1]['train/reward']:.2f}",
                    file=sys.stderr,
                )
            time.sleep(0.1)  # polling another program's output
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(90)
    assert process.returncode == 0, (
        f"{what} ended with status {process.returncode}:\n{(cwd / 'out').read_text()[-3000:]}"
    )
    return records


# ---- the comparison ------------------------------------------------------------------------------
def summary(records: list[dict], size: str) -> dict:
    """Means of a step after the warm-up, and when the mean reward of five steps was 0.9, if it
    was."""
    prompts, *_, warm_up = SIZES[size]
    samples, rows = prompts * GENERATIONS, records[warm_up:]

    def part(row, name):
        return row[f"timing/train/{name}"]

    def mean(of):
        return statistics.mean(of(row) for row in rows)

    step_s = mean(lambda row: part(row, "total_step_time"))
    wait_s = mean(lambda row: part(row, "exposed_generation"))
    trainer_s = mean(lambda row: part(row, "total_step_time") - part(row, "exposed_generation"))
    rewards = [r["train/reward"] for r in records]
    there = [i for i in range(4, len(rewards)) if sum(rewards[i - 4 : i + 1]) / 5 >= 0.9]
    first_s = records[0]["at_s"]
    at = (
        {"steps_to_0.9": there[0] + 1, "to_0.9_s": records[there[0]]["at_s"] - first_s}
        if there
        else {}
    )
    found = {
        "steps": len(rows),
        "step_s": step_s,
        "generation_s": wait_s,
        "trainer_s": trainer_s,
        "samples_per_s": samples / step_s,
        "first_step_at_s": first_s,
        "last_reward": statistics.mean(rewards[-5:]),
        **at,
    }
    parts = ("data_processing", "policy_and_reference_logprobs", "policy_training", "publish_copy")
    if f"timing/train/{parts[0]}" in rows[0]:
        found["parts"] = {name: mean(lambda row, name=name: part(row, name)) for name in parts}
    return found


def main(args, python) -> None:
    """args: size, only, json. python: makes the environment that has TRL, and gives its
    interpreter."""
    contenders, found = (
        [w for w in ("ours", "ours, age 0", "TRL") if not args.only or w in args.only.split("/")],
        {},
    )
    try:
        peer = python() if "TRL" in contenders else ""
    except subprocess.CalledProcessError as e:
        print(
            f"TRL is left out: {e}; it needs `pip install trl accelerate` into .venv-bench",
            file=sys.stderr,
        )
        contenders.remove("TRL")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        torch.set_num_threads(1)  # with more, a warm start on a busy machine takes minutes
        checkpoint = prepare(args.size, root)
        for what in contenders:
            cwd = root / what.replace(", ", "-").replace(" ", "-")
            metrics = cwd / ("metrics.jsonl" if what == "TRL" else "runs/tiny/metrics.jsonl")
            if what == "TRL":
                command = [peer, __file__, args.size, str(root), str(checkpoint), str(metrics)]
            else:
                command = our_command(args.size, root, checkpoint, synchronous=what != "ours")
            found[what] = summary(follow(command, cwd, metrics, what), args.size)
            print(f"{what}: {found[what]}", file=sys.stderr)
    if args.json:
        print(json.dumps({"size": args.size, "load": os.getloadavg()[0], **found}))
        return
    print(
        f"rl, {args.size}: {SIZES[args.size][0] * GENERATIONS} samples a step, {UPDATES} updates; "
        "seconds a step"
    )
    print(
        f"{'':14}{'whole':>8}{'waiting for samples':>21}{'trainer':>9}{'samples/s':>11}"
        f"{'to 0.9':>9}  last reward"
    )
    for what, row in found.items():
        to = f"{row['to_0.9_s']:.0f} s" if "to_0.9_s" in row else "-"
        print(
            f"{what:14}{row['step_s']:8.2f}{row['generation_s']:21.2f}{row['trainer_s']:9.2f}"
            f"{row['samples_per_s']:11.0f}{to:>9}  {row['last_reward']:.3f}"
        )
    for what, row in found.items():
        if "parts" in row:
            print(
                f"{what}, trainer: "
                + ", ".join(f"{name} {s:.2f}" for name, s in row["parts"].items())
            )
    if "TRL" in found:
        for what in (w for w in found if w != "TRL"):
            whole, part = (found["TRL"][k] / found[what][k] for k in ("step_s", "trainer_s"))
            print(f"{what}: {whole:.2f}x TRL's samples/s, the trainer alone {part:.2f}x")


if __name__ == "__main__":  # the other environment's process
    train_with_trl(sys.argv[1], *map(Path, sys.argv[2:]))
