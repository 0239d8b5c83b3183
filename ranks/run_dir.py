"""A run's directory, and what a run goes on from: one process at a time has it, nobody's results
are overwritten, and what differs from the run before is refused or said.

    runs/NAME/config.json, config-STEP.json   flags of the newest steps, and of those up to a step
    runs/NAME/code                            the program's sources, and the reward's
    runs/NAME/metrics.jsonl, samples.jsonl, validation.jsonl
    runs/NAME/checkpoints, weights
    runs/.NAME.lock                           held while a process trains
"""

import dataclasses
import fcntl
import itertools
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load, save

from bridge.logs import holder_of, lock_of
from bridge.processes import REPO, program_files
from bridge.reward_process import relative, reward_sources
from ranks.checkpoint import MANIFEST, NO_MANIFEST, CheckpointError, choose, read_manifest, whole
from ranks.parallel import Mesh, broadcast_bytes


# ---- what a run may go on from -------------------------------------------------------------------
def checkpoints_to_try(cfg, origin: dict) -> list[Path]:
    """What the run may go on from, best first; only manifests are read. A job that torchrun has
    started again goes on by itself. origin: digests of what the run is made from, by flag. Raises:
    CheckpointError for a checkpoint of another run."""
    auto = cfg.resume == "auto" or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    found = whole(cfg.run_dir / "checkpoints") if auto else []
    if cfg.resume not in ("auto", "off"):
        found.append(Path(cfg.resume).resolve())  # may be a link or lie in what is moved aside
        if not (found[-1] / MANIFEST).exists():
            raise CheckpointError(f"--resume {cfg.resume}: {NO_MANIFEST}")
    for path in found:
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue  # `choose` says so and passes it over
        check_origin(path, manifest, cfg, origin)
    return found


def check_origin(path: Path, manifest: dict, cfg, origin: dict) -> None:
    """Raises: CheckpointError for a checkpoint of another sequence of prompts, or another model."""
    saved, made_from = manifest["config"], manifest.get("origin", {})
    # an older program kept no digests
    by_name = () if made_from else ("task", "data", "data_split")
    for name in ("seed", "num_prompts_per_step", *by_name):
        if listed(saved.get(name)) != listed(getattr(cfg, name)):
            raise CheckpointError(
                f"{path} was made with {name} = {saved.get(name)!r}, this run has "
                f"{getattr(cfg, name)!r}: the sequence of prompts would be another"
            )
    if made_from and made_from["data"] != origin["data"]:
        raise CheckpointError(
            f"{path} was made with other rows than {' '.join(cfg.data) or cfg.task!r} has now, or "
            "in another order or mix: the sequence of prompts would be another"
        )
    if made_from and made_from["model"] != origin["model"] and (cfg.model or saved["model"]):
        raise CheckpointError(
            f"{path} was made from another model than --model {cfg.model!r} (it was "
            f"{saved['model']!r}): config.json or weights differ"
        )


def listed(value):
    """A flag's value as JSON has it. Of a flag that takes several, older runs have one as text."""
    value = [*filter(None, [value])] if isinstance(value, str | None) else value
    return list(value) if isinstance(value, tuple) else value


def shown(value) -> str:
    """As it stands on a command line."""
    several = isinstance(value, list | tuple)
    return " ".join(map(repr, value)) or "''" if several else repr(value)


def differences(cfg, origin: dict, saved: dict) -> list[str]:
    """A line for each thing that the run has now and its checkpoint was not made with."""
    was, now, found = saved["config"], dataclasses.asdict(cfg), []
    made_from = saved.get("origin", origin)
    for name in (name for name in now if name in was and name not in ("name", "resume")):
        flag = f"--{'no-' if now[name] is False else ''}{name.replace('_', '-')}"
        if listed(was[name]) != listed(now[name]):
            told = f" {shown(now[name])}, was {shown(was[name])}"
            change = "" if isinstance(now[name], bool) else told
            found.append(f"{flag}{change}")
        elif origin.get(name) != made_from.get(name):
            found.append(f"{flag} {shown(now[name])}, which has another content now")
    if origin["tokenizer"] != made_from["tokenizer"]:
        found.append("another tokenizer or chat template than before")
    if "origin" not in saved:
        found.append(
            "a checkpoint of an older program: whether data and model are still the same cannot "
            "be checked"
        )
    return [f"resumes with {what}" for what in found]


