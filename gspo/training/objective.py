"""What a resolved configuration maximises, in a paragraph that a run prints."""

import math
from collections.abc import Mapping

from gspo.printing import counted
from gspo.training.algorithm import Algorithm
from gspo.training.config import GSPOConfig
from gspo.training.dynamic_sampling import MAX_DRAWN

# The response length for which the paper's clip range of GSPO is assumed to be right. The paper gives no
# length. It says only that it trains on competition mathematics and code, where answers are long.
PAPER_RESPONSE_TOKENS = 2000


def describe_objective(config: GSPOConfig, algorithms: Mapping[str, Algorithm]) -> str:
    """The objective of a resolved configuration in a paragraph: what is maximised, how often, what can clip.

    The counts are those with num_train_samples problems. algorithms: gspo_implementation.ALGORITHMS.
    """
    algorithm = algorithms[config.algorithm]
    kl = f", minus {config.kl_coef} x KL to the starting model" if config.kl_coef else ", no KL term"
    num_batches, num_updates = config.count_updates(config.num_train_samples)
    batches = counted(num_batches, "rollout batch", "rollout batches")
    if config.dynamic_sampling != "off":
        batches = (
            f"a rollout batch draws queries until {counted(config.batch_size, 'group')} with a signal are "
            f"found, at most {MAX_DRAWN * config.batch_size}; at most {batches}"
        )
    queries = min(config.batch_size, config.num_train_samples)  # of the largest rollout batch
    updates = config.updates_for(queries)
    update_queries = min(config.mini_batch_size, queries)
    # The first window of update_frequency rollout batches, which the run may not fill, has the most updates.
    window = min(config.update_frequency, num_batches)
    epochs, remaining = divmod(window, num_batches // config.num_epochs)
    updates_per_pi_old = epochs * (num_updates // config.num_epochs) + remaining * updates
    if config.dynamic_sampling == "off":
        trained_on = f"{counted(queries, 'query', 'queries')} x {config.group_size} responses"
    else:  # the last round may bring more, the end of an epoch fewer
        trained_on = f"about {counted(queries, 'group')} x {config.group_size} responses with a signal"
    every = f"{config.update_frequency} rollout batches" if config.update_frequency > 1 else "rollout batch"
    sentences = [
        f"{config.algorithm}: {algorithm.describe(config.left_clip_range, config.right_clip_range)}{kl}.",
        f"{counted(config.num_train_samples, 'problem')} x {counted(config.num_epochs, 'epoch')}: "
        f"{batches}, at most {counted(num_updates, 'optimizer update')} "
        "(one without a gradient is not made).",
        f"{trained_on} per rollout batch, {counted(updates, 'optimizer update')} of "
        f"{update_queries} x {config.group_size} responses each; pi_old is refreshed every {every}.",
    ]
    if config.shuffle_rewards:
        sentences.append(
            "A control: each group's rewards are shuffled among its responses (--shuffle_rewards), so that "
            "training can learn nothing from them; evaluations keep theirs."
        )
    if config.pi_old == "sampler":
        sentences.append(
            "pi_old is the sampler's (--pi_old sampler), so the ratio has the rounding between sampler and "
            f"trainer in it, and {'all updates can clip' if algorithm.clips else 'is never exactly 1'}."
        )
    elif updates_per_pi_old == 1:
        sentences.append(
            "With one optimizer update before pi_old is refreshed, the ratio is 1 by construction: nothing "
            "can clip, and all algorithms with the same mean are the same. A rollout batch of more queries "
            "than --mini_batch_size makes more updates."
        )
    elif not algorithm.clips:
        sentences.append("The first update sees a ratio of exactly 1; those after it do not.")
    else:
        sentences.append(
            f"The first update sees a ratio of exactly 1 and cannot clip; the other {updates_per_pi_old - 1} "
            "before pi_old is refreshed can."
        )
    if algorithm.clip_unit == "response" and (updates_per_pi_old > 1 or config.pi_old == "sampler"):
        sentences += clip_range_advice(config, algorithms["gspo"])
    if config.routing_replay:
        sentences.append("Routing Replay: the policy is computed with the experts that pi_old chose.")
    return " ".join(sentences)


def clip_range_advice(config: GSPOConfig, paper: Algorithm) -> list[str]:
    """The paper's clip range scaled to short responses, in a sentence or two; nothing for long ones."""
    tokens = config.max_new_tokens
    assert tokens is not None  # resolve() has decided it
    left, right = suggested_clip_range(tokens, paper)
    assert paper.left_clip_range is not None
    if left < 2 * paper.left_clip_range:
        return []
    return [
        f"The paper's clip range, {paper.left_clip_range:g} left and {paper.right_clip_range:g} right, "
        "belongs to answers of thousands of tokens. The mean of the log-ratios over a response of 10 tokens "
        "moves about ten times as far as over one of 1,000 (random parts average out as the square root): "
        f"scaled to responses of at most {tokens} tokens the paper's would be about {left:.2g} left, "
        f"{right:.2g} right (--left_clip_range, --right_clip_range)."
    ]


def suggested_clip_range(tokens: int, paper: Algorithm) -> tuple[float, float]:
    """The paper's clip range of GSPO, left and right, scaled to responses of this many tokens.

    s is exp of a mean over tokens. If their log-ratios are independent, the mean spreads as 1 / sqrt(tokens),
    and the range with it. It is never narrower than the paper's.
    """
    assert paper.left_clip_range is not None and paper.right_clip_range is not None
    scale = max(1.0, math.sqrt(PAPER_RESPONSE_TOKENS / tokens))
    return scale * paper.left_clip_range, scale * paper.right_clip_range
