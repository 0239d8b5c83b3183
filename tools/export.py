"""A checkpoint as a model directory of Hugging Face's form, and the check of one.

python tools/export.py runs/NAME/checkpoints/step-N DIR [BASE_MODEL_DIR]
python tools/export.py --check DIR
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the program
from bridge.publish import write_share
from bridge.versions import model_card, write_static
from bridge.weights import MANIFEST, WeightsError, describe, digest, layer_order, stored_tensors
from model import ModelConfig
from ranks.checkpoint import CheckpointError, Pieces, verify


# ---- export --------------------------------------------------------------------------------------
def export(path: Path, out: Path, base: Path | None = None) -> None:
    """Write a checkpoint as a Hugging Face directory, in the dtype that the run publishes in. base:
    where config and tokenizer are; by default the run's whole versions. Raises: CheckpointError,
    ValueError."""
    path = path.resolve()  # its name is the run's, whatever link led here
    run_dir, manifest = path.parent.parent, verify(path, 0, 1)
    newest_first = sorted(run_dir.glob("weights/v*"), key=lambda p: p.stat().st_mtime, reverse=True)
    bases = [base] if base else newest_first
    base = next((p for p in bases if (p / "config.json").exists()), None)
    if base is None:
        raise ValueError(
            f"no config.json in {run_dir / 'weights'}/v*: name the directory of the model it "
            "started from"
        )
    if out.exists():
        raise ValueError(f"{out} exists")
    shapes = ModelConfig.from_dir(base).checkpoint_shapes()
    config = json.loads((base / "config.json").read_text())
    dtype = getattr(torch, config.get("dtype", "bfloat16"))
    pieces, metadata, parts = Pieces(path, shapes), {"version": str(manifest["step"])}, []
    groups = files_of(shapes, dtype)
    for i, names in enumerate(groups):
        tensors = {name: pieces.whole("weight", name).to(dtype) for name in names}
        shard = f"model-{i + 1:05d}-of-{len(groups):05d}"
        write_share(out, shard, tensors, None, metadata)
        parts.append({"name": shard, "tensors": {name: describe(t) for name, t in tensors.items()}})
    write_static(out, base, parts, model_card(run_dir, manifest["step"]))


def files_of(shapes: dict[str, torch.Size], dtype: torch.dtype) -> list[list[str]]:
    """The names of the tensors in each file: in layer order, 4 GB a file."""
    groups, size = [[]], 0
    for name in sorted(shapes, key=layer_order):
        size += shapes[name].numel() * dtype.itemsize
        if size > 4e9 and groups[-1]:
            groups, size = [*groups, []], 0
        groups[-1].append(name)
    return groups


# ---- check ---------------------------------------------------------------------------------------
def check(path: Path) -> str:
    """Prove that a directory is a whole Hugging Face checkpoint of a model that can be trained
    here: every tensor of the shape that config.json asks for and finite, a tokenizer, and where
    there is a manifest, what it says. Returns a line about it. Raises: WeightsError naming what is
    wrong."""
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise WeightsError(
                f"{path} has no {name}; a version without it is a delta, the whole ones open by "
                "themselves"
            )
    shapes = ModelConfig.from_dir(path).checkpoint_shapes()
    manifest = json.loads((path / MANIFEST).read_text()) if (path / MANIFEST).exists() else {}
    described = {
        name: d for shard in manifest.get("shards", ()) for name, d in shard["tensors"].items()
    }
    for name, want in manifest.get("static", {}).get("files", {}).items():
        if not (path / name).exists() or digest((path / name).read_bytes()) != want["blake3"]:
            raise WeightsError(f"{path / name}: missing, or its digest differs from the manifest")
    dtypes, elements = set(), 0
    for name, stored in stored_tensors(path, shapes).items():
        tensor = stored[:]
        if described and describe(tensor) != described.get(name):
            raise WeightsError(f"{path}: tensor {name} differs from the manifest")
        if not tensor.isfinite().all():
            raise WeightsError(f"{path}: {name} is not finite throughout")
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        elements += tensor.numel()
    said = "without a manifest to compare digests with"
    if manifest:
        said = f"as the manifest of v{manifest['version']} says"
    return (
        f"{path}: whole, {len(shapes)} tensors, {elements:,} parameters in "
        f"{', '.join(sorted(dtypes))}, {said}"
    )


if __name__ == "__main__":
    args = sys.argv[1:]
    if len(args) not in (2, 3) or (args[0] == "--check" and len(args) != 2):
        sys.exit(
            "usage: python tools/export.py runs/NAME/checkpoints/step-N DIR [BASE_MODEL_DIR]\n"
            "       python tools/export.py --check DIR"
        )
    try:
        if args[0] != "--check":
            export(*map(Path, args))
        print(check(Path(args[1])))
    except (CheckpointError, WeightsError, ValueError, OSError) as e:
        sys.exit(f"export.py: error: {e}")
