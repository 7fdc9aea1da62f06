"""The metrics of a healthy rollout batch."""

GOOD = {
    "loss": 0.1, "grad_norm": 1.0, "clip_fraction": 0.15, "null_clip_fraction": 0.0, "sampler_gap": 1e-6,
    "importance_ratio_mean": 1.0, "importance_ratio_std": 0.01, "importance_ratio_min": 0.99,
    "importance_ratio_max": 1.01,
    "zero_variance_groups": 0.5, "reward_mean": 0.3, "entropy": 1.5, "truncated_fraction": 0.0,
    "response_tokens_mean": 20.0, "repetition": 0.1, "unreadable_characters": 0.0,
    "clip_fraction_by_minibatch": [0.0, 0.2], "clip_fraction_sequences": 0.15, "reward_std": 0.4,
    "clip_fraction_eligible": 0.3, "clip_fraction_left": 0.1, "clip_fraction_right": 0.2,
    "eligible_fraction": 0.5, "ratio_spread": 2.0, "updates_without_signal": 1, "queries": 4,
    "groups_all_right": 0.1, "groups_all_wrong": 0.4,
    "unjudged_responses": 0, "kl": 0.01, "learning_rate": 1e-5, "generation_s": 1.0, "reward_s": 0.1,
    "log_prob_s": 0.5, "update_s": 2.0, "tokens_per_s": 100.0, "peak_memory_gb": 1.0,
}  # fmt: skip

EVALUATION = {
    "step": 0, "pass_at_1": 0.5, "interval_95": [0.1, 0.9], "reward_mean": 0.5, "response_tokens_mean": 9.0,
    "pass_by_problem": [0.25, 0.75], "reward_by_problem": [0.25, 0.75],
}  # fmt: skip
