"""What a run has written, to be compared with what another one has written."""

import json

from gspo.training.record import SECONDS

RECORD = ("metrics.jsonl", "eval.jsonl", "samples.jsonl", "eval_samples.jsonl")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(lines):
    return [{k: v for k, v in line.items() if k not in SECONDS} for line in lines]


def record_of(run):
    return {name: without_seconds(lines_of(run / name)) for name in RECORD}


def weights_of_run(run):
    return {path.name: path.read_bytes() for path in (run / "final_model").glob("*.safetensors")}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