# What a score depends on, beside the weights. When one of these changes, the scores before and
# after are not compared.
SCORED_BY = (
    "reward",
    "val_reward",
    "val_data",
    "val_data_split",
    "val_temperature",
    "overlong_buffer_tokens",
    "overlong_penalty",
)


def scores_as_before(cfg, origin: dict, saved: dict) -> bool:
    was, made_from = saved["config"], saved.get("origin", origin)
    return all(
        listed(was.get(name)) == listed(getattr(cfg, name))
        and made_from.get(name) == origin.get(name)
        for name in SCORED_BY
    )


def share_model(path: Path, handed_out: bool, model_digest: Callable[[Path], str]) -> None:
    """All ranks start from the weights that rank 0 has. handed_out: rank 0 sends its files to nodes
    that do not share its disk, as it does with the tiny model; `--model` has to be there already.
    Raises: SystemExit, naming rank and host, where the weights differ."""
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    if rank == 0:
        store.set("model", model_digest(path))
        if handed_out:
            blobs = {p.name: bytearray(p.read_bytes()) for p in path.iterdir()}
            tensors = {n: torch.frombuffer(b, dtype=torch.uint8) for n, b in blobs.items()}
            store.set("model files", save(tensors))
    wanted = store.get("model").decode()
    if handed_out and int(os.environ.get("LOCAL_RANK", 0)) == 0 and model_digest(path) != wanted:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        for name, blob in load(store.get("model files")).items():
            (path / name).write_bytes(blob.numpy().tobytes())
    dist.barrier()
    if model_digest(path) != wanted:
        raise SystemExit(
            f"train_cispo.py: error: rank {rank} on {socket.gethostname()}: {path} is not what "
            "rank 0 has under that name; compare config.json and the weight files"
        )


# ---- the directory -------------------------------------------------------------------------------
_held = {}  # this process's lock files by run directory, open until it ends


def hold(run_dir: Path) -> None:
    """Take a run's directory for as long as this process lives: the kernel lets go of it, however
    the process ends. Raises: CheckpointError when another process has it, or when it is no run's,
    and so must not be moved."""
    if (run_dir := run_dir.resolve()) in _held:
        return
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    lock = open(lock_of(run_dir), "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise CheckpointError(
            f"--name {run_dir.name}: {run_dir} is in use by {lock.read()}; wait for its end, or "
            "take another --name"
        ) from None
    lock.truncate(0)
    lock.write(holder_of(os.getpid()))
    lock.flush()
    _held[run_dir] = lock
    empty = run_dir.is_dir() and not any(run_dir.iterdir())
    if run_dir.exists() and not (run_dir / "code").is_dir() and not empty:
        raise CheckpointError(
            f"--name {run_dir.name}: {run_dir} is there and is no run's directory; take another "
            "name"
        )


def begin(
    cfg, paths: list[Path], mesh: Mesh, say: Callable[[str], None], origin: dict | None = None
) -> tuple[Path | None, dict]:
    """Make the run's directory. Returns the checkpoint that the run goes on from and its manifest,
    None and {} where it starts anew, on every rank. `paths` and `origin` are rank 0's; to the
    latter the first version whose scores may be compared is added ("scored_since"). Raises:
    SystemExit when a checkpoint was asked for by name and is not whole."""

    def tell(what):
        """Rank 0's JSON to all ranks."""
        text = json.dumps(what).encode() if mesh.rank == 0 else None
        return json.loads(broadcast_bytes(text, mesh))

    found, saved = choose([Path(path) for path in tell([str(path) for path in paths])], mesh, say)
    if found is None and cfg.resume not in ("auto", "off"):
        raise SystemExit(f"train_cispo.py: error: --resume {cfg.resume}: not whole on every rank")
    mark, word, rescore = cfg.run_dir / ".begun", secrets.token_hex(8), False
    if mesh.rank == 0:
        if found is not None:
            rescore = compare(cfg, origin, saved, say)
        elif cfg.resume == "auto":
            checkpoints = cfg.run_dir / "checkpoints"
            say(f"--resume auto: no whole checkpoint in {checkpoints}, so the run starts anew")
        found = begin_run_dir(cfg, found, saved, say, rescore)
        mark.write_text(word)
    found, word, rescore = tell([str(found or ""), word, rescore])
    found = Path(found) if found else None
    shared = mark.exists() and mark.read_text() == word
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not shared:
        hold(cfg.run_dir)  # a disk of this node's own: what an earlier run left there goes aside
        begin_run_dir(cfg, found, saved, say, rescore)
    return found, saved


