"""Train a Qwen3-MoE with CISPO, asynchronously, against vLLM.

    python train_cispo.py --use-cispo                         # a tiny model, two minutes
    torchrun --nproc-per-node 2 train_cispo.py --use-cispo    # the same on two ranks
    python train_cispo.py --no-use-cispo                      # the same with PPO's clip, for an A/B
    python train_cispo.py --no-local-rollout --hub-host HOST --hub-port 8790    # vLLM elsewhere:
    CISPO_TOKEN=... python rollout.py http://HOST:8790                          # run this there

One step:
    1. wait for num_prompts_per_step groups of num_generations_per_prompt samples; meanwhile vLLM
       is at work on the next ones
    2. the trainer's own log-probs of all samples ("prev"), fixed for the step; with a KL penalty
       the reference model's too
    3. for each batch of train_global_batch_size samples: forward, CISPO loss, backward
    4. sum of gradients over ranks, clip, AdamW
    5. publish the weights: written in the background; every rollout node fetches, verifies and
       loads them
    6. log

CISPO: MiniMax-M1, arXiv:2506.13585. Flag and metric names are NeMo RL's where it has one.
"""

import sys

from presets import PRESETS, config_or_exit, refuse

if __name__ == "__main__":  # --help and wrong flags are answered before torch is imported: seconds
    FLAGS = config_or_exit(sys.argv[1:])

import dataclasses
import faulthandler
import os
from pathlib import Path

import torch
import torch.distributed as dist

import loss
from bridge.flags import piped
from bridge.rollouts import Rollouts, Stop
from bridge.token_values import TokenValues
from bridge.waits import Signals
from bridge.weights import WeightsError, load_hf
from config import Config
from model import ModelConfig, Qwen3MoE, expert_load, expert_stats
from prepare import (
    ADVICE,
    check_plan,
    known_config,
    model_digest,
    prepare,
    resolve_dtype,
    run_for_nodes,
    use_machine,
    with_advice,
    with_chunk_size,
)
from ranks import dry_run, ops
from ranks.after_checkpoint import AfterCheckpoint
from ranks.batch import Batch, MicroBatch, made_up, micro_batches_of, pack_batch
from ranks.checkpoint import Checkpointer, CheckpointError
from ranks.parallel import (
    Mesh,
    ShardedAdamW,
    all_reduce,
    broadcast_bytes,
    join_ranks,
    make_mesh,
    merge,
    reduce_metrics,
    reduction_of,
)
from ranks.replay import give_experts
from ranks.resume import about, checkpoint_due, start_or_resume
from ranks.run_dir import share_model
from report import Log, say_flags


# ---- one update ----------------------------------------------------------------------------------
def my_share(groups, batch: Batch, cfg: Config, model):
    """This rank's micro-batches of each update, and the update's loss tokens and samples on all
    ranks. groups: rank 0's, for the experts to replay."""
    mesh, against = model.mesh, (cfg.use_leave_one_out_baseline, cfg.advantage_scale)
    advantages_PS = loss.group_advantages(batch.rewards_PS, batch.valid_PS, *against)
    share = (mesh.dp_rank, mesh.dp, mesh.device, mesh.tp)
    updates, counts = micro_batches_of(batch, advantages_PS, cfg, *share)
    give_experts(groups, batch, updates, cfg, mesh, model.cfg)
    return updates, counts


def micro_batch_logprobs(model, mb: MicroBatch, cfg: Config):
    """log pi and entropy of the sampled tokens, (N padded,), and the experts used, (L, t, K)."""
    hidden_TD, expert_ids = model(mb.tokens_T, mb.cu_seqlens, mb.max_seqlen, mb.expert_ids)
    head = (cfg.temperature, cfg.logprob_chunk_size, cfg.compile, model.mesh.tp_group)
    logprobs, entropy = ops.token_logprobs(
        hidden_TD[mb.rows_N], model.head_weight, mb.targets_N, *head
    )
    return logprobs, entropy, expert_ids


@torch.no_grad()
def fix_for_the_step(
    updates: list[list[MicroBatch]], step: int, model, reference, cfg: Config
) -> None:
    """Fill in what stays as it is during all updates of a step: the tokens' ages, the trainer's own
    log-probs ("prev"), the reference's, and, for the trainer's router replay, the experts that this
    pass chose."""
    for mb in (mb for micro_batches in updates for mb in micro_batches):
        mb.age = step - mb.versions
        # keeps its place where the loss has no use for prev, and the pass is spared
        mb.prev_logprobs = mb.gen_logprobs
        if cfg.algorithm.needs_prev:
            mb.prev_logprobs, _, expert_ids = micro_batch_logprobs(model, mb, cfg)
        if reference is not None:
            # those that are replayed are the policy's
            own_experts = dataclasses.replace(mb, expert_ids=None)
            mb.ref_logprobs, *_ = micro_batch_logprobs(reference, own_experts, cfg)
            if cfg.use_kl_in_reward:
                kl = loss.kl_estimate(mb.prev_logprobs, mb.ref_logprobs, cfg.algorithm)
                mb.advantages = mb.advantages - cfg.reference_policy_kl_penalty * kl
        if cfg.router_replay == "trainer":
            mb.expert_ids = expert_ids


