"""Train a Qwen3-MoE with CISPO, asynchronously, against vLLM.

    python train_cispo.py --use-cispo                            # this machine: a tiny model, two minutes
    torchrun --nproc-per-node 2 train_cispo.py --use-cispo       # the same on two ranks
    python train_cispo.py --no-use-cispo                         # the same with PPO's clip, for an A/B
    python train_cispo.py --no-local-rollout --hub-host HOST --hub-port 8790    # vLLM on other machines, where
    CISPO_TOKEN=... python rollout.py http://HOST:8790                          # this runs

One step:
    1. wait for num_prompts_per_step groups of num_generations_per_prompt samples; vLLM is already
    on the next ones 2. the trainer's own log-probs of all samples ("prev"), fixed for the step;
    with a KL penalty the reference's too 3. for each batch of train_global_batch_size samples:
    forward, CISPO loss, backward 4. sum of gradients over ranks, clip, AdamW 5. publish the
    weights: written in the background, fetched, verified and loaded by every rollout node 6. log

CISPO: MiniMax-M1, arXiv:2506.13585. Flag and metric names are NeMo RL's where it has one.
"""

import dataclasses
import json
import math
import os
import secrets
import socket
import sys
import textwrap
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import loss
import report
import task
from bridge.flags import piped
from bridge.groups import Group
from bridge.hub import Hub
from bridge.ledger import Ledger
from bridge.processes import LocalRollout
from bridge.publish import Publisher
from bridge.reward_process import reward_digest
from bridge.validation import Validation, due_at_start, read_scores
from bridge.waits import Signals, Wait, WaitOver, agree, stop_word
from bridge.weights import WeightsError, load_hf
from config import Config, parse_config
from model import ModelConfig, Qwen3MoE, expert_load, expert_tokens
from prepare import interruption, known_config, model_digest, prepare, use_cpu
from ranks import ops, plan
from ranks.batch import MicroBatch, left_out, pack_batch, unpack_batch
from ranks.checkpoint import (
    Checkpointer,
    CheckpointError,
    begin,
    load_state_tensors,
    share_model,
    whole,
)
from ranks.parallel import (
    Mesh,
    ShardedAdamW,
    all_reduce,
    broadcast_bytes,
    join_ranks,
    make_mesh,
    reduce_metrics,
)
from report import (
    Clock,
    fetch,
    log_step,
    merge,
    rollout_metrics,
    say,
    say_something,
    sum_up,
    update_metrics,
)


# ---- one update ----------------------------------------------------------------------------------
def micro_batch_logprobs(model, mb: MicroBatch, cfg: Config):
    """log pi and entropy of the sampled tokens, (N padded,), and the experts used, (L, t, K)."""
    hidden_TD, expert_ids = model(mb.tokens_T, mb.cu_seqlens, mb.max_seqlen, mb.expert_ids)
    logprobs, entropy = ops.token_logprobs(
        hidden_TD[mb.rows_N],
        model.head_weight,
        mb.targets_N,
        cfg.temperature,
        cfg.logprob_chunk_size,
        cfg.compile,
        model.mesh.tp_group,
    )
    return logprobs, entropy, expert_ids


@torch.no_grad()
def fix_for_the_step(
    updates: list[list[MicroBatch]], step: int, model, reference, cfg: Config
) -> None:
    """Fill in what stays as it is during all updates of a step: the tokens' ages, the trainer's own
    log-probs ("prev"), the reference's, and, for router replay, the experts that this pass
    chose."""
    for mb in (mb for micro_batches in updates for mb in micro_batches):
        mb.age = step - mb.versions
        mb.prev_logprobs = (
            mb.gen_logprobs
        )  # keeps its place where the loss has no use for prev, and the pass is spared
        if cfg.algorithm.needs_prev:
            mb.prev_logprobs, _, expert_ids = micro_batch_logprobs(model, mb, cfg)
        if reference is not None:
            own_experts = dataclasses.replace(
                mb, expert_ids=None
            )  # those that are given are the policy's
            mb.ref_logprobs, *_ = micro_batch_logprobs(reference, own_experts, cfg)
            if cfg.use_kl_in_reward:
                kl = loss.kl_estimate(mb.prev_logprobs, mb.ref_logprobs, cfg.algorithm)
                mb.advantages = mb.advantages - cfg.reference_policy_kl_penalty * kl
        mb.expert_ids = expert_ids if cfg.router_replay else None


