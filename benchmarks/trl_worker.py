"""Train on a workload with TRL's GRPOTrainer, one rollout batch per turn, in TRL's own environment.

python trl_worker.py MODEL_FOLDER WORKLOAD
"""

import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from workloads import CLIP_RANGES, LEARNING_RATE, WORKLOADS, Workload, answer, reward, wait_for_turn


class ForcedLengths(LogitsProcessor):
    """Ends row i with its lengths[i]-th response token, and not before."""

    def __init__(self, workload: Workload, end_id: int) -> None:
        self.workload, self.end_id = workload, end_id
        self.batch = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        lengths = torch.tensor(self.workload.lengths(self.batch))  # (B,)
        ends = lengths == input_ids.shape[1] - self.workload.prompt_tokens + 1
        scores[:, self.end_id] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, self.end_id] = 0.0
        return scores


class Turns(TrainerCallback):
    """Waits for a turn before each rollout batch, and measures the seconds of its phases."""

    def __init__(self, forced_lengths: ForcedLengths) -> None:
        self.forced_lengths = forced_lengths
        self.updates = forced_lengths.workload.num_prompts  # per rollout batch
        self.spent = {"generation": 0.0, "log_prob": 0.0}

    def timed(self, phase: str, function: Callable, counts: Callable[[], bool] = lambda: True) -> Callable:
        """Return the function, such that its seconds are added to the phase if counts() is true."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            if counts():
                self.spent[phase] += time.perf_counter() - started
            return result

        return wrapper

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.updates == 0:
            if not wait_for_turn():
                sys.exit()
            self.started = time.perf_counter()
            self.spent = dict.fromkeys(self.spent, 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.updates == 0:
            total = time.perf_counter() - self.started
            answer({**self.spent, "update": total - sum(self.spent.values()), "total": total})
            self.forced_lengths.batch += 1


def main(folder: str, workload_name: str) -> None:
    workload = WORKLOADS[workload_name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def messages(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    def count_tokens(text: str) -> int:
        rendered = tokenizer.apply_chat_template(messages(text), add_generation_prompt=True, tokenize=False)
        return len(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    prompts = [{"prompt": messages(text)} for text in workload.prompts(count_tokens)]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        importance_sampling_level="sequence",
        loss_type="grpo",
        beta=0.0,
        epsilon=CLIP_RANGES[0],
        epsilon_high=CLIP_RANGES[1],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=workload.group_size,
        steps_per_generation=workload.num_prompts,
        num_generations=workload.group_size,
        max_completion_length=workload.longest,
        bf16=True,
        gradient_checkpointing=False,  # TRL's default, True, is slower
        max_steps=1_000_000,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1_000_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    forced_lengths = ForcedLengths(workload, tokenizer.eos_token_id)
    turns = Turns(forced_lengths)
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [reward(i) for i in range(len(completions))],
        args=config,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        callbacks=[turns],
    )
    generate = model.generate

    def generate_in_bf16(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast(model.device.type, torch.bfloat16):
            return generate(*args, logits_processor=[forced_lengths], **kwargs)

    model.generate = turns.timed("generation", generate_in_bf16)
    # Without gradients these are the log-probabilities of the old policy; with gradients, part of an update.
    log_probs = trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = turns.timed(
        "log_prob", log_probs, counts=lambda: not torch.is_grad_enabled()
    )
    print("ready", flush=True)
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