def tokens_of(mb: MicroBatch) -> loss.Tokens:
    """What the loss reads of a micro-batch. Without a KL penalty `ref` is there, and not read."""
    ref = mb.gen_logprobs if mb.ref_logprobs is None else mb.ref_logprobs
    own = (mb.prev_logprobs, mb.gen_logprobs, mb.advantages, mb.mask, mb.weights)
    return loss.Tokens(*own, ref, mb.nll_weights)


def train_update(
    model, optimizer, micro_batches: list[MicroBatch], counts, cfg: Config, policy_loss
):
    """One optimizer update on this rank's micro-batches. counts: loss tokens and samples of the
    update, all ranks. Returns metrics as tensors, partial over the dp ranks but for grad_norm;
    those of an update that was skipped, since its gradient is not finite, count for nothing.
    Without experts nothing waits for the device."""
    num_tokens, num_seqs = counts
    metrics: dict[str, torch.Tensor] = {}
    alg, weight, tp_group = cfg.algorithm, model.head_weight, model.mesh.tp_group

    def objective(logprobs, *tokens):
        return loss.token_loss(logprobs, loss.Tokens(*tokens), alg)[0]

    optimizer.zero_grad()
    # In fp32 the head's gradient is added to the main one chunk by chunk; else autograd hands it
    # over, as all others.
    added = weight.requires_grad and weight.main_grad.dtype.itemsize >= 4
    head_grad = optimizer.grad_so_far(weight) if added else None
    head = (cfg.temperature, cfg.logprob_chunk_size, cfg.compile, tp_group)
    for i, mb in enumerate(micro_batches, start=1):
        tokens = tokens_of(mb)
        if i == len(micro_batches):
            optimizer.expect_last()
        rest = (alg, num_tokens, num_seqs, mb.sequence, mb.age, cfg.max_trajectory_age_steps)
        if alg.needs_sequences:  # two passes: a token's gradient waits for its whole sequence
            logprobs, entropy, expert_ids = micro_batch_logprobs(model, mb, cfg)
            value, stats = policy_loss(logprobs, tokens, *rest)
            value.backward()
        else:
            hidden_TD, expert_ids = model(mb.tokens_T, mb.cu_seqlens, mb.max_seqlen, mb.expert_ids)
            value, logprobs, entropy = ops.fused_head_loss(
                hidden_TD[mb.rows_N], weight, mb.targets_N, objective, tokens, *head, head_grad
            )
            value.backward()
            _, stats = policy_loss(logprobs, tokens, *rest)
        mb.logprobs = logprobs.detach()
        stats["entropy"] = torch.where(mb.mask, entropy, 0.0).sum() / num_tokens
        if expert_ids is not None:
            stats |= expert_stats(expert_ids, mb, num_tokens, model)
        metrics = merge(metrics, stats)
    if "expert_tokens" in metrics:  # each rank of a tp group has routed its own slice of the tokens
        all_reduce(metrics["expert_tokens"], tp_group)
    grad_norm = optimizer.step()
    counted = grad_norm.isfinite()
    metrics = {n: torch.where(counted, x, reduction_of(n).nothing) for n, x in metrics.items()}
    return metrics, grad_norm


def token_values(updates: list[list[MicroBatch]], batch: Batch, cfg: Config, mesh) -> TokenValues:
    """What the step's updates made of each token, on every rank."""
    found_3F = torch.zeros(3, len(batch.token_ids), device=mesh.device)
    no_terms = {"reference_policy_kl_penalty": 0.0, "positive_example_nll_weight": 0.0}
    alone = dataclasses.replace(cfg.algorithm, **no_terms)  # terms that no advantage is in
    for mb in (mb for micro_batches in updates for mb in micro_batches):
        tokens, logprobs = tokens_of(mb), mb.logprobs.requires_grad_()
        loss_N, parts = loss.token_loss(logprobs, tokens, alone, mb.sequence)
        (grad_N,) = torch.autograd.grad(loss_N.sum(), logprobs)
        # whichever loss it is: how far the gradient of log pi goes for an advantage of 1
        weight_N = -grad_N / (tokens.advantages * tokens.weights)
        found_3N = torch.stack([parts.curr - parts.gen, weight_N, torch.ones_like(weight_N)])
        found_3N = torch.where(mb.mask, found_3N, 0.0)[:, : len(mb.places_N)]
        found_3F[:, mb.places_N] += found_3N  # += since a masked micro-batch repeats a row
    all_reduce(found_3F, mesh.dp_group)
    log_ratios_F, weights_F, there_F = found_3F.cpu()
    log_ratios_F[there_F == 0] = weights_F[there_F == 0] = torch.nan  # not sampled, but put in
    return TokenValues(batch.rows_PS, batch.lengths, log_ratios_F, weights_F)


