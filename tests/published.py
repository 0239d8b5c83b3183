"""What a trainer of one rank publishes, for tests of its readers that need no trainer."""

import json
from pathlib import Path

import bridge.publish
from bridge import delta, weights

SHARD = "model-00001-of-00001"


def write_version(
    root: Path, version: int, tensors, static: Path, run: str = "", before=None, full=True
) -> Path:
    """Write `root/v{version}`; `before`, the tensors of the version before it, adds a delta. Its
    manifest names this version's files, and with a delta those of the version before."""
    tensors, directory = dict(tensors), root / f"v{version}"
    metadata = {"run": run, "version": str(version)}
    shards = [
        {
            "name": SHARD,
            "tensors": {name: weights.describe(t) for name, t in tensors.items()},
            "files": [],
        }
    ]
    previous = root / f"v{version - 1}" / weights.MANIFEST
    whole = {"version": version, "files": {}}
    if before is not None:
        old = json.loads(previous.read_text())
        shards[0]["files"], whole = old["shards"][0]["files"], old["static"]
        codes = {
            name: delta.encode(before[name].contiguous(), t.contiguous())
            for name, t in tensors.items()
        }
        delta_file = bridge.publish.write_share(
            directory, SHARD, tensors, codes, {**metadata, "base": str(version - 1)}
        )
        shards[0]["files"].append({**delta_file, "url": ""})
    if full:
        shards[0]["files"].append(
            {**bridge.publish.write_share(directory, SHARD, tensors, None, metadata), "url": ""}
        )
        whole = {
            "version": version,
            "files": bridge.publish.write_static(directory, static, shards),
        }
    manifest = {
        "run": run,
        "version": version,
        "base": version - 1,
        "static": whole,
        "full": full,
        "shards": shards,
    }
    weights.write_text(directory / weights.MANIFEST, json.dumps(manifest))
    return directory


def manifest_of(directory: Path) -> dict:
    return json.loads((directory / weights.MANIFEST).read_text())


def publish(hub, version: int) -> None:
    """Let the hub offer a version that is on its disk."""
    manifest = {**manifest_of(hub.weights_dir / f"v{version}"), "run": hub.run["id"]}
    hub.set_published(json.dumps(manifest).encode())
