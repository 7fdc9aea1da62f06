"""Regenerate the checkpoints in gspo/policy/weights/, which ship with the repository.

    python -m gspo.checks.warm_up_tiny             # both, about three minutes on one core
    python -m gspo.checks.warm_up_tiny tiny-moe    # one of them

Supervised steps on the task `sort` (the prompt is 12 to 24 digits and "=", the response the same digits
sorted) until about 35 % of sampled responses are right. That is enough for a learning signal in most groups,
with room left for reinforcement learning. Each batch also has some easy sums and products of the data set
`math`, so that training on it has a signal too. The model learns those by heart; held-out ones stay near 5 %.
"""

import argparse
import os
import random
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data_loader import Problem, load_problems
from gspo.policy.tiny_models import TINY_FOLDER, TINY_NAMES, new_tiny_model, tiny_tokenizer

SEED = 0
# Sampled accuracy on unseen sort problems. The first evaluation above it finds about 0.35.
TARGET = 0.32
NUM_MATH = 256  # of about 300 that exist
SORT_BATCH, MATH_BATCH = 40, 24
MAX_STEPS = 300
WARMUP_STEPS = 50
LEARNING_RATE = 5e-3
EVALUATE_EVERY = 5


def main() -> None:
    parser = argparse.ArgumentParser(description="Regenerate the tiny checkpoints.")
    parser.add_argument("name", nargs="?", choices=TINY_NAMES, help="default: both")
    chosen = parser.parse_args().name
    for name in [chosen] if chosen else TINY_NAMES:
        warm_up(name)


def warm_up(name: str) -> None:
    """Train one model from scratch, then put gspo/policy/weights/<name>.safetensors in place in one step."""
    torch.manual_seed(SEED)
    tokenizer, model = tiny_tokenizer(), new_tiny_model(name)
    rng = random.Random(SEED)
    sort = iter(load_problems("sort", "train", MAX_STEPS * SORT_BATCH, seed=SEED))
    math = load_problems("math", "train", NUM_MATH, seed=SEED, difficulty="easy")
    held_out = load_problems("sort", "eval", 512, seed=SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP_STEPS) * (1 - step / MAX_STEPS)
    )
    accuracy, progress = 0.0, tqdm(range(MAX_STEPS), desc=name)
    for step in progress:
        batch = [next(sort) for _ in range(SORT_BATCH)] + rng.sample(math, MATH_BATCH)
        loss = model(**supervised_batch(tokenizer, batch)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % EVALUATE_EVERY == 0:
            accuracy = sampled_accuracy(model, tokenizer, held_out)
            progress.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.3f}")
        if accuracy >= TARGET:
            break
    assert accuracy >= TARGET, f"{name} reached {accuracy:.3f} only: the recipe no longer works"
    with tempfile.TemporaryDirectory(dir=TINY_FOLDER) as temporary:
        model.save_pretrained(temporary)
        os.replace(f"{temporary}/model.safetensors", TINY_FOLDER / f"{name}.safetensors")
    math_accuracy = sampled_accuracy(model, tokenizer, math)
    print(f"{name}: {step + 1} steps, sampled accuracy {accuracy:.3f} on held-out sort problems")
    print(f"{name}: sampled accuracy {math_accuracy:.3f} on the math problems of the training")


def supervised_batch(tokenizer: Any, problems: Sequence[Problem]) -> dict[str, Tensor]:
    """The model's inputs, right-padded to (B, T). The loss is over the response and its end token only."""
    prompts = [torch.tensor(tokenizer.encode(p.prompt)) for p in problems]
    responses = [torch.tensor(tokenizer.encode(p.answer) + [tokenizer.eos_token_id]) for p in problems]
    pairs = list(zip(prompts, responses, strict=True))
    labels = [torch.cat([torch.full_like(prompt, -100), response]) for prompt, response in pairs]
    return {
        "input_ids": pad_sequence([torch.cat(pair) for pair in pairs], batch_first=True),  # 0 is <pad>
        "attention_mask": pad_sequence([torch.ones_like(label) for label in labels], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


@torch.no_grad()
def sampled_accuracy(model: Any, tokenizer: Any, problems: Sequence[Problem]) -> float:
    """The share of responses, sampled at temperature 1, that equal the answer and then end."""
    inputs = tokenizer([p.prompt for p in problems], padding=True, padding_side="left", return_tensors="pt")
    width = inputs["input_ids"].shape[1]
    model.eval()
    outputs = model.generate(**inputs, max_new_tokens=28, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    model.train()
    texts = [text.replace("<pad>", "") for text in tokenizer.batch_decode(outputs[:, width:])]
    return sum(text == f"{p.answer}<eos>" for text, p in zip(texts, problems, strict=True)) / len(problems)


if __name__ == "__main__":
    main()