# ---- what is compiled ----------------------------------------------------------------------------
class GradientsOnly:
    """In the optimizer's place where there is to be no update: the gradients are given up."""

    def __init__(self, optimizer: ShardedAdamW):
        self.zero_grad, self.grad_so_far = optimizer.zero_grad, optimizer.grad_so_far
        self.norm = torch.ones((), device=optimizer.mesh.device)

    def expect_last(self) -> None:
        """No sum over the ranks begins."""

    def step(self) -> torch.Tensor:
        self.zero_grad()
        return self.norm


def compile_ahead(model, reference, optimizer, start: int, cfg: Config, policy_loss) -> None:
    """Compile what an update runs, with samples that nobody made, while vLLM starts: the first step
    need not wait for it. Nothing is changed by it."""
    groups = made_up(cfg, model.cfg, start)
    updates, counts = my_share(groups, Batch.unpack(pack_batch(groups, cfg)), cfg, model)
    fix_for_the_step(updates[:1], start, model, reference, cfg)
    train_update(model, GradientsOnly(optimizer), updates[0], counts[0], cfg, policy_loss)


# ---- the run -------------------------------------------------------------------------------------
def build_model(cfg: Config, model_cfg: ModelConfig, mesh: Mesh, checkpoint: Path) -> Qwen3MoE:
    """This rank's part of the model, with the checkpoint's weights."""
    dtype = resolve_dtype(cfg.param_dtype, mesh.device)
    # no memory yet, and no initial values that the checkpoint would replace
    with torch.device("meta"):
        model = Qwen3MoE(model_cfg, mesh, cfg.activation_checkpointing).to(dtype)
        # on CUDA a bf16 weight gives fp32 logits; an fp32 one would cost ten times as much
        if cfg.fp32_lm_head and mesh.device.type != "cuda":
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


def build_optimizer(cfg: Config, model: Qwen3MoE) -> ShardedAdamW:
    return ShardedAdamW(
        model,
        cfg.max_grad_norm,
        getattr(torch, cfg.grad_dtype),
        lr=cfg.lr,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        eps=cfg.adam_eps,
        weight_decay=cfg.weight_decay,
    )


