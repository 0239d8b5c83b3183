"""The versions on disk as rank 0 knows them: the files of each share, the manifest, what makes a
whole version a checkpoint that others can open, and what may be deleted. No thread, no other
rank."""

import json
import shutil
from collections import Counter
from pathlib import Path

from bridge.logs import read_jsonl
from bridge.weights import DTYPES, INDEX, MANIFEST, STATIC_FILES, SUFFIX, digest, write_text


class Versions:
    """Which files lead to which version. A file's entry is {version, kind, bytes, blake3, url}; a
    part is one rank's word on its share: {name, tensors, files: entries, full_bytes}."""

    def __init__(self, root: Path, static: Path, run: str, keep: int):
        """static: a checkpoint directory with config and tokenizer; run: the run's id; keep: how
        many of the last versions a node may still ask for."""
        self.root, self.static, self.run, self.keep = root, static, run, keep
        self.shards: list[dict] = []  # of the newest version: name and tensors of each share
        self.files: dict[str, list[dict]] = {}  # of each share, those that are on disk
        self.full_bytes = 0  # of the newest version, were it whole
        self.whole: dict = {}  # the newest whole version, and its files that are not weights

    def add(self, version: int, parts: list[dict]) -> None:
        """A new version, whose shares are on disk."""
        self.shards = [{"name": part["name"], "tensors": part["tensors"]} for part in parts]
        self.full_bytes = sum(part["full_bytes"] for part in parts)
        self._add_files(parts)
        if all(part["files"][-1]["kind"] == "full" for part in parts):
            self._complete(version)

    def add_whole(self, version: int, parts: list[dict]) -> None:
        """Whole files of the newest version, written again. Where a rank is a version ahead the
        directory is no checkpoint, but the files serve all the same."""
        self._add_files(parts)
        if all(part["files"][0]["version"] == version for part in parts):
            self._complete(version)

    def _add_files(self, parts: list[dict]) -> None:
        for part in parts:
            self.files.setdefault(part["name"], []).extend(part["files"])

    def _complete(self, version: int) -> None:
        """All shares of a version are whole: make its directory a checkpoint."""
        card = model_card(self.root.parent, version)
        files = write_static(self.root / f"v{version}", self.static, self.shards, card)
        self.whole = {"version": version, "files": files}

    def oldest_to_keep(self, version: int, in_use: float) -> int:
        """The oldest version that may not be deleted once `version` is published. Kept is what
        leads from a whole version to each of the last `keep`, whose manifest a node may just have
        read; and what a node still fetches (`in_use` and later), up to four whole copies in all."""
        sizes = Counter()
        for file in (file for files in self.files.values() for file in files):
            sizes[file["version"]] += file["bytes"]
        fulls = [
            {f["version"] for f in files if f["kind"] == "full"} for files in self.files.values()
        ]
        wholes = sorted(set.intersection(*fulls))
        oldest = max((v for v in wholes if v <= version - self.keep + 1), default=wholes[0])
        for older in sorted((v for v in sizes if in_use <= v < oldest), reverse=True):
            if sum(size for v, size in sizes.items() if v >= older) <= 4 * self.full_bytes:
                oldest = older
        return oldest

    def forget(self, oldest: int) -> None:
        """Files of versions before `oldest` are named in no manifest any more."""
        for name, files in self.files.items():
            self.files[name] = [file for file in files if file["version"] >= oldest]

    def write_manifest(self, version: int, compare: bool) -> bytes:
        """With its manifest the version is one. compare: all nodes are to say what is inside their
        vLLM. Returns the manifest."""
        shards = [
            {**shard, "files": [f for f in self.files[shard["name"]] if f["version"] <= version]}
            for shard in self.shards
        ]
        manifest = {
            "run": self.run,
            "version": version,
            "base": version - 1,
            "static": self.whole,
            "compare": compare,
            "shards": shards,
        }
        text = json.dumps(manifest)
        write_text(self.root / f"v{version}" / MANIFEST, text)
        return text.encode()


# ---- directories ---------------------------------------------------------------------------------
def clear(root: Path) -> None:
    """Delete the versions that are not whole, as a run leaves them that was killed or went back."""
    for left in root.glob("v*"):
        if not ((left / MANIFEST).exists() and (left / INDEX).exists()):
            shutil.rmtree(left, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)


def prune(root: Path, oldest: int) -> None:
    """Delete the versions before `oldest` from a node's disk."""
    for old in root.glob("v*"):
        if old.name[1:].isdigit() and int(old.name[1:]) < oldest:
            # a neighbour on a shared disk may be deleting it too
            shutil.rmtree(old, ignore_errors=True)


# ---- a whole version is a checkpoint -------------------------------------------------------------
def write_static(directory: Path, source: Path, shards: list[dict], card: str = "") -> dict:
    """Make a directory of whole shares a checkpoint that others can open: index, config, tokenizer,
    and the card as README.md. Returns their entries in the manifest, but for the index, which the
    receiver makes itself, and the card, which it does not need."""
    names = [name for name in STATIC_FILES if (source / name).exists()]
    texts = {name: (source / name).read_text() for name in names}
    # the dtype of these files, for those who open them with dtype "auto"
    config = json.loads(texts["config.json"])
    config.pop("torch_dtype", None)
    dtype = next(iter(shards[0]["tensors"].values()))["dtype"]
    config["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    texts["config.json"] = json.dumps(config, indent=1)
    if "generation_config.json" not in texts:
        generation = {"eos_token_id": config.get("eos_token_id"), "do_sample": True}
        texts["generation_config.json"] = json.dumps(generation, indent=1)
    for name, text in texts.items():
        write_text(directory / name, text)
    write_text(directory / "README.md", card)
    write_index(directory, shards)
    return {
        name: {"bytes": len(text.encode()), "blake3": digest(text.encode())}
        for name, text in texts.items()
    }


def write_index(directory: Path, shards: list[dict]) -> None:
    where = {name: shard["name"] + SUFFIX["full"] for shard in shards for name in shard["tensors"]}
    write_text(directory / INDEX, json.dumps({"metadata": {}, "weight_map": where}))


def model_card(run_dir: Path, step: int) -> str:
    """README.md of a checkpoint that a run made: what it comes from, how well it did, and all
    flags."""
    path = run_dir / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    base = config.get("model") or f"a tiny Qwen3-MoE, warm-started on {config.get('task')!r}"
    last = [r for r in read_jsonl(run_dir / "metrics.jsonl") if step - 10 <= r["step"] < step]
    said = []
    if last:
        mean = sum(r["train/reward"] for r in last) / len(last)
        said.append(f"Mean reward of the {len(last)} steps before it: {mean:.4f}.")
    for record in (r for r in read_jsonl(run_dir / "validation.jsonl") if r["version"] == step):
        said += [f"{name}: {record[name]:.4f}." for name in record if "@" in name]
    front = f"---\nbase_model: {config['model']}\n---\n" if config.get("model") else ""
    return (
        f"{front}# {run_dir.name}, step {step}\n\n"
        f"Made from {base} by train_cispo.py: {step} steps of reinforcement learning. "
        f"{' '.join(said)}\n\n"
        f"The run's flags:\n\n```json\n{json.dumps(config, indent=1)}\n```\n"
    )
