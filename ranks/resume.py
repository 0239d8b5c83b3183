"""Where a run begins, and what it needs to go on from there."""

import dataclasses
from typing import NamedTuple

import torch

from bridge.console import say
from bridge.validation import due_at_start, read_scores
from ranks.checkpoint import load_state_tensors
from ranks.run_dir import begin


class Start(NamedTuple):
    """Where a run begins."""

    step: int
    saved: dict  # the checkpoint's manifest; {} if the run starts anew
    scores: dict[int, float]  # by version; rank 0 alone has these
    due: list[int]  # versions to validate at once


def start_or_resume(cfg, checkpoints, mesh, origin, model, optimizer) -> Start:
    """Load the newest checkpoint that is whole on every rank, if the run is to go on from one."""
    path, saved = begin(cfg, checkpoints or [], mesh, say, origin)
    step, anew = (saved["step"], False) if path else (0, True)
    if path:
        load_state_tensors(path, model, optimizer, next(iter(saved["files"].values()))["updates"])
    if mesh.device.type == "cuda":
        # loading has left cached blocks of sizes that no step asks for; kept, they would cost the
        # first update an allocation that fails, and a flush of everything
        torch.cuda.empty_cache()
    if mesh.rank:
        return Start(step, saved, {}, [])
    validating = cfg.validates(0)
    scores = read_scores(cfg.run_dir, cfg.val_samples) if validating else {}
    if path:
        scores = {v: score for v, score in scores.items() if v >= origin["scored_since"]}
        if not validating:
            scores = {int(v): score for v, score in saved["scores"].items()}
        taken = saved["ledger"]["taken"]
        say(f"going on from {path}: step {step}, {taken} prompts trained")
        of_another_run = path.parent.parent.resolve() != cfg.run_dir.resolve()
        anew = of_another_run or step == origin["scored_since"]
    due = due_at_start(step, cfg.validates(step), anew, saved.get("unscored", []), scores)
    return Start(step, saved, scores, due if validating else [])


def about(cfg, hub, scores: dict[int, float], origin) -> dict | None:
    """Rank 0's part of a checkpoint. The scores, of validation or else of training, say which
    checkpoint is best."""
    if hub is None:
        return None
    unscored = [version for version in hub.validation.begun if version not in scores]
    return {
        "ledger": hub.ledger_state(),
        "config": dataclasses.asdict(cfg),
        "scores": scores,
        "unscored": unscored,
        "origin": origin,
    }


def checkpoint_due(version: int, cfg) -> bool:
    """Whether a checkpoint is written of this version."""
    every = cfg.checkpoint_every_steps
    last = version == cfg.max_num_steps
    return bool(every) and (version % every == 0 or cfg.validates(version) or last)