def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up from lr / 10 over lr_warmup_steps rollout batches, then constant. It moves
    once per batch, not per update, as in NeMo RL."""
    done = min(1.0, step / cfg.lr_warmup_steps) if cfg.lr_warmup_steps else 1.0
    return cfg.lr * (0.1 + 0.9 * done)


def set_lr(optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def train(cfg: Config, checkpoint: Path, data, checkpoints=None, origin=None) -> None:
    """The run. Rank 0 alone has data (prompts, codec, held-out examples: `load_prompts`), the
    checkpoints that it may go on from, and `origin_of`."""
    # ---- ranks, model, optimizer
    join_ranks(cfg.collective_timeout_s)  # the wait for a batch is not one of them: see waits.agree
    share_model(checkpoint, not cfg.model, model_digest)
    model_cfg = ModelConfig.from_dir(checkpoint)
    mesh = make_mesh(cfg.tp, cfg.ep, model_cfg.num_key_value_heads, cfg.collective_timeout_s)
    torch.manual_seed(cfg.seed)
    cfg = with_chunk_size(cfg, model_cfg, mesh.device)
    model = build_model(cfg, model_cfg, mesh, checkpoint)
    kl = cfg.reference_policy_kl_penalty  # the reference is a frozen copy of the starting model
    reference = build_model(cfg, model_cfg, mesh, checkpoint) if kl else None
    optimizer = build_optimizer(cfg, model)
    policy_loss = torch.compile(loss.policy_loss, dynamic=True) if cfg.compile else loss.policy_loss
    start = start_or_resume(cfg, checkpoints, mesh, origin, model, optimizer)
    saved_in, ranks = cfg.run_dir / "checkpoints", (mesh.rank, mesh.world_size)
    sent_as = resolve_dtype(cfg.publish_dtype, mesh.device)
    run = run_for_nodes(cfg, checkpoint, data, sent_as)

    # ---- the loop. Rollouts and Log are on every rank; what is rank 0's does nothing elsewhere
    with (
        AfterCheckpoint(cfg.after_checkpoint, cfg.run_dir) as after,
        Checkpointer(saved_in, *ranks, cfg.keep_checkpoints, start.step, after) as saver,
        Rollouts(cfg, model, sent_as, checkpoint, data, run, start) as rollouts,
        Log(cfg, rollouts, data, start) as log,
    ):

        def save(version: int) -> None:
            state = about(cfg, rollouts.hub, log.scores, origin)
            saver.save(version, model, optimizer, state)

        log.begin_run(model)
        rollouts.publish(start.step)
        # a vLLM that measures the trainer's GPU would take what is allocated meanwhile for its own
        if cfg.compile and start.step < cfg.max_num_steps and not rollouts.vllm_on_trainers_gpus:
            log.begin("compile")
            compile_ahead(model, reference, optimizer, start.step, cfg, policy_loss)
        Signals.in_loop = True  # from here on the first signal is a word, not an exception
        for step in log.steps():
            lr = set_lr(optimizer, learning_rate(step, cfg))
            # 1 wait for a batch: rank 0 has it, says so, and every rank gets it
            groups = rollouts.next_groups(step)
            if rollouts.stop:
                break
            log.begin("data_processing")
            batch = Batch.unpack(broadcast_bytes(groups and pack_batch(groups, cfg), mesh))
            updates, counts = my_share(groups, batch, cfg, model)
            # 2 the trainer's own log-probs at the start of the step, fixed for all its updates
            log.begin("policy_and_reference_logprobs")
            fix_for_the_step(updates, step, model, reference, cfg)
            # 3, 4 the updates: forward, CISPO loss, backward; sum over ranks, clip, AdamW
            log.begin("policy_training")
            for micro_batches, num in zip(updates, counts):
                log.add(*train_update(model, optimizer, micro_batches, num, cfg, policy_loss))
            metrics = expert_load(reduce_metrics(log.metrics, mesh.dp_group))
            # 5 publish: copies the weights; the rest goes on while the next step runs
            log.begin("publish_copy")
            rollouts.publish(step + 1)
            # 6 log and checkpoint
            values = token_values(updates, batch, cfg, mesh) if cfg.log_tokens else None
            log.record(groups, lr, metrics, counts, values)
            if checkpoint_due(step + 1, cfg):
                log.score(step + 1)
                save(step + 1)
        stop = end(log, rollouts, saver, save, after)
    if stop is None:
        log.sum_up()
    elif stop.kind == "failure":
        where = f"rank {mesh.rank}: stopped at step {log.step}"
        raise SystemExit(f"train_cispo.py: {where}: {stop.why}")
    dist.destroy_process_group()


def end(log: Log, rollouts: Rollouts, saver: Checkpointer, save, after) -> Stop | None:
    """The end of the loop, on every rank: what is written is waited for, and what was stopped
    before its last step saves all that came before."""
    finished = rollouts.stop is None
    if not finished and rollouts.stop.kind == "signal":
        saver.deadline_s = min(saver.deadline_s, Signals.save_within_s())
        after.patience_s = 0.0  # the grace is the save's
    if not finished and saver.newest_step != log.step:
        save(log.step)
    saver.wait()
    rollouts.finish_publishing()
    log.begin("validation")
    rollouts.finish_validation()
    log.end(saver.root)
    if finished:
        rollouts.wait_for_rank_0(saver.deadline_s)
    return rollouts.stop


def main(cfg: Config | None = None) -> None:
    Signals.install()
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    ranks, ranks_here = (int(os.environ.get(f"{of}WORLD_SIZE", 1)) for of in ("", "LOCAL_"))
    cfg = cfg or config_or_exit(sys.argv[1:])
    try:
        if cfg.dry_run:
            if rank == 0:  # one process plans for others
                with piped():
                    planned = ranks if ranks > 1 else cfg.dry_run_ranks
                    dry_run.print_report(known_config(cfg), cfg, planned)
                    check_plan(cfg)  # refuses what a run would refuse
            return
        ops.use_flash_attention(cfg.flash_attention)
        use_machine(cfg, ranks_here, bool(PRESETS[cfg.preset].model))
        what_to_train = prepare(cfg, rank, ranks, local_rank)
    except (ValueError, CheckpointError, WeightsError) as e:
        refuse(e)
    if rank == 0:
        say_flags(cfg)
    try:
        train(cfg, *what_to_train)
    except tuple(ADVICE) as e:
        raise SystemExit(f"train_cispo.py: error: {with_advice(e, rank)}") from None
    if Signals.stop == "Ctrl-C":
        sys.exit(130)


if __name__ == "__main__":
    faulthandler.enable()  # a crash in a library says where, which the library seldom does
    main(FLAGS)
