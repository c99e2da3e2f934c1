"""The metrics that a run writes to metrics.jsonl, by name. docs/reference/metrics.md is made of this table."""

from __future__ import annotations

from dataclasses import dataclass

HELD_OUT = "heldout_"
"""Prefix of metrics of the held-out rows."""
ZEROS = ("zeros_", "heldout_zeros_")
"""Prefixes of the counts of responses that lost score for what their programs brought about; the kind follows."""
ALL, ROWS, PAIRS, POLICY = "all", "sft rm dpo", "rm dpo", "grpo ppo"


@dataclass(frozen=True)
class Metric:
    """A metric of a step."""

    stages: str
    """Stages that write it."""
    text: str
    """What it is, in Markdown."""


METRICS = {
    "step": Metric(ALL, "Number of finished steps, from 1. A line of step 0 has the figures of held-out rows alone."),
    "loss": Metric(ALL, "The loss that was minimised, over the global batch."),
    "grad_norm": Metric(ALL, "Norm of the gradient over all parameters, before clipping. `grpo`, `ppo`: the mean over updates."),
    "adapter_norm": Metric(ALL, "Norm of all low-rank adapters, and of a reward model's head beside them. Runs with `[lora]`."),
    "trained_share": Metric(ALL, "Share of the model's weights, adapters included, that trains. Runs with `[lora]`."),
    "lr": Metric(ALL, "Learning rate of the step's last update."),
    "tokens": Metric(ALL, "Tokens of the global batch, padding left out."),
    "supervised_tokens": Metric(ALL, "Tokens that a loss was computed for."),
    "tokens_per_second": Metric(ALL, "`tokens` a second of all ranks, checkpoints and evaluations left out."),
    "supervised_tokens_per_second": Metric(ALL, "`supervised_tokens` a second, likewise."),
    "padding": Metric(ALL, "Share of the packed positions that hold no token."),
    "tflops": Metric(ALL, "10^12 FLOP a second of one process."),
    "mfu": Metric(ALL, "Share of the device's dense peak that `tflops` is; null where the peak is not known, as on CPUs."),
    "mfu_peak": Metric(ALL, "The number format of that peak, `bf16` or `fp32`. FP8 runs are compared with bf16's peak."),
    "seconds_data": Metric(ALL, "Seconds of waiting for packed batches."),
    "seconds_forward_backward": Metric(ALL, "Seconds of forward and backward passes, up to the gradient's norm."),
    "seconds_optimizer": Metric(ALL, "Seconds of the updates."),
    "seconds_checkpoint": Metric(ALL, "Seconds that training stood still for saving since the step before."),
    "seconds_evaluation": Metric(ALL, "Seconds of the evaluation of held-out rows, in steps that have one."),
    "memory_gib": Metric(ALL, "Peak memory so far, GiB: of CUDA's allocator on a GPU, resident on a CPU."),
    "memory_reserved_gib": Metric(ALL, "Peak that CUDA's allocator reserved, GiB, free blocks and gaps included; null on a CPU."),
    "save_seconds": Metric(ALL, "Seconds from the beginning to the end of a save, in the step that was saved."),
    "save_waited_seconds": Metric(ALL, "Seconds of these that training stood still."),
    "save_memory_gib": Metric(ALL, "Peak of main memory in a save above what was held before, GiB, of the rank with most."),
    "slowest_rank": Metric(ALL, "Rank that took longest, in steps that compare ranks (`train.straggler.every`)."),
    "slowest_host": Metric(ALL, "Its host."),
    "slowest_times_median": Metric(ALL, "Its time over the median of the ranks that do the same."),
    "skipped_steps": Metric(ALL, "Updates left out so far because loss or gradient was not finite."),
    "spikes": Metric(ALL, "Spikes of loss or gradient norm so far (`train.spike`)."),
    "sequences": Metric(ROWS, "Sequences of the global batch."),
    "schedule_efficiency": Metric(ROWS, "Share of the ranks' time that is work by the simulated schedule of the packs, 0 to 1."),
    "nll": Metric("sft", "Mean negative log-likelihood of a trained token, nats."),
    "accuracy": Metric(PAIRS, "Share of the pairs whose chosen side has the higher reward."),
    "margin": Metric(PAIRS, "Mean difference of the two sides' rewards."),
    "chosen_reward": Metric(PAIRS, "Mean reward of the chosen sides."),
    "rejected_reward": Metric(PAIRS, "Mean reward of the rejected sides."),
    "chosen_logp": Metric("dpo", "Mean of the chosen sides' summed log-probabilities."),
    "rejected_logp": Metric("dpo", "The same of the rejected sides."),
    "kl": Metric("dpo grpo", "Distance from the reference: `dpo` the mean of `l_ref - l`; `grpo` the estimate in the loss."),
    "reward": Metric(POLICY, "Mean reward of the responses that could be judged."),
    "solve_rate": Metric(POLICY, "Share of the responses whose verifiers all gave 1."),
    "response_length": Metric(POLICY, "Mean number of tokens of a response."),
    "response_length_max": Metric(POLICY, "Largest number of tokens of a response."),
    "truncated": Metric(POLICY, "Share of the responses that were cut off at `sampling.max_tokens`."),
    "verifier_failures": Metric(POLICY, "Responses that could not be judged; they are not trained on."),
    "zeros_KIND": Metric(POLICY, "Responses that lost score for what their programs brought about, by kind: `zeros_time`, ..."),
    "responses": Metric(POLICY, "Responses that were sampled."),
    "groups": Metric(POLICY, "Groups of responses that are trained on."),
    "equal_groups": Metric(POLICY, "Groups whose responses all earned the same."),
    "refills": Metric(POLICY, "Times that prompts were drawn in the place of equal groups."),
    "generated_tokens": Metric(POLICY, "Tokens that the servers sampled."),
    "generated_tokens_per_second": Metric(POLICY, "The same a second of generation."),
    "policy_lag": Metric(POLICY, "Steps by which the weights that drew a token were older than those that train on it, mean."),
    "policy_lag_max": Metric(POLICY, "Largest of these."),
    "effective_samples": Metric(POLICY, "Effective sample size of the ratios of trainer to sampler, as a share of the tokens."),
    "seconds_generation": Metric(POLICY, "Seconds of waiting for responses, before the step and before a push."),
    "seconds_rewards": Metric(POLICY, "Seconds of waiting for rewards after the last response."),
    "seconds_servers": Metric(POLICY, "Seconds that servers took for the step's responses, beside training or not."),
    "seconds_scoring": Metric(POLICY, "Seconds of scoring responses before the updates (policy, reference, value model)."),
    "seconds_sync": Metric(POLICY, "Seconds of sending the weights to the servers."),
    "sync_gigabytes_per_second": Metric(POLICY, "Rate at which the weights were sent."),
    "trainer_idle": Metric(POLICY, "Share of the step in which the trainer did not compute."),
    "sampler_idle": Metric(POLICY, "Share of the step in which the servers did not generate."),
    "tokens_spared": Metric(POLICY, "Share of the step's tokens that were not computed because a pack has a prompt once."),
    "updates": Metric(POLICY, "Optimizer steps of the policy."),
    "ratio": Metric(POLICY, "Mean of the policy's probability over that before the step, over trained tokens."),
    "ratio_max": Metric(POLICY, "Largest of these."),
    "clip_low": Metric(POLICY, "Share of the tokens whose gradient the lower bound took away."),
    "clip_high": Metric(POLICY, "Share of the tokens whose gradient the upper bound took away."),
    "entropy": Metric(POLICY, "Mean entropy of the policy, nats a token."),
    "sampler_difference": Metric(POLICY, "Mean absolute difference of the log-probabilities of trainer and sampler."),
    "sampler_difference_max": Metric(POLICY, "Largest of these."),
    "importance_weight": Metric(POLICY, "Mean weight that corrects for the sampler (`policy.importance`)."),
    "importance_cut": Metric(POLICY, "Share of these weights that was cut at `policy.importance_cap`."),
    "importance_left_out": Metric(POLICY, "Share of the tokens left out by `policy.mask_above`."),
    "kl_reward": Metric("ppo", "Divergence in the rewards: summed over a response, mean over responses."),
    "value_loss": Metric("ppo", "Loss of the value model, mean over its updates."),
    "value_grad_norm": Metric("ppo", "Norm of its gradient, before clipping."),
    "value_lr": Metric("ppo", "Its learning rate."),
    "value_clipped": Metric("ppo", "Share of the states whose clipped square was the larger one."),
    "returns": Metric("ppo", "Mean return of the states, before the step's updates."),
    "values": Metric("ppo", "Mean value of the states, before the step's updates."),
    "explained_variance": Metric("ppo", "`1 - Var(returns - values) / Var(returns)`: 1 of perfect values, 0 of a constant."),
    "advantage": Metric("ppo", "Mean advantage before whitening."),
    "advantage_deviation": Metric("ppo", "Standard deviation of the advantages before whitening."),
    "heldout_loss": Metric(ROWS, "Mean over held-out rows: `sft` nats a trained token, `rm` and `dpo` the loss of a pair."),
    "heldout_METRIC": Metric(PAIRS, "The same of the metrics of pairs: `heldout_accuracy`, `heldout_margin`, ..."),
    "heldout_score": Metric(POLICY, "Mean score of the greedy answers to held-out prompts."),
    "heldout_solve_rate": Metric(POLICY, "Share of them that is solved."),
    "heldout_length": Metric(POLICY, "Their mean number of tokens."),
    "heldout_truncated": Metric(POLICY, "Share of them that was cut off."),
    "heldout_verifier_failures": Metric(POLICY, "Number of them that could not be judged."),
}
"""By name, in the order of a line."""


def known(name: str) -> bool:
    """Whether a name of metrics.jsonl is in the table."""
    return name in METRICS or name.startswith(ZEROS) or (name.startswith(HELD_OUT) and name.removeprefix(HELD_OUT) in METRICS)
