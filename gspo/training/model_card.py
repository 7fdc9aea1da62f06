"""README.md of a trained model: what it is, how it was made, how well it did, how to load it."""

from gspo.training.config import GSPOConfig

TRAINED = {
    "adamw": "all weights",
    "adamw_8bit": "all weights in bfloat16, with moments in 8 bits",
    "lora": "LoRA adapters of rank {config.lora_rank}, added to the weights here and alone in adapter/",
}
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{config.algorithm}]
---
# {config.model_name}, trained with {config.algorithm}

- base model: {config.model_name}. Its licence holds for this one, too.
- algorithm: {config.algorithm}, clip range {clip_range},
  learning rate {config.learning_rate:g}, KL coefficient {config.kl_coef:g}
- trained: {trained}
- data: {source}, {trained_on} problems
- training: {this[step]} rollout batches of {config.batch_size} queries x {config.group_size} responses of at most
  {config.max_new_tokens} tokens at temperature {config.temperature:g}
- held-out pass@1: {this[pass_at_1]:.3f} (95 % interval {low:.3f} to {high:.3f}), {before[pass_at_1]:.3f} before training
- held-out mean reward: {this[reward_mean]:.4g}, {before[reward_mean]:.4g} before training
- held out: {held_out} problems x {config.eval_samples} responses at temperature {config.eval_temperature:g}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path of this folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path of this folder")
```
"""  # noqa: E501


def model_card(
    config: GSPOConfig, source: str, trained_on: int, held_out: int, evaluations: list[dict]
) -> str:
    """The text, in Markdown.

    Args:
        source: where the problems come from.
        trained_on, held_out: how many problems there are.
        evaluations: lines of eval.jsonl: the first before training, the last of this model.
    """
    sides = {"left": config.left_clip_range, "right": config.right_clip_range}
    clip_range = " and ".join(f"{value:g} {side}" for side, value in sides.items() if value is not None)
    low, high = evaluations[-1]["interval_95"]
    return CARD.format(
        config=config,
        clip_range=clip_range or "none",
        trained=TRAINED[config.method].format(config=config),
        source=source,
        trained_on=trained_on,
        held_out=held_out,
        before=evaluations[0],
        this=evaluations[-1],
        low=low,
        high=high,
    )