def compare(cfg, origin: dict, saved: dict, say: Callable[[str], None]) -> bool:
    """Say what differs from the run that the checkpoint is of. Returns whether scores do, too: the
    best is then looked for from here on."""
    for line in differences(cfg, origin, saved):
        say(line)
    origin["scored_since"] = saved.get("origin", {}).get("scored_since", 0)
    if scores_as_before(cfg, origin, saved):
        return False
    origin["scored_since"], saved["scores"] = saved["step"], {}
    say(
        f"scores of checkpoints before step {saved['step']} are of another reward or "
        "validation: the best one is looked for from here on"
    )
    return True


def begin_run_dir(
    cfg, found: Path | None, saved: dict, say: Callable[[str], None], rescore: bool = False
) -> Path | None:
    """Make the run's directory ready; nobody's results are overwritten. Returns where `found`, the
    checkpoint to go on from, is now. rescore: its own validation is made again, too."""
    run_dir = cfg.run_dir
    if found is not None and found.resolve().parent.parent == run_dir.resolve():
        go_back(run_dir, saved["step"], rescore)
        keep_config(run_dir, saved["step"], cfg.text)
    elif run_dir.exists():
        was = run_dir.resolve()
        asides = (Path(f"{run_dir}.{i}") for i in itertools.count(1))
        aside = next(p for p in asides if not p.exists())
        run_dir.rename(aside)
        say(f"{run_dir} exists: moved to {aside}")
        if found is not None and not found.exists():  # it was in there
            found = aside / found.relative_to(was)
    (run_dir / "code").mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(cfg.text)
    keep_code(run_dir / "code", reward_sources(cfg.reward), saved)
    if cfg.val_reward:
        own = reward_sources(cfg.val_reward)
        keep_reward(run_dir / "code/reward-of-validation", own, saved)
    return found


def go_back(run_dir: Path, step: int, rescore: bool) -> None:
    """Drop the records of steps and validations after a checkpoint: they will be made again."""
    made_before = {
        "metrics": lambda record: record["step"] < step,
        "samples": lambda record: record["step"] < step,
        "validation": lambda record: record["version"] <= step - rescore,
    }
    for name, made in made_before.items():
        path = run_dir / f"{name}.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and made(json.loads(line))]
        path.with_suffix(".tmp").write_text("".join(kept))
        path.with_suffix(".tmp").replace(path)


def keep_config(run_dir: Path, step: int, text: str) -> None:
    """config.json is of the newest steps; what those up to a step were made with goes to
    config-STEP.json."""
    newest, until = run_dir / "config.json", run_dir / f"config-{step:06d}.json"
    later = [path for path in sorted(run_dir.glob("config-*.json")) if path.name >= until.name]
    made_with = (later or [newest])[0]

    def flags(text: str) -> dict:
        return {**json.loads(text), "resume": ""}

    if made_with.exists() and flags(made_with.read_text()) != flags(text):
        made_with.replace(until)
    for path in later:  # of steps that will be made again
        if path != until:
            path.unlink(missing_ok=True)


def keep_code(code: Path, reward_files: dict, saved: dict) -> None:
    """The sources that the run is made with: a forked loss is no flag, but `diff -r` shows it."""
    for old in code.rglob("*.py"):  # of a program before this one, which had other files
        if not old.relative_to(code).parts[0].startswith("reward"):
            old.unlink()
    for file in program_files():
        copy = code / file.relative_to(REPO)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    keep_reward(code / "reward", reward_files, saved)


def keep_reward(kept: Path, files: dict, saved: dict) -> None:
    """A reward's sources. Those of the steps so far are kept where they have changed."""
    sources = {kept / name: text for name, text in relative(files).items()}
    if saved and any(p.exists() and p.read_bytes() != text for p, text in sources.items()):
        before = kept.with_name(f"{kept.name}-before-step-{saved['step']}")
        shutil.rmtree(before, ignore_errors=True)
        kept.rename(before)
    for path, text in sources.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
