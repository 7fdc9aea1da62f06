"""Sample responses to a workload's prompts with this toolkit's engine or with transformers' generate.

python generate_worker.py MODEL_FOLDER WORKLOAD gspo|transformers
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

from gspo.policy.model_loader import load_model
from gspo.policy.rollout import Sampling, TransformersEngine, encode_prompt
from workloads import WORKLOADS, answer, wait_for_turn


def main(folder: str, workload_name: str, engine_name: str) -> None:
    workload = WORKLOADS[workload_name]
    model, tokenizer = load_model(folder)
    texts = workload.prompts(lambda text: len(encode_prompt(tokenizer, text)))
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    engine = TransformersEngine(model, tokenizer)
    engine.end_ids = []  # no response ends early
    repeated = torch.tensor(prompts).repeat_interleave(workload.group_size, 0)  # (B, P)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    settings |= {"max_new_tokens": workload.longest, "min_new_tokens": workload.longest}
    print("ready", flush=True)
    while wait_for_turn():
        started = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16), torch.no_grad():
            if engine_name == "gspo":
                engine.generate(prompts, workload.group_size, Sampling(workload.longest))
            else:
                model.generate(repeated, attention_mask=torch.ones_like(repeated), **settings)
        answer({"generation": time.perf_counter() - started})


if __name__ == "__main__":
    main(*sys.argv[1:])
