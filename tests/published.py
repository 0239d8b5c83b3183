"""What a trainer of one rank publishes, for tests of its readers that need no trainer."""

import json
from pathlib import Path

import torch

import bridge.publish
import task
from bridge import delta, weights
from bridge.versions import write_static
from model import ModelConfig, Qwen3MoE

SHARD = "model-00001-of-00001"


def write_version(
    root: Path, version: int, tensors, static: Path, run: str = "", before=None, full=True
) -> Path:
    """Write `root/v{version}`; `before`, the tensors of the version before it, adds a delta. Its
    manifest names this version's files, and with a delta those of the version before."""
    tensors, directory = dict(tensors), root / f"v{version}"
    metadata = {"run": run, "version": str(version), "base": str(version - 1)}
    whole, files = {"version": version, "files": {}}, []

    def write(codes):
        entry = bridge.publish.write_share(directory, SHARD, tensors, codes, metadata)
        files.append({**entry, "url": ""})

    if before is not None:
        old = manifest_of(root / f"v{version - 1}")
        files, whole = old["shards"][0]["files"], old["static"]
        write({n: delta.encode(before[n].contiguous(), t.contiguous()) for n, t in tensors.items()})
    described = {name: weights.describe(t) for name, t in tensors.items()}
    shards = [{"name": SHARD, "tensors": described, "files": files}]
    if full:
        write(None)
        whole = {"version": version, "files": write_static(directory, static, shards)}
    manifest = {
        "run": run,
        "version": version,
        "base": version - 1,
        "static": whole,
        "compare": full,
        "shards": shards,
    }
    weights.write_text(directory / weights.MANIFEST, json.dumps(manifest))
    return directory


def two_checkpoints(root: Path, cfg: ModelConfig) -> list[Path]:
    """Versions 0 and 1 in bf16 of a model of this shape, with no weight in common but norms' ones;
    vLLM starts on either."""
    eos = task.write_char_tokenizer(root / "static", "abc")[task.EOS]
    config = {**cfg.to_hf(eos), "dtype": "bfloat16"}
    (root / "static" / "config.json").write_text(json.dumps(config))
    made = []
    for version in range(2):
        model = Qwen3MoE(cfg)
        model.init_weights(torch.Generator().manual_seed(version))
        tensors = [(name, tensor.bfloat16()) for name, tensor in model.hf_tensors()]
        made.append(write_version(root, version, tensors, root / "static"))
    return made


def manifest_of(directory: Path) -> dict:
    return json.loads((directory / weights.MANIFEST).read_text())


def publish(hub, version: int) -> None:
    """Let the hub offer a version that is on its disk."""
    manifest = {**manifest_of(hub.weights_dir / f"v{version}"), "run": hub.run["id"]}
    hub.set_published(json.dumps(manifest).encode())
