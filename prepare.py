"""What a run needs before its ranks meet: model, prompts, tokenizer. What cannot work is refused
here, with one line."""

import contextlib
import dataclasses
import os
import re
import shlex
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from blake3 import blake3
from safetensors import SafetensorError

import data
import task
from bridge.flags import flag_of, parse_flags
from bridge.hub import check_address
from bridge.processes import cores, why_no_gpu
from bridge.reward_pool import check_reward, roles_asked_for, try_reward
from bridge.reward_process import built_in, reward_digest, reward_sources, takes
from bridge.vllm import no_replay
from bridge.waits import WaitOver
from bridge.weights import (
    INDEX,
    STATIC_FILES,
    WeightsError,
    checkpoint_files,
    digest,
    read_tensors,
    stored_tensors,
    tensor_bytes,
)
from config import Config, RolloutConfig
from model import KNOWN_MODELS, ModelConfig
from ranks import ops, plan
from ranks.checkpoint import CheckpointError
from ranks.run_dir import checkpoints_to_try, hold
from report import say
from rewards import check_answers


# ---- before the ranks meet -----------------------------------------------------------------------
def prepare(cfg: Config, rank: int, world_size: int, local_rank: int) -> tuple:
    """What `train` takes beside its flags. All that can be refused is refused here, before ranks
    meet and before anything that takes long. Raises: ValueError, CheckpointError, WeightsError."""
    if model_cfg := known_config(cfg):
        plan.check(model_cfg, cfg, world_size)
    if rank == 0:
        check_address(cfg.hub_host, cfg.hub_port)
        hold(cfg.run_dir)
    if rank == 0:
        check_replay(cfg)
        reward_takes(cfg)
    examples = load_examples(cfg) if rank == 0 else None  # before a model is downloaded
    held_out = load_held_out(cfg, examples) if rank == 0 else None
    if rank == 0:
        check_rewards(cfg, examples.parts, [*held_out.values()])
    checkpoint = resolve_model(cfg, rank)
    if model_cfg is None:
        plan.check(ModelConfig.from_dir(checkpoint), cfg, world_size)
    data = load_prompts(cfg, checkpoint, examples, held_out) if rank == 0 else None
    # raises what loading would; the others of this node have the same files
    if cfg.model and local_rank == 0:
        stored_tensors(checkpoint, ModelConfig.from_dir(checkpoint).checkpoint_shapes())
    origin = origin_of(cfg, checkpoint, examples, held_out) if rank == 0 else None
    return checkpoint, data, checkpoints_to_try(cfg, origin) if rank == 0 else [], origin


