"""A task of one's own, whole: from the command line, and from a script away from the clone."""

import json
import subprocess
import sys

import pytest

from gspo.policy import cpu
from support import ROOT
from support.commands import environment, run_here


def own_task(tmp_path, count=30):
    """A file of problems that the tiny model can read, and a reward for them."""
    rows = [{"prompt": f"{i:012d}="[::-1][1:] + "=", "answer": str(i)} for i in range(1, count + 1)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(
        "def score(problem, response):\n    return {'length': min(len(response), 20) / 20, 'sorted': "
        "0.5 * (list(response) == sorted(response))}\n"
    )


def test_a_task_of_ones_own(tmp_path, monkeypatch):
    """Relative paths, a reward with parts, a threshold, a probe, a run, and a resume from another folder."""
    own_task(tmp_path)
    flags = ["--model_name", "tiny", "--dataset_path", "tasks.jsonl", "--reward", "my_rewards.py:score"]
    flags += ["--num_train_samples", "8", "--num_eval_samples", "4", "--max_new_tokens", "20"]
    flags += ["--pass_threshold", "0.9", "--num_epochs", "1", "--group_size", "4"]

    monkeypatch.chdir(tmp_path)
    probed = run_here(*flags, "--probe")
    assert "reward mean" in probed.stdout and not (tmp_path / "gspo_outputs").exists(), probed.stderr
    done = run_here(*flags, "--run_name", "own")
    assert done.returncode == 0, done.stderr
    assert "problems: 8 to train on, 4 held out" in done.stdout and "8 problems x 1 epoch" in done.stdout
    assert "reward_part/length: " in done.stdout and "reward_part/sorted" in probed.stdout
    folder = tmp_path / "gspo_outputs" / "own"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"reward_part/length", "reward_part/sorted", "reward_errors"} <= set(metrics[0])
    config = json.loads((folder / "config.json").read_text())
    assert config["reward_function"]["file"] == str(tmp_path / "my_rewards.py")
    assert config["data"]["source"] == str(tmp_path / "tasks.jsonl")
    (tmp_path / "my_rewards.py").write_text("def score(problem, response):\n    return 1\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = run_here("--resume", str(folder), "--num_epochs", "2")
    assert resumed.returncode == 0 and "reward function is not the one" in resumed.stderr, resumed.stderr


def test_a_script_of_ones_own_has_the_settings_of_the_command(tmp_path, monkeypatch):
    """The five lines of docs/your_task.md, away from the clone: threads, memory, the folder, config.json."""
    own_task(tmp_path)
    script = """
import json, os
from data_loader import RowFormat, load_problems, reward_function
from gspo.policy.model_loader import load_model
from gspo_implementation import GSPOConfig, GSPOTrainer

form = RowFormat(own_reward=True)
train = load_problems("file", "train", 8, path="tasks.jsonl", form=form)
config = GSPOConfig(max_new_tokens=8, group_size=2, dtype="float32")
trainer = GSPOTrainer(*load_model("tiny"), config, reward_function("my_rewards.py:score"))
result = trainer.train(train, load_problems("file", "eval", 2, path="tasks.jsonl", form=form))
saved = json.loads((result["folder"] / "config.json").read_text())
print(json.dumps([os.environ["GOMP_SPINCOUNT"], str(result["folder"]), saved["data"], saved["model_name"]]))
"""
    variables = {k: v for k, v in environment().items() if k != "GOMP_SPINCOUNT"} | {"PYTHONPATH": str(ROOT)}
    (tmp_path / "mine.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True, env=variables
    )
    assert done.returncode == 0, done.stderr
    spin_count, folder, data, model_name = json.loads(done.stdout.splitlines()[-1])
    assert spin_count == "10000" and (tmp_path / folder / "final_model").is_dir()
    assert f"run folder: {folder}" in done.stdout and "imported before the toolkit" not in done.stderr
    assert data["train_problems"] == 8 and "given from Python" in data["source"] and model_name != "auto"
    monkeypatch.setattr(cpu, "SPIN_COUNT_COMES_LATE", True)
    with pytest.warns(UserWarning, match="torch was imported before the toolkit"):
        cpu.prepare_cpu()