def train_update(
    model, optimizer, micro_batches: list[MicroBatch], counts, cfg: Config, policy_loss
):
    """One optimizer update on this rank's micro-batches. counts: loss tokens and samples of the
    update, all ranks. Returns metrics as tensors, partial over the dp ranks but for grad_norm;
    those of an update that was skipped, since its gradient is not finite, count for nothing.
    Without experts nothing waits for the device."""
    num_tokens, num_seqs = counts
    metrics: dict[str, torch.Tensor] = {}
    alg, head, tp_group = cfg.algorithm, model.head_weight, model.mesh.tp_group
    objective = lambda logprobs, *aux: loss.token_loss(logprobs, *aux[:5], alg, *aux[5:])[0]
    optimizer.zero_grad()
    # In fp32 the head's gradient is added to the main one chunk by chunk; else autograd hands it
    # over, as all others.
    head_grad = (
        head.main_grad if head.requires_grad and head.main_grad.dtype.itemsize >= 4 else None
    )
    for mb in micro_batches:
        ref = (
            mb.gen_logprobs if mb.ref_logprobs is None else mb.ref_logprobs
        )  # without a penalty it is not read
        aux = (mb.prev_logprobs, mb.gen_logprobs, mb.advantages, mb.mask, mb.weights)
        rest = (
            num_tokens,
            alg,
            ref,
            mb.nll_weights,
            mb.sequence,
            num_seqs,
            mb.age,
            cfg.max_trajectory_age_steps,
        )
        if (
            alg.needs_sequences
        ):  # two passes: the gradient of a token waits for the log-probs of its sequence
            logprobs, entropy, expert_ids = micro_batch_logprobs(model, mb, cfg)
            value, stats = policy_loss(logprobs, *aux, *rest)
            value.backward()
        else:
            hidden_TD, expert_ids = model(mb.tokens_T, mb.cu_seqlens, mb.max_seqlen, mb.expert_ids)
            value, logprobs, entropy = ops.fused_head_loss(
                hidden_TD[mb.rows_N],
                head,
                mb.targets_N,
                objective,
                (*aux, ref, mb.nll_weights),
                cfg.temperature,
                cfg.logprob_chunk_size,
                cfg.compile,
                tp_group,
                weight_grad=head_grad,
            )
            value.backward()
            _, stats = policy_loss(logprobs, *aux, *rest)
        stats["entropy"] = torch.where(mb.mask, entropy, 0.0).sum() / num_tokens
        if expert_ids is not None:
            stats["expert_tokens"] = expert_tokens(expert_ids, mb.num_tokens, model)
        metrics = merge(metrics, stats)
    if "expert_tokens" in metrics:  # each rank of a tp group has routed its own slice of the tokens
        all_reduce(metrics["expert_tokens"], tp_group)
    grad_norm, nothing = optimizer.step(), {"_min": math.inf, "_max": -math.inf}
    counted = grad_norm.isfinite()
    return {
        n: torch.where(counted, x, nothing.get(n[-4:], 0)) for n, x in metrics.items()
    }, grad_norm


MAX_SKIPPED = 3  # updates in a row


def skipped_in_a_row(norms: list[float], step: int, before: int) -> tuple[int, str]:
    """How many updates in a row were skipped by the end of a step, given those before it, and why
    the run stops here, or "": MAX_SKIPPED in a row is no accident. Those of this step are named."""
    longest, skipped = before, []
    for update, norm in enumerate(norms, 1):
        before = 0 if math.isfinite(norm) else before + 1
        longest = max(longest, before)
        skipped += [str(update)] if before else []
    if skipped:
        say(
            f"warning: step {step}: update {', '.join(skipped)} of {len(norms)} is skipped: its gradient is not finite"
        )
    why = (
        f"the gradients of {longest} updates in a row were not finite; they were skipped, so the weights are those "
        "before them. Go on with a lower --lr, or --param-dtype float32"
    )
    return before, why if longest >= MAX_SKIPPED else ""


