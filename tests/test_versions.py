"""versions.py: which files lead to which version, and what may be deleted; no publisher, no hub."""

import json

import torch

from bridge import weights
from bridge.versions import Versions, clear, prune

TENSORS = {"w": torch.arange(100.0)}


def part(root, version, *kinds, size=100):
    """A rank's word on a version whose files are so many bytes, and its directory."""
    (root / f"v{version}").mkdir(parents=True, exist_ok=True)
    files = [
        {"version": version, "kind": kind, "bytes": size if kind == "full" else size // 10}
        for kind in kinds
    ]
    tensors = {name: weights.describe(t) for name, t in TENSORS.items()}
    return {"name": "s", "tensors": tensors, "files": files, "full_bytes": size}


def versions(tmp_path, keep=2):
    (tmp_path / "static").mkdir()
    (tmp_path / "static/config.json").write_text("{}")
    return Versions(tmp_path / "w", tmp_path / "static", "run", keep)


def test_what_leads_to_the_last_versions_and_what_a_node_fetches_is_kept(tmp_path):
    v = versions(tmp_path)
    for version in range(8):
        kinds = ["full"] if version % 4 == 0 else ["delta"]
        v.add(version, [part(v.root, version, *kinds)])
    # a node may ask for v6 and v7, which need the whole v4
    assert v.oldest_to_keep(7, in_use=float("inf")) == 4
    assert v.oldest_to_keep(4, in_use=float("inf")) == 0  # v3 needs v0
    # 2 whole ones and 6 deltas are 260 bytes, at most 400 are kept for a node that is late
    assert v.oldest_to_keep(7, in_use=0) == 0
    v.full_bytes = 50
    assert v.oldest_to_keep(7, in_use=0) == 1


def test_a_manifest_names_the_files_that_are_left_and_the_whole_version_before(tmp_path):
    v = versions(tmp_path)
    v.add(0, [part(v.root, 0, "full")])
    v.add(1, [part(v.root, 1, "delta")])
    v.forget(0)
    manifest = json.loads(v.write_manifest(1, compare=False))
    assert (manifest["version"], manifest["base"], manifest["compare"]) == (1, 0, False)
    assert [f["version"] for f in manifest["shards"][0]["files"]] == [0, 1]
    assert manifest["static"]["version"] == 0
    assert manifest["static"]["files"].keys() == {"config.json", "generation_config.json"}
    assert json.loads((v.root / "v1/manifest.json").read_text()) == manifest

    v.add_whole(1, [part(v.root, 1, "full")])  # a node refused it: written again
    manifest = json.loads(v.write_manifest(1, compare=True))
    assert manifest["compare"] and manifest["static"]["version"] == 1
    v.forget(1)
    (shard,) = json.loads(v.write_manifest(1, compare=True))["shards"]
    assert [(f["version"], f["kind"]) for f in shard["files"]] == [(1, "delta"), (1, "full")]


def test_directories_of_older_versions_and_of_half_written_ones_are_deleted(tmp_path):
    v = versions(tmp_path)
    for version in range(3):
        v.add(version, [part(v.root, version, "full")])
        v.write_manifest(version, compare=False)
    (v.root / "v2/manifest.json").unlink()  # killed before it was written
    clear(v.root)
    assert sorted(path.name for path in v.root.iterdir()) == ["v0", "v1"]
    prune(v.root, 1)
    assert [path.name for path in v.root.iterdir()] == ["v1"]
