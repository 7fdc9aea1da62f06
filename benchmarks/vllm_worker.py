"""Sample responses to a workload's prompts with vLLM, in vLLM's own environment.

The log-probabilities of the sampled tokens are included.

python vllm_worker.py MODEL_FOLDER WORKLOAD
"""

import sys
import time

from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

from workloads import WORKLOADS, answer, wait_for_turn


def main(folder: str, workload_name: str) -> None:
    workload = WORKLOADS[workload_name]
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]

    texts = workload.prompts(lambda text: len(encode(text)))
    prompts = [{"prompt_token_ids": encode(text)} for text in texts]
    model = LLM(folder, dtype="bfloat16", enforce_eager=True, max_model_len=1024)
    sampling = SamplingParams(
        n=workload.group_size, temperature=1.0, max_tokens=workload.longest, ignore_eos=True, logprobs=0
    )
    print("ready", flush=True)
    while wait_for_turn():
        started = time.perf_counter()
        model.generate(prompts, sampling, use_tqdm=False)
        answer({"generation": time.perf_counter() - started})


if __name__ == "__main__":
    main(*sys.argv[1:])
