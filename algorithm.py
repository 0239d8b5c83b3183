"""The flags of the loss and of the advantages, each with its rules beside it: two groups of
config.py's Config. loss.py computes what they say."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bridge.flags import Group, flag_of

LOG_RATIO_MAX = 20.0  # nats; exp(20) = 4.9e8: far outside any clip, far inside fp32

Truncation = Literal["tis", "icepop", "seq-mask-tis"]
Region = Literal["tv", "kl", "kpop"]
Scale = Literal["group", "batch", "mean"]
# How far a token may go if nothing is set: what DPPO's and KPop's authors train with.
REGION_BOUNDS = {"tv": 0.15, "kl": 0.05, "kpop": 0.1}


@dataclass(frozen=True)
class Loss(Group):
    """loss"""

    use_cispo: bool = True  # CISPO; --no-use-cispo is the PPO/GRPO clipped loss
    ratio_clip_min: float | None = None  # ratio at least 1 - this; unset: 1.0 with CISPO, else 0.2
    ratio_clip_max: float | None = None  # ratio at most 1 + this; unset: 5.0 with CISPO, else 0.2
    ratio_clip_min_negative: float | None = None  # as --ratio-clip-min, where A < 0 (DISPO)
    ratio_clip_max_negative: float | None = None  # as --ratio-clip-max, where A < 0 (DISPO)
    trust_region: Region | None = None  # tokens too far from vLLM's probability lose their gradient
    trust_region_low: float | None = None  # its bound where A < 0; unset: tv 0.15, kl 0.05
    trust_region_high: float | None = None  # its bound where A > 0; unset: 0.15, 0.05, kpop: 0.1
    ratio_clip_c: float | None = None  # PPO dual clip: ratio at most this where A < 0
    ratio_anchor: Literal["prev", "sampler"] = "prev"  # ratio to the step's start, or to vLLM
    disable_ppo_ratio: bool = False  # REINFORCE: -A * log pi, no ratio
    force_on_policy_ratio: bool = False  # ratio 1 with PPO's gradient; one update per rollout batch
    sequence_level_importance_ratios: bool = False  # GSPO: geometric mean of the sequence's ratios
    use_importance_sampling_correction: bool = True  # weigh tokens by exp(prev - gen)
    truncated_importance_sampling_type: Truncation | None = None  # clamp it; drop tokens; sequences
    truncated_importance_sampling_ratio: float | None = None  # whose weight is above this
    truncated_importance_sampling_ratio_min: float | None = None  # or below this; tis needs none
    reference_policy_kl_penalty: float = 0.0  # times the KL divergence to the starting model
    reference_policy_kl_type: Literal["k1", "k2", "k3"] = "k3"  # estimator of it
    kl_input_clamp_value: float = 20.0  # bound of the log-ratio in it
    kl_output_clamp_value: float = 10.0  # bound of its value
    use_on_policy_kl_approximation: bool = False  # weigh it by exp(logprob - gen)
    use_kl_in_reward: bool = False  # take it from each token's advantage instead of the loss
    positive_example_nll_weight: float = 0.0  # times the mean -log pi of rewarded samples' tokens

    @property
    def needs_prev(self) -> bool:
        """Whether the trainer's log-probs at the start of the step are read; else the current ones,
        detached, are."""
        return not self.force_on_policy_ratio and self.ratio_anchor == "prev"

    @property
    def needs_sequences(self) -> bool:
        """Whether a token's loss depends on the other tokens of its sequence. Else `token_loss` is
        elementwise."""
        drops_sequences = self.truncated_importance_sampling_type == "seq-mask-tis"
        return self.sequence_level_importance_ratios or drops_sequences

    @property
    def algorithm(self) -> "Algorithm":
        """The loss's flags with the bounds of clip and trust region filled in."""
        low, high = (1.0, 5.0) if self.use_cispo else (0.2, 0.2)
        bound = REGION_BOUNDS.get(self.trust_region)
        unset = {
            "ratio_clip_min": low,
            "ratio_clip_max": high,
            "trust_region_low": None if self.trust_region == "kpop" else bound,
            "trust_region_high": bound,
        }
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(Loss)}
        return Algorithm(**values | {n: x for n, x in unset.items() if values[n] is None})

    def faults(self) -> Iterator[str]:
        yield from self._ratio_faults()
        yield from self._bound_faults()
        yield from self._trust_region_faults()
        yield from self._correction_faults()
        for name in ("reference_policy_kl_penalty", "positive_example_nll_weight"):
            if (value := getattr(self, name)) < 0:
                yield f"{flag_of(name)} {value}: must be at least 0"
        if not 0 < self.kl_input_clamp_value <= LOG_RATIO_MAX:
            yield (
                f"--kl-input-clamp-value {self.kl_input_clamp_value}: must be above 0 and at most "
                f"{LOG_RATIO_MAX:g}, or exp of it overflows"
            )
        if self.kl_output_clamp_value <= 0:
            yield f"--kl-output-clamp-value {self.kl_output_clamp_value}: must be above 0"

    def _ratio_faults(self) -> Iterator[str]:
        leave_it_out = "leave it out or use --no-use-cispo"
        for name, why in (
            ("disable_ppo_ratio", "CISPO's weight is that ratio"),
            ("force_on_policy_ratio", "CISPO's weight would be 1"),
            ("sequence_level_importance_ratios", "CISPO's weight is the token's"),
        ):
            if self.use_cispo and getattr(self, name):
                yield f"{flag_of(name)}: {why}; {leave_it_out}"
        if self.use_cispo and self.ratio_clip_c is not None:
            yield f"--ratio-clip-c {self.ratio_clip_c}: CISPO has no dual clip; {leave_it_out}"
        if self.disable_ppo_ratio and (self.force_on_policy_ratio or self.ratio_clip_c is not None):
            yield (
                "--disable-ppo-ratio: leaves no ratio for --force-on-policy-ratio or --ratio-clip-c"
            )
        if self.ratio_anchor == "sampler" and self.force_on_policy_ratio:
            yield (
                "--ratio-anchor sampler: a ratio that --force-on-policy-ratio sets to 1 has no "
                "anchor"
            )

    def _bound_faults(self) -> Iterator[str]:
        alg = self.algorithm
        for end in ("", "_negative"):
            low, high = (getattr(alg, f"ratio_clip_{side}{end}") for side in ("min", "max"))
            low_flag, high_flag = (flag_of(f"ratio_clip_{side}{end}") for side in ("min", "max"))
            if end and not self.use_cispo and (low, high) != (None, None):
                yield (
                    f"{low_flag} {low}, {high_flag} {high}: CISPO's; of PPO's clip one bound is "
                    "for A > 0 and the other for A < 0 anyhow"
                )
            if low is not None and not 0 <= low <= 1:
                yield f"{low_flag} {low}: must be in 0..1; 1 less it is the least weight"
            if high is not None and high < 0:
                yield f"{high_flag} {high}: must be at least 0"
        if self.ratio_clip_c is not None and self.ratio_clip_c <= 1:
            yield f"--ratio-clip-c {self.ratio_clip_c}: must be above 1"

    def _trust_region_faults(self) -> Iterator[str]:
        kind, low, high = self.trust_region, self.trust_region_low, self.trust_region_high
        if kind is None:
            if (low, high) != (None, None):
                yield (
                    f"--trust-region-low {low}, --trust-region-high {high}: without --trust-region "
                    "they do nothing"
                )
            return
        if not self.use_cispo:
            yield f"--trust-region {kind}: CISPO's; leave it out with --no-use-cispo"
        if kind == "kpop" and low is not None:
            yield (
                f"--trust-region-low {low}: kpop has one bound for both ways, --trust-region-high"
            )
        for end, bound in (("low", low), ("high", high)):
            if bound is not None and bound <= 0:
                yield f"--trust-region-{end} {bound}: must be above 0; at 0 any rounding is too far"
            if bound is not None and bound > 1 and kind == "tv":
                yield (
                    f"--trust-region-{end} {bound}: must be at most 1 with tv, the most that a "
                    "probability can change by"
                )

    def _correction_faults(self) -> Iterator[str]:
        corrected = self.use_importance_sampling_correction
        kind = self.truncated_importance_sampling_type
        high = self.truncated_importance_sampling_ratio
        low = self.truncated_importance_sampling_ratio_min
        flag = "--truncated-importance-sampling-"
        if self.ratio_anchor == "sampler" and corrected:
            yield (
                "--ratio-anchor sampler: its ratio holds exp(prev - gen) already; use "
                "--no-use-importance-sampling-correction, or it counts twice"
            )
        if kind is None and (low, high) != (None, None):
            yield f"{flag}ratio {high}, {flag}ratio-min {low}: without {flag}type they do nothing"
        if kind is None:
            return
        if not corrected:
            yield (
                f"{flag}type {kind}: bounds a weight that --no-use-importance-sampling-correction "
                "turns off"
            )
        if high is None or high <= 0:
            yield f"{flag}ratio {high}: must be above 0 with a type"
        if kind in ("icepop", "seq-mask-tis") and low is None:
            yield f"{flag}ratio-min: {kind} needs one"
        if None not in (low, high) and not 0 <= low <= high:
            yield f"{flag}ratio-min {low}: must be in 0..{flag}ratio {high}"
        if kind == "seq-mask-tis" and self.sequence_level_importance_ratios:
            yield (
                f"{flag}type seq-mask-tis: weighs tokens; it excludes "
                "--sequence-level-importance-ratios"
            )


