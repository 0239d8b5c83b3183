"""A checkpoint exported, and a whole published version, are plain Hugging Face directories; `check`
proves or names."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from published import write_version
from safetensors.torch import load_file, save_file

from bridge import weights
from model import ModelConfig, Qwen3MoE
from ranks import checkpoint, parallel
from ranks.parallel import ShardedAdamW
from tools import export

REPO = Path(__file__).resolve().parent.parent


def command(*args):
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=REPO, capture_output=True, text=True, check=False
    )
    return done.returncode, (done.stdout + done.stderr).strip()


def test_an_exported_checkpoint_opens_in_transformers_with_our_logits(tmp_path, tiny_checkpoint):
    """Trained a little, saved, exported by the command: fp32 logits of two implementations, 1e-5
    relative."""
    run = tmp_path / "runs/mine"
    model = Qwen3MoE(ModelConfig.from_dir(tiny_checkpoint))
    weights.load_hf(model, tiny_checkpoint)
    write_version(run / "weights", 0, list(model.hf_tensors()), tiny_checkpoint)
    parallel.join_ranks(60)
    try:
        optimizer = ShardedAdamW(model, 1.0, lr=0.01)
        saver = checkpoint.Checkpointer(run / "checkpoints", 0, 1, keep=1)
        tokens, cu_seqlens = torch.arange(2, 14), torch.tensor([0, 12], dtype=torch.int32)
        optimizer.zero_grad()
        model(tokens, cu_seqlens, 12)[0].square().sum().backward()
        optimizer.step()
        saver.save(3, model, optimizer, {"ledger": {}, "scores": {}, "unscored": []})
        saver.wait()
    finally:
        torch.distributed.destroy_process_group()
    (run / "config.json").write_text(json.dumps({"model": "Qwen/some-model", "lr": 0.5}))
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "train/reward": 0.25}\n{"step": 2, "train/reward": 0.75}\n'
    )
    (run / "validation.jsonl").write_text('{"version": 3, "validation/avg@4": 0.625}\n')
    status, said = command("tools/export.py", run / "checkpoints/step-000003", tmp_path / "out")
    assert status == 0 and "whole, 69 tensors" in said, said
    card = (tmp_path / "out/README.md").read_text()
    for part in (
        "base_model: Qwen/some-model",
        "# mine, step 3",
        "0.5000",
        "validation/avg@4: 0.6250",
        '"lr": 0.5',
    ):
        assert part in card
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        found = model(tokens, cu_seqlens, 12)[0] @ model.head_weight.t()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    before = dict(weights.read_tensors(tiny_checkpoint))["lm_head.weight"]
    assert not torch.equal(before, theirs.lm_head.weight)  # it is the trained one
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([2, 3]) == "ab"
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 1
    status, said = command("tools/export.py", run / "checkpoints/step-000003", tmp_path / "out")
    assert (status, said) == (1, f"export.py: error: {tmp_path / 'out'} exists")


def test_check_names_what_is_wrong_with_a_directory(tmp_path, tiny_checkpoint):
    model = Qwen3MoE(ModelConfig.from_dir(tiny_checkpoint))
    weights.load_hf(model, tiny_checkpoint)
    whole = write_version(tmp_path, 7, list(model.hf_tensors()), tiny_checkpoint)
    assert "502,528 parameters in float32, as the manifest of v7 says" in export.check(whole)
    file = "model-00001-of-00001.safetensors"

    def change(what):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        tensors = load_file(copy / file)
        what(copy, tensors)
        save_file(tensors, copy / file)
        return copy

    def drop(path):
        (path / weights.MANIFEST).unlink()

    norm = "model.norm.weight"
    for what, why in [
        (lambda path, t: t.update({norm: t[norm] + 1}), f"tensor {norm} differs from the manifest"),
        (
            lambda path, t: (drop(path), t.update({norm: t[norm] * torch.nan})),
            f"{norm} is not finite",
        ),
        (
            lambda path, t: (drop(path), t.update({norm: t[norm][:-1].clone()})),
            "config.json makes it (128,)",
        ),
        (lambda path, t: t.update({"extra": t[norm].clone()}), "extra has no place in this model"),
        (lambda path, t: (path / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (
            lambda path, t: (path / "generation_config.json").unlink(),
            "generation_config.json: missing, or its digest",
        ),
    ]:
        with pytest.raises(weights.WeightsError) as e:
            export.check(change(what))
        assert why in str(e.value), str(e.value)
    copy = change(lambda path, t: drop(path))
    (copy / file).write_bytes((copy / file).read_bytes()[:-10])
    status, said = command("tools/export.py", "--check", copy)
    assert status == 1 and said.startswith("export.py: error:") and "\n" not in said
    status, said = command("tools/export.py", "--check", whole)
    assert status == 0 and said.startswith(f"{whole}: whole")