def use_machine(cfg: Config, local_world_size: int, real: bool) -> None:
    """Settings for what this machine has, GPUs or not. Raises: ValueError as `use_cpu` does."""
    if not torch.cuda.is_available():
        use_cpu(cfg, local_world_size, real)
    if cfg.compile and "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        from torch._inductor import config as inductor  # two seconds, so after what refuses a run

        # torch takes up to 32 processes for each rank; the ranks of a node compile all at once
        inductor.compile_threads = max(1, min(32, cores() // local_world_size))


def use_cpu(cfg: Config, local_world_size: int, real: bool) -> None:
    """For a machine without a GPU. real: the preset is for a real model. Raises: ValueError for
    what it cannot train or compile."""
    why = why_no_gpu()
    if real and not Path(cfg.model).is_dir():  # a directory may hold a small one
        raise ValueError(
            f"--preset {cfg.preset}: {cfg.model} needs GPUs, and torch sees none here; "
            f"--dry-run prints the plan{why and '; '}{why}"
        )
    if why and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        say(f"warning: {why}; this trains on the CPU")
    if cfg.compile and (path := uncompilable_path()):
        raise ValueError(
            f"--compile: torch's compiler cannot use {path!r}, for the space or quote in it; use "
            "--no-compile, or other places (.venv, TORCHINDUCTOR_CACHE_DIR, TMPDIR)"
        )
    torch.set_num_threads(cfg.cpu_threads or max(1, cores() // (2 * local_world_size)))


def uncompilable_path() -> str:
    """A path that torch gives to the C++ compiler without quotes, and that needs them; "" if there
    is none."""
    paths = (
        str(Path(torch.__file__).parent),
        os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir(),
    )
    return next((path for path in paths if set(path) & set(" \t\n\"'\\")), "")


# ---- model ---------------------------------------------------------------------------------------
def known_config(cfg) -> ModelConfig | None:
    """What can be said of --model before anything is downloaded or made: by its directory or what
    the Hub's cache has of it, else by KNOWN_MODELS; None for a hub id that neither knows. Raises:
    ValueError for that under --dry-run."""
    if not cfg.model:
        return task.tiny_config(cfg.task)
    if path := model_here(cfg.model):
        try:
            return ModelConfig.from_dir(path)
        except (ValueError, OSError) as e:
            raise ValueError(f"--model {cfg.model}: {e}") from None
    if cfg.dry_run and cfg.model not in KNOWN_MODELS:
        raise ValueError(
            f"--dry-run: --model {cfg.model!r} is neither a directory, nor in the Hub's cache, nor "
            f"{', '.join(KNOWN_MODELS)}; a directory with the model's config.json is enough"
        )
    return KNOWN_MODELS.get(cfg.model)


def model_here(name: str) -> Path | None:
    """Where this machine has the config.json of a model: in a directory of that name, or in the
    Hub's cache. Nothing is asked of a network."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no hub id: a path, say, whose directory is gone
        return None
    return Path(found).parent if isinstance(found, str) else None


def fetch_model(name: str, files: list[str]) -> Path:
    """A model's directory: the one of that name, or what the Hugging Face Hub has of these
    files."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as e:
        where = (
            f"--model {name!r}: no directory {Path(name).absolute()}, nor to be had from the Hub"
        )
        raise data.hub_error(where, e) from None
    if not (path / "config.json").exists():
        raise ValueError(f"--model {name!r}: the repository has no config.json")
    return path


def resolve_model(cfg: Config, rank: int) -> Path:
    """The checkpoint directory to start from: --model, or the tiny one, which rank 0 makes when it
    is missing. Raises: ValueError for one that cannot be trained."""
    if cfg.model:
        # The small files come first: they tell whether this model can be trained. Of the large
        # files only the weights are fetched.
        small = [*STATIC_FILES, INDEX]
        path = fetch_model(cfg.model, small)
        ModelConfig.from_dir(path)
        fetch_model(cfg.model, [*small, *(file.name for file in checkpoint_files(path))])
        return path
    made_by = f"{cfg.task}-{task.task_digest(cfg.task)}-{cfg.warm_start_accuracy}-seed{cfg.seed}"
    path = Path("checkpoints") / f"tiny-{made_by}"
    if rank == 0 and not path.exists():
        task.warm_start(path, cfg.task, cfg.seed, cfg.warm_start_accuracy, say)
    return path


# ---- data ----------------------------------------------------------------------------------------
def read_all(names: list[str], split: str, cfg: Config, flag: str) -> list[data.Examples]:
    """These data sets. The split is of those that have some; where none has, it is refused."""
    rows = [data.is_row_file(name) for name in names]
    splits = ["train" if row_file and not all(rows) else split for row_file in rows]
    columns = (cfg.prompt_column, cfg.answer_column, flag)
    return [data.read_data(name, of, *columns) for name, of in zip(names, splits)]


@contextlib.contextmanager
def naming(flag: str):
    """An error about --reward, where the function is that of this flag."""
    try:
        yield
    except ValueError as e:
        raise ValueError(str(e).replace("--reward", flag, 1)) from None


# What a reward raises whatever the sample says: it would judge none.
ALWAYS = re.compile(r"it raised (ImportError|ModuleNotFoundError|NameError|UnboundLocalError)\b")
MISSING = re.compile(r"it raised KeyError: (['\"])(.*?)\1")


def check_rewards(cfg: Config, trained: list[data.Examples], held_out: list[data.Examples]) -> None:
    """Try the rewards on the data sets that they are for: ours on the answers themselves, a user's
    own on a row of each. Says what looks wrong. Raises: ValueError for one that cannot work."""
    val_flag = "val_reward" if cfg.val_reward else "reward"
    judges: dict[str, list[data.Examples]] = {"reward": [*trained]}
    judges.setdefault(val_flag, []).extend(held_out)
    for name, parts in judges.items():
        flag, spec = flag_of(name), getattr(cfg, name)
        with naming(flag):
            own = reward_sources(spec)
            rows = [part[0] for part in parts if own]
            answers = try_reward(spec, rows, *reward_limits(cfg)) if rows else []
            for part in parts if not own else []:
                if warning := check_answers(spec, part, part.name):
                    say(f"warning: {warning}".replace("--reward", flag, 1))
        for part, answer in zip(parts, answers):
            if answer:
                tell_of_trial(f"{flag} {spec}: tried on the answer of {part.name}", part[0], answer)


def tell_of_trial(what: str, row: dict, answer: dict) -> None:
    """Of a reward that gave none for a row 0. Raises: ValueError where it will give no other."""
    error, kind = answer["error"], answer["kind"]
    why, missing = f"{what} row 0, {error}", MISSING.match(error)
    if missing and missing[2] not in row:
        raise ValueError(f"{why}; the row has {', '.join(row)}")
    if kind == "wrong_type" or ALWAYS.match(error):
        raise ValueError(why)
    say(f"warning: {why}; a sample for which it does that counts as dropped")


def load_examples(cfg: Config) -> data.Examples | task.Several:
    """The run's data set. Raises: ValueError for one that cannot be read, or has not what the
    template names."""
    if cfg.data:
        names, counts = data.mix_of(cfg.data)
        parts = read_all(names, cfg.data_split, cfg, "--data")
        examples = task.Several(parts, counts) if len(parts) > 1 else parts[0]
    else:
        examples = data.Examples(
            task.task_examples(cfg.task, 20_000, cfg.seed), name=f"--task {cfg.task}"
        )
    examples.template(data.text_of(cfg.prompt_template))
    return examples


def load_held_out(cfg: Config, examples) -> dict[str, data.Examples]:
    """The data sets of validation by name. Raises: ValueError as `load_examples` does."""
    if not cfg.validates(0):
        return {}
    if not cfg.val_data:
        found = task.held_out_examples(cfg.task, 64, cfg.seed, examples)
        if len(found) < 64:
            say(
                f"--task {cfg.task}: all but {len(found)} of its prompts are trained on; these "
                "validate"
            )
        return {cfg.task: data.Examples(found, name=f"--task {cfg.task}")}
    names = data.named(cfg.val_data)
    parts = read_all(list(names.values()), cfg.val_data_split, cfg, "--val-data")
    template = examples.template(data.text_of(cfg.prompt_template))
    for part in parts:
        part.template(template)
    return dict(zip(names, parts))


def label_and_data(given: str) -> tuple[str, str]:
    """How a table calls a data set, NAME=DATA or DATA, and the set itself."""
    name, what = data.split_name(given)
    return name or what, what


def load_prompts(cfg: Config, checkpoint: Path, examples, held_out: dict | None = None):
    """The run's prompts, their tokenizer, and the lists of held-out examples by name. Raises:
    ValueError when none of a data set is short enough to be answered, or the checkpoint's tokenizer
    or its template cannot do it."""
    template, held_out = examples.template(data.text_of(cfg.prompt_template)), held_out or {}
    how = (template, cfg.chat_template, cfg.template_kwargs)
    codec = task.Codec(checkpoint, data.text_of(cfg.system_prompt), *how)
    vocab_size = ModelConfig.from_dir(checkpoint).vocab_size
    if outside := [i for i in task.eos_token_ids(checkpoint) if not 0 <= i < vocab_size]:
        raise ValueError(
            f"{checkpoint}: eos_token_id {outside[0]} is outside the vocabulary of {vocab_size}: "
            "no sample would end by it; mend generation_config.json or config.json"
        )
    for rows in (*examples.parts, *held_out.values()):
        for note in rows.notes:
            say(note)
        if rows.num_chats and template != "{problem}":
            say(
                f"{rows.name}: --prompt-template is for prompts that are text, and "
                f"{rows.num_chats} are chats"
            )
    interruption(cfg, codec)  # raises what it raises before there is a run
    check_chat(cfg, codec)
    limit = (
        f"--max-total-sequence-length {cfg.max_total_sequence_length} less --max-new-tokens "
        f"{cfg.max_new_tokens}"
    )
    if cfg.max_input_seq_length is not None:
        limit = f"--max-input-seq-length {cfg.max_input_seq_length}"
    limit = f"more than {cfg.max_prompt_tokens} tokens, {limit}"

    def too_long(rows: data.Examples, what: str) -> set[int]:
        skip = rows.too_long(codec, cfg.max_prompt_tokens)
        several = f" of {rows.name}" if len(examples.parts) > 1 or len(held_out) > 1 else ""
        if len(skip) == len(rows):
            raise ValueError(f"no {what}{several} can be used: all {len(skip)} have {limit}")
        if skip:
            say(f"{len(skip)} of {len(rows)} {what}s{several} are left out: they have {limit}")
        return skip

    skip = {
        start + i
        for start, part in zip(examples.starts, examples.parts)
        for i in too_long(part, "prompt")
    }
    kept = {}
    for name, rows in held_out.items():
        left_out = too_long(rows, "held-out prompt")
        kept[name] = [rows[i] for i in range(len(rows)) if i not in left_out]
    return task.Prompts(examples, cfg.seed, skip), codec, kept


def node_config(cfg: Config) -> RolloutConfig:
    """The flags of the rollout node that is started here."""
    return parse_flags(RolloutConfig, ["HUB", *shlex.split(cfg.rollout_args)])


def check_replay(cfg: Config) -> None:
    """Raises: ValueError when the vLLM that is started here cannot tell the experts to replay."""
    if (
        cfg.router_replay == "sampler"
        and cfg.local_rollout
        and (why := no_replay(node_config(cfg).vllm_args))
    ):
        raise ValueError(why)


def rewards_of(cfg: Config) -> dict[str, str]:
    """The reward functions by flag, that of validation where it has its own."""
    found = {"reward": cfg.reward, "val_reward": cfg.val_reward}
    return {flag: spec for flag, spec in found.items() if spec}


def reward_takes(cfg: Config) -> set[str]:
    """What the reward functions judge: a "completion", all "completions" of a prompt, or a "sample"
    that they make themselves. Raises: ValueError when one cannot be loaded."""
    found = set()
    for name, spec in rewards_of(cfg).items():
        with naming(flag_of(name)):
            own = reward_sources(spec)
            found.add(check_reward(spec, *reward_limits(cfg)) if own else takes(built_in()[spec]))
    return found


def reward_limits(cfg: Config) -> tuple[float, float]:
    """Seconds for the start of a reward's process, and for a service that is away."""
    node = node_config(cfg)
    return node.reward_start_timeout_s, node.reward_away_timeout_s


def check_chat(cfg: Config, codec: task.Codec) -> None:
    """Raises: ValueError when the chat template lacks a variable that it is told, or a role that an
    environment speaks in."""
    codec.check_kwargs()
    for flag, spec in rewards_of(cfg).items():
        for role in roles_asked_for(reward_sources(spec), spec.rpartition(":")[2]):
            try:
                codec.between(role, "?")
            except ValueError as e:
                raise ValueError(f"{flag_of(flag)} {spec}: {e}") from None


def check_plan(cfg: Config) -> None:
    """Raises: ValueError for what a run would refuse and a plan can know: a reward that cannot be
    loaded, or not judge data that is in files here; and where the model's tokenizer is on this
    machine, what it cannot say."""
    reward_takes(cfg)
    sets = [*data.mix_of(cfg.data)[0], *data.named(cfg.val_data).values()]
    if all(map(data.is_row_file, sets)):
        examples = load_examples(cfg)
        check_rewards(cfg, examples.parts, [*load_held_out(cfg, examples).values()])
    path = model_here(cfg.model) if cfg.model else None
    if path and (path / "tokenizer.json").is_file():
        how = ("{problem}", cfg.chat_template, cfg.template_kwargs)
        check_chat(cfg, task.Codec(path, data.text_of(cfg.system_prompt), *how))


def interruption(cfg: Config, codec: task.Codec) -> dict:
    """What a rollout node must know of --interrupt-at-tokens. Raises: ValueError when it leaves no
    room to answer."""
    if not cfg.interrupt_at_tokens:
        return {}
    ids = codec.ids(data.text_of(cfg.interrupt_text))
    if cfg.interrupt_at_tokens + len(ids) >= cfg.max_new_tokens:
        raise ValueError(
            f"--interrupt-at-tokens {cfg.interrupt_at_tokens} and the {len(ids)} tokens of "
            f"--interrupt-text leave nothing of --max-new-tokens {cfg.max_new_tokens}"
        )
    return {"interrupt_at": cfg.interrupt_at_tokens, "interrupt_ids": ids}


# ---- what a run is made from ---------------------------------------------------------------------
def origin_of(
    cfg: Config, checkpoint: Path, examples, held_out: dict[str, data.Examples]
) -> dict[str, str]:
    """Digests of what a run is made from, mostly by flag: a resumed run must have the same or say
    what changed."""
    texts = {
        name: data.text_of(getattr(cfg, name))
        for name in ("system_prompt", "prompt_template", "interrupt_text")
    }
    files = [
        checkpoint / name
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    ]
    of_validation = [rows.digest() for rows in held_out.values()]
    return {
        "data": examples.digest(),
        "val_data": " ".join(of_validation),
        "model": model_digest(checkpoint),
        **{flag: reward_digest(spec) for flag, spec in rewards_of(cfg).items()},
        **{name: digest(text.encode()) for name, text in texts.items()},
        "tokenizer": " ".join(digest(file.read_bytes()) for file in files if file.exists()),
    }


def model_digest(path: Path) -> str:
    """Of a starting checkpoint: its architecture, and its tensors by name, in whatever files they
    lie. Of large ones four pieces of 16 KiB count; no training leaves all of these as they were."""
    parts = []
    # what is missing or damaged makes it another one
    with contextlib.suppress(OSError, ValueError, SafetensorError):
        parts.append(repr(ModelConfig.from_dir(path)))
        for name, tensor in read_tensors(path):
            data, hasher = tensor_bytes(tensor), blake3()
            stride, piece = (
                (len(data), len(data)) if len(data) <= 1 << 16 else (len(data) // 4, 1 << 14)
            )
            for at in range(0, len(data), stride):
                hasher.update(data[at : at + piece])
            parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {hasher.hexdigest()}")
    return digest("\n".join(parts).encode())


# ---- what train() asks ---------------------------------------------------------------------------
def run_for_nodes(cfg: Config, checkpoint: Path, data, dtype: torch.dtype) -> dict:
    """What a rollout node must know of the run: the answer to GET /run. Empty without data."""
    if data is None:
        return {}
    _, codec, _ = data
    m = ModelConfig.from_dir(checkpoint)
    sampling = {
        "n": cfg.num_generations_per_prompt,
        "temperature": cfg.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": cfg.max_new_tokens,
        "logprobs": 0,
        "detokenize": False,
        "stop_token_ids": task.eos_token_ids(checkpoint),
    }
    return {
        "num_generations": cfg.num_generations_per_prompt,
        "max_new_tokens": cfg.max_new_tokens,
        "seed": cfg.seed,
        "max_model_len": cfg.max_total_sequence_length,
        "dtype": str(dtype).removeprefix("torch."),
        "fp32_lm_head": cfg.fp32_lm_head,
        **interruption(cfg, codec),
        "recompute_kv_cache": cfg.recompute_kv_cache_after_weight_updates,
        **rewards_of(cfg),
        **{f"{flag}_digest": reward_digest(spec) for flag, spec in rewards_of(cfg).items()},
        "plays": "sample" in reward_takes(cfg),
        "chat_template_kwargs": cfg.template_kwargs,
        "experts": cfg.router_replay == "sampler"
        and (m.num_hidden_layers, m.num_experts_per_tok, m.num_experts),
        "sampling": sampling,
        "val_sampling": {**sampling, "n": cfg.val_samples, "temperature": cfg.val_temperature},
    }


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    return getattr(
        torch, {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(name, name)
    )


def with_chunk_size(cfg: Config, model_cfg: ModelConfig, device) -> Config:
    """--logprob-chunk-size 0 as the number that it stands for."""
    if cfg.logprob_chunk_size:
        return cfg
    rows = ops.chunk_rows(model_cfg.vocab_size // cfg.tp, cfg.compile and device.type == "cuda")
    return dataclasses.replace(cfg, logprob_chunk_size=rows)


# ---- errors in one line --------------------------------------------------------------------------
# What a machine, a disk or another process can do to a run is told in one line, with what helps.
# Anything else is a fault of the program, and shows where it comes from.
ADVICE = {
    torch.OutOfMemoryError: "; lower --max-tokens-per-micro-batch, or see --dry-run",
    dist.DistError: "; another rank has ended or cannot be reached: its own error says why",
    **dict.fromkeys((CheckpointError, WeightsError, WaitOver, OSError), ""),
}


def with_advice(error: Exception, rank: int) -> str:
    """An error that ADVICE knows, as one line."""
    advice = next(text for kind, text in ADVICE.items() if isinstance(error, kind))
    said = " ".join(str(error).split())[:600]
    return f"rank {rank} on {socket.gethostname()}: {said}{advice}"
