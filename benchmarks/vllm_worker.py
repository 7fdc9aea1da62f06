"""vLLM, in its own environment, on a workload's prompts; log-probabilities of the sampled tokens included.

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

    def encode(text):
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]

    prompts = [{"prompt_token_ids": encode(x)} for x in workload.prompts(lambda text: len(encode(text)))]
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