# ---- the run -------------------------------------------------------------------------------------
def build_model(cfg: Config, model_cfg: ModelConfig, mesh: Mesh, checkpoint: Path) -> Qwen3MoE:
    """This rank's part of the model, with the checkpoint's weights."""
    dtype = resolve_dtype(cfg.param_dtype, mesh.device)
    with torch.device(
        "meta"
    ):  # no memory yet, and no initial values that the checkpoint would replace
        model = Qwen3MoE(model_cfg, mesh, cfg.activation_checkpointing).to(dtype)
        if cfg.fp32_lm_head:
            head = model.model["embed_tokens"] if model_cfg.tie_word_embeddings else model.lm_head
            head.to(torch.float32)
    model.to_empty(device=mesh.device)
    load_hf(model, checkpoint)
    if cfg.freeze_moe_router:
        for name, p in model.named_parameters():
            p.requires_grad_(not name.endswith("mlp.gate.weight"))
    if cfg.compile:
        model.compile_blocks()
    return model


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    return getattr(
        torch, {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(name, name)
    )


def about(cfg: Config, hub: Hub, scores: dict[int, float], origin: dict) -> dict:
    """Rank 0's part of a checkpoint. The scores, of validation or else of training, say which
    checkpoint is best."""
    unscored = [version for version in hub.validation.begun if version not in scores]
    return {
        "ledger": hub.ledger_state(),
        "config": dataclasses.asdict(cfg),
        "scores": scores,
        "unscored": unscored,
        "origin": origin,
    }


def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up from lr / 10 over lr_warmup_steps rollout batches, then constant. It moves
    once per batch, not per update, as in the seed system."""
    done = min(1.0, step / cfg.lr_warmup_steps) if cfg.lr_warmup_steps else 1.0
    return cfg.lr * (0.1 + 0.9 * done)


def wait_for_batch(
    hub: Hub, version: int, cfg: Config, rollout: LocalRollout | None
) -> tuple[list[Group] | None, str]:
    """The groups of a step and the word "train", or None and why the run stops here: the deadline,
    a signal, or rollouts that cannot be kept alive."""
    wait, status = Wait("batch", cfg.batch_timeout_s), {}
    try:
        while not (stop := Signals.stop or stop_word()):
            batch = hub.next_batch(version, timeout_s=0.5)
            for line in hub.take_news():
                say(line)
            if batch:
                # The hub never hands over a token older than the bound; this is where it would do
                # harm.
                oldest = min(g.oldest_version for g in batch)
                assert version - oldest <= cfg.max_trajectory_age_steps, (
                    f"a token of v{oldest} at step {version}"
                )
                return batch, "train"
            status = hub.status()
            if rollout is not None:
                rollout.keep(status["taken"] + status["buffered"], say)
            wait.check(f"step {version}, hub: {json.dumps(status)}")
    except RuntimeError as e:
        return None, str(e)
    return None, stop


def wait_for_validation(hub: Hub, cfg: Config, rollout: LocalRollout | None) -> None:
    """At the end of the run: until the last held-out prompt is answered, or it takes too long."""
    wait, why = Wait("validation", cfg.val_timeout_s), ""
    try:
        while (status := hub.status())["validation"]["rounds"] and not (why := Signals.stop):
            wait.check(json.dumps(status["validation"]))
            if rollout is not None:
                rollout.keep(status["taken"] + status["validation"]["answered"], say)
            time.sleep(0.1)  # polling another thread
    except RuntimeError as e:  # the training is done and saved: it is not lost for want of a score
        why = str(e)
    if why:
        say(f"the last validation is not finished: {why}")


def start_hub(cfg: Config, checkpoint: Path, data, vocab_size: int, device) -> Hub:
    """The hub with the run's prompts."""
    prompts, codec, held_out = data
    dtype = str(resolve_dtype(cfg.publish_dtype, device)).removeprefix("torch.")
    run = {
        "num_generations": cfg.num_generations_per_prompt,
        "max_new_tokens": cfg.max_new_tokens,
        "seed": cfg.seed,
        "max_model_len": cfg.max_total_sequence_length,
        "dtype": dtype,
        "fp32_lm_head": cfg.fp32_lm_head,
        **interruption(cfg, codec),
        "recompute_kv_cache": cfg.recompute_kv_cache_after_weight_updates,
        "reward": cfg.reward,
        "reward_digest": reward_digest(cfg.reward),
        "sampling": {
            "n": cfg.num_generations_per_prompt,
            "temperature": cfg.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "max_tokens": cfg.max_new_tokens,
            "logprobs": 0,
            "detokenize": False,
            "stop_token_ids": task.eos_token_ids(checkpoint),
        },
    }
    run["val_sampling"] = {
        **run["sampling"],
        "n": cfg.val_samples,
        "temperature": cfg.val_temperature,
    }
    ledger = Ledger(
        cfg.num_prompts_per_step,
        cfg.max_trajectory_age_steps,
        cfg.max_num_steps,
        cfg.lease_timeout_s,
        cfg.max_prompt_failures,
        prompts,
        cfg.no_resampling_pass_rate,
    )
    token = os.environ.get("CISPO_TOKEN") or secrets.token_urlsafe(32)
    validation = Validation(
        held_out,
        cfg.val_samples,
        cfg.lease_timeout_s,
        cfg.max_prompt_failures,
        cfg.val_pass_threshold,
    )
    hub = Hub(
        ledger, prompts, codec.encode, cfg.run_dir / "weights", vocab_size, token, run, validation
    )
    hub.start(cfg.hub_host, cfg.hub_port)
    return hub


def train(
    cfg: Config,
    checkpoint: Path,
    data: tuple[task.Prompts, task.Codec, list[dict]] | None,
    checkpoints: list[Path] | None = None,
    origin: dict | None = None,
) -> None:
    """The run. Rank 0 alone has data (`load_prompts`), the checkpoints that it may go on from, and
    `origin_of`."""
    # ---- processes and seeds
    join_ranks(cfg.collective_timeout_s)  # the wait for a batch is not one of them: see waits.agree
    share_model(checkpoint, not cfg.model, model_digest)
    model_cfg = ModelConfig.from_dir(checkpoint)
    mesh = make_mesh(cfg.tp, cfg.ep, model_cfg.num_key_value_heads, cfg.collective_timeout_s)
    rank = mesh.rank
    torch.manual_seed(cfg.seed)

    # ---- model and optimizer
    if cfg.logprob_chunk_size == 0:
        cfg = dataclasses.replace(
            cfg, logprob_chunk_size=ops.chunk_rows(model_cfg.vocab_size // cfg.tp)
        )
    model = build_model(cfg, model_cfg, mesh, checkpoint)
    # The KL penalty's reference is a frozen copy of the model that the run starts from.
    reference = (
        build_model(cfg, model_cfg, mesh, checkpoint) if cfg.reference_policy_kl_penalty else None
    )
    optimizer = ShardedAdamW(
        model,
        cfg.max_grad_norm,
        getattr(torch, cfg.grad_dtype),
        lr=cfg.lr,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        eps=cfg.adam_eps,
        weight_decay=cfg.weight_decay,
    )
    policy_loss = torch.compile(loss.policy_loss, dynamic=True) if cfg.compile else loss.policy_loss
    resume, saved = begin(cfg, checkpoints or [], mesh, say, origin)
    start = saved["step"] if resume else 0
    if resume:
        load_state_tensors(
            resume, model, optimizer, updates=next(iter(saved["files"].values()))["updates"]
        )
    saver = Checkpointer(
        cfg.run_dir / "checkpoints", rank, mesh.world_size, cfg.keep_checkpoints, start
    )

    # ---- hub and rollout
    hub = rollout = None
    if rank == 0:
        hub = start_hub(cfg, checkpoint, data, model_cfg.vocab_size, mesh.device)
        prompts, codec, _ = data
        show = lambda ids: codec.decode(ids, special=True)
        trackers, validating = report.Trackers(cfg, start), cfg.validates(0)
        scores = read_scores(cfg.run_dir, cfg.val_samples) if validating else {}
        if resume:
            hub.ledger.restore(saved["ledger"])  # before there are weights to lease a prompt for
            scores = {v: score for v, score in scores.items() if v >= origin["scored_since"]}
            scores = (
                scores if validating else {int(at): score for at, score in saved["scores"].items()}
            )
            say(f"going on from {resume}: step {start}, {saved['ledger']['taken']} prompts trained")
        anew = (
            not resume
            or resume.parent.parent.resolve() != cfg.run_dir.resolve()
            or start == origin["scored_since"]
        )
        due = due_at_start(start, cfg.validates(start), anew, saved.get("unscored", []), scores)
        for version in due if validating else []:
            hub.begin_validation(version)
        if cfg.local_rollout:
            rollout = LocalRollout(
                hub, cfg.run_dir / "rollout", cfg.rollout_args, cfg.run_dir / "rollout.log"
            )
        num_parameters = sum(shape.numel() for shape in model.checkpoint_shapes().values())
        say(
            f"{num_parameters / 1e6:.1f} M parameters on {mesh.world_size} rank(s), "
            f"hub at {hub.url}, weight clamped to [{1 - cfg.algorithm.ratio_clip_min:g}, "
            f"{1 + cfg.algorithm.ratio_clip_max:g}], results in {cfg.run_dir}"
        )
    publisher = Publisher(
        model,
        resolve_dtype(cfg.publish_dtype, mesh.device),
        cfg.run_dir / "weights",
        checkpoint,
        cfg.full_version_every,
        cfg.keep_versions,
        torch.distributed.distributed_c10d._get_default_store(),
        deadline_s=cfg.collective_timeout_s / 2,
        hub=hub,
        port=cfg.hub_port,
    )
    publisher.publish(start)

    # ---- loop
    step, clock, done, word, rewards, silent = start, Clock(), threading.Event(), "train", [], 0
    skipped, stuck = 0, ""  # updates in a row, on rank 0, and why they are too many
    Signals.in_loop = True  # from here on the first signal is a word, not an exception
    if rank == 0:
        here = lambda: (
            f": {len(hub.ledger.buffer)} of {cfg.num_prompts_per_step} prompts, {len(hub.nodes)} rollout "
            "node(s)"
            if clock.doing == "exposed_generation"
            else ""
        )
        now = lambda: f"step {step}, {clock.says(compiles=cfg.compile and step == start)}{here()}"
        log_path = rollout.log_path if rollout else None
        threading.Thread(target=say_something, args=(now, log_path, done), daemon=True).start()
    try:
        hide_bar = (
            True if rank != 0 else None
        )  # None: tqdm shows a bar on a terminal only; the lines come anyway
        for step in tqdm(
            range(start, cfg.max_num_steps), desc="steps", disable=hide_bar, dynamic_ncols=True
        ):
            clock = Clock("exposed_generation")
            lr = learning_rate(step, cfg)
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr

            # 1 wait for a batch: rank 0 has it, says so, and every rank gets it
            ask = rank == 0 and not stuck
            groups, word = wait_for_batch(hub, step, cfg, rollout) if ask else (None, stuck)
            word = agree(step, word, rank, cfg.batch_timeout_s + 60, stop=lambda: Signals.stop)
            if word != "train":
                break
            clock.begin("data_processing")
            blob = broadcast_bytes(pack_batch(groups, cfg) if rank == 0 else None, mesh)
            updates, counts = unpack_batch(blob, cfg, mesh.dp_rank, mesh.dp, mesh.device, mesh.tp)

            # 2 the trainer's own log-probs at the start of the step, fixed for all its updates
            clock.begin("policy_and_reference_logprobs")
            fix_for_the_step(updates, step, model, reference, cfg)

            # 3, 4 the updates: forward, loss, backward, reduce, step
            clock.begin("policy_training")
            metrics: dict[str, torch.Tensor] = {}
            grad_norms = []
            for micro_batches, update_counts in zip(updates, counts):
                stats, grad_norm = train_update(
                    model, optimizer, micro_batches, update_counts, cfg, policy_loss
                )
                metrics = merge(metrics, stats)
                grad_norms.append(grad_norm)
            metrics = expert_load(reduce_metrics(metrics, mesh.dp_group))

            # 5 publish: copies the weights; writing, fetching and loading go on while the next step
            # runs
            clock.begin("publish_copy")
            publisher.publish(step + 1, last=step + 1 == cfg.max_num_steps)
            if rank == 0 and cfg.validates(step + 1):
                hub.begin_validation(step + 1)

            # 6 log and checkpoint
            if rank == 0:
                values = fetch(
                    {**metrics, "grad_norms": torch.stack(grad_norms)}
                )  # sync: one per step
                skipped, stuck = skipped_in_a_row(norms := values.pop("grad_norms"), step, skipped)
                counts = [count for count, norm in zip(counts, norms) if math.isfinite(norm)]
                record = {
                    "step": step,
                    "train/lr": lr,
                    **report.gradient_metrics(norms),
                    "ordinals": [g.ordinal for g in groups],
                    **{
                        f"train/{why}": int(torch.cat(m).sum())
                        for why, m in left_out(groups, cfg).items()
                    },
                    **rollout_metrics(groups, step),
                    **update_metrics(values, counts),
                    **clock.seconds(),
                    **publisher.stats,
                    **hub.take_timing(),
                    "hub": hub.status(),
                }
                log_step(record, cfg.run_dir)
                hub.record = record
                trackers.log(record, "step")
                report.log_samples(groups, step, prompts, show, cfg.run_dir)
                silent = report.count_without_signal(record, silent, cfg.reward, cfg.run_dir)
                rewards.append(record["train/reward"])
                scores |= report.log_validations(hub, show, cfg.run_dir, trackers)
            every = cfg.checkpoint_every_steps
            if every and (
                (step + 1) % every == 0 or cfg.validates(step + 1) or step + 1 == cfg.max_num_steps
            ):
                if (
                    rank == 0 and not validating
                ):  # without validation: the mean reward since the one before
                    scores[step + 1], rewards = sum(rewards) / len(rewards), []
                saver.save(
                    step + 1,
                    model,
                    optimizer,
                    about(cfg, hub, scores, origin) if rank == 0 else None,
                )
        if Signals.asked(word):
            saver.deadline_s = min(saver.deadline_s, Signals.save_within_s())
        if (
            word != "train" and saver.newest_step != step
        ):  # asked to stop before this step: all before it is whole
            saver.save(
                step, model, optimizer, about(cfg, hub, scores, origin) if rank == 0 else None
            )
        saver.wait()
        publisher.close()
        finished = word == "train"
        if finished and publisher.error:
            word = str(publisher.error)
        if rank == 0:
            if word == "train":
                clock.begin("validation")
                wait_for_validation(hub, cfg, rollout)
            scores |= report.log_validations(hub, show, cfg.run_dir, trackers)
            if word != "train":
                state = f"its state is in {saver.root} (go on with --resume auto)"
                state = (
                    state
                    if whole(saver.root)
                    else "before any was trained, so there is no state to go on from"
                )
                say(f"stopped at step {step}, {state}: {word}")
        # every node's files are served until rank 0 needs no more answers from the rollout nodes
        if finished:
            # Rank 0 may be as late as its own waits since the last step allow, one after the other.
            rank_0_may_take = saver.deadline_s + publisher.deadline_s + cfg.val_timeout_s + 60
            agree(cfg.max_num_steps, "over", rank, rank_0_may_take, stop=lambda: Signals.stop)
        if word != "train" and not Signals.asked(word):
            raise SystemExit(f"train_cispo.py: rank {rank}: stopped at step {step}: {word}")
    finally:
        done.set()
        if rollout is not None:
            rollout.stop()
        if hub is not None:
            trackers.close()
            hub.close(patience_s=0.0 if cfg.local_rollout else 5.0)
    if rank == 0 and word == "train":
        sum_up(cfg.run_dir, max(start, cfg.max_num_steps), scores)
    torch.distributed.destroy_process_group()


def main() -> None:
    Signals.install()
    of_torchrun = lambda name, default: int(os.environ.get(name, default))
    rank, world_size = of_torchrun("RANK", 0), of_torchrun("WORLD_SIZE", 1)
    try:
        cfg = parse_config(sys.argv[1:])
        if cfg.dry_run:
            if rank == 0:  # one process plans for others
                with piped():
                    plan.print_report(
                        known_config(cfg), cfg, world_size if world_size > 1 else cfg.dry_run_ranks
                    )
            return
        if not torch.cuda.is_available():
            use_cpu(cfg, of_torchrun("LOCAL_WORLD_SIZE", 1))
        what_to_train = prepare(cfg, rank, world_size, of_torchrun("LOCAL_RANK", 0))
    except (ValueError, CheckpointError, WeightsError) as e:
        if of_torchrun("LOCAL_RANK", 0) == 0:  # once on each node: it may be about this one's disk
            where = f"rank {rank} on {socket.gethostname()}: " if rank else ""
            print(f"train_cispo.py: error: {where}{e}", file=sys.stderr)
        sys.exit(2)
    if rank == 0:
        values = "  ".join(f"{name}={value!r}" for name, value in json.loads(cfg.text).items())
        print(textwrap.fill(values, 120, break_long_words=False, break_on_hyphens=False))
        for warning in cfg.warnings():
            say(f"warning: {warning}")
    try:
        train(cfg, *what_to_train)
    except (
        CheckpointError,
        WeightsError,
        WaitOver,
        OSError,
        torch.OutOfMemoryError,
        dist.DistError,
    ) as e:
        # What a machine, a disk or another process can do; anything else is ours, and shows where
        # it comes from.
        advice = {
            torch.OutOfMemoryError: "; lower --max-tokens-per-micro-batch, or see --dry-run",
            dist.DistError: "; another rank has ended or cannot be reached: its own error says why",
        }
        text = " ".join(str(e).split())[:600] + next(
            (a for kind, a in advice.items() if isinstance(e, kind)), ""
        )
        raise SystemExit(
            f"train_cispo.py: error: rank {rank} on {socket.gethostname()}: {text}"
        ) from None
    if Signals.stop == "Ctrl-C":
        sys.exit(130)


if __name__ == "__main__":
    main()
