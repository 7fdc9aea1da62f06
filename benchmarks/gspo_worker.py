"""Train on a workload with this toolkit's GSPOTrainer, one rollout batch per turn.

python gspo_worker.py MODEL_FOLDER WORKLOAD
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gspo.policy.cpu import keep_freed_memory
from gspo.policy.model_loader import load_model
from gspo.policy.rollout import Rollout, TransformersEngine, encode_prompt
from gspo_implementation import GSPOConfig, GSPOTrainer
from workloads import CLIP_RANGES, LEARNING_RATE, WORKLOADS, Workload, answer, reward, wait_for_turn


class ForcedLengths(TransformersEngine):
    """Samples responses of the workload's lengths; no token ends a response."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, workload: Workload
    ) -> None:
        super().__init__(model, tokenizer)
        self.workload, self.end_ids, self.batch = workload, [], 0

    def _sample_batch(
        self,
        prompts: Sequence[Sequence[int]],
        budgets: torch.Tensor,
        temperature: float,
        uniforms: torch.Tensor,
    ) -> list[Rollout]:
        lengths = torch.tensor(self.workload.lengths(self.batch))
        return super()._sample_batch(prompts, lengths, temperature, uniforms)


def main(folder: str, workload_name: str) -> None:
    keep_freed_memory()
    workload = WORKLOADS[workload_name]
    model, tokenizer = load_model(folder)
    texts = workload.prompts(lambda text: len(encode_prompt(tokenizer, text)))
    problems = [SimpleNamespace(prompt=text) for text in texts]
    engine = ForcedLengths(model, tokenizer, workload)
    config = GSPOConfig(
        batch_size=workload.num_prompts,
        mini_batch_size=1,
        group_size=workload.group_size,
        learning_rate=LEARNING_RATE,
        left_clip_range=CLIP_RANGES[0],
        right_clip_range=CLIP_RANGES[1],
        max_new_tokens=workload.longest,
    )
    trainer = GSPOTrainer(
        model,
        tokenizer,
        config,
        lambda _, responses: [reward(i) for i in range(len(responses))],
        engine=engine,
    )
    print("ready", flush=True)
    while wait_for_turn():
        started = time.perf_counter()
        metrics = trainer.train_step(problems)
        total = time.perf_counter() - started
        assert metrics["zero_variance_groups"] == 0 and metrics["null_clip_fraction"] == 0
        answer(
            {
                "generation": metrics["generation_s"],
                "log_prob": metrics["log_prob_s"],
                "update": metrics["update_s"],
                "total": total,
                "clip_fraction": metrics["clip_fraction"],
            }
        )
        engine.batch += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