@dataclass(frozen=True)
class Algorithm(Loss):
    """The loss's flags with the bounds filled in: what loss.py reads. The clip's are offsets from
    1, as in NeMo RL: the ratio is clamped to [1 - ratio_clip_min, 1 + ratio_clip_max]."""

    ratio_clip_min: float = 1.0
    ratio_clip_max: float = 5.0

    @property
    def weight_bounds(self) -> tuple[float, float]:
        """Least and largest weight of a token."""
        return 1 - self.ratio_clip_min, 1 + self.ratio_clip_max

    @property
    def negative_weight_bounds(self) -> tuple[float, float]:
        """Those of a token with A < 0 (DISPO)."""
        low, high = self.ratio_clip_min_negative, self.ratio_clip_max_negative
        return (
            1 - (self.ratio_clip_min if low is None else low),
            1 + (self.ratio_clip_max if high is None else high),
        )


@dataclass(frozen=True)
class Advantages(Group):
    """advantages, and over what the loss is a mean"""

    token_level_loss: bool = True  # the batch's tokens; else mean over samples of their token mean
    prompt_level_loss: bool = False  # mean over prompts of their token mean (ScaleRL)
    use_leave_one_out_baseline: bool = True  # compare a sample with its siblings only
    normalize_rewards: bool = True  # divide advantages, see --advantage-std
    advantage_std: Scale = "group"  # std of the group, of the step, or the group's mean (MaxRL)
    drop_zero_variance: bool = False  # groups of equal rewards leave the batch (unless all are)

    @property
    def advantage_scale(self) -> str | None:
        """What advantages are divided by."""
        return self.advantage_std if self.normalize_rewards else None

    def faults(self) -> Iterator[str]:
        if self.prompt_level_loss and not self.token_level_loss:
            yield (
                "--prompt-level-loss: a mean over a prompt's tokens; it excludes "
                "--no-token-level-loss"
            )
        if self.advantage_std != "group" and not self.normalize_rewards:
            yield f"--advantage-std {self.advantage_std}: --no-normalize-rewards divides by nothing"
