"""A run's folder against the plan of it, and the types that its files have."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config

from gspo.policy.tiny_models import tiny_config, tiny_tokenizer
from gspo.training.checkpoints import drop_moments
from gspo.training.disk_plan import disk_bytes
from gspo_implementation import GSPOConfig, GSPOTrainer
from support.sorting import problems


def model_of(dtype):
    """About 2 million weights, which is much against a run's other files."""
    torch.manual_seed(0)
    settings = tiny_config("tiny").to_dict() | {"hidden_size": 256, "intermediate_size": 768}
    return AutoModelForCausalLM.from_config(Qwen3Config(**settings)).to(dtype)


def by_place(_, responses):
    """A reward without ties, whatever an untrained model writes."""
    return [float(index) for index in range(len(responses))]


def train(folder, dtype, **settings):
    settings = {
        "num_epochs": 2,
        "save_frequency": 1,
        "eval_frequency": 1,
        "output_dir": str(folder),
    } | settings
    config = GSPOConfig(model_name="tiny", max_new_tokens=5, device="cpu", dtype="float32", **settings)
    t = GSPOTrainer(model_of(dtype), tiny_tokenizer(), config, by_place)
    t.train(problems(4), problems(2, seed=1))
    return t


def size_of(folder):
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum({file.st_ino: file.st_size for file in files}.values())  # a link has the number of its file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_runs_folder_is_as_large_as_planned(tmp_path, monkeypatch, dtype):
    # The last evaluation is not the best one, whose model would then be the final one.
    monkeypatch.setattr("gspo.training.training_run.standing", lambda _: 0)  # the first is the best
    with_two_checkpoints = []

    def drop_and_note_size(checkpoint):
        with_two_checkpoints.append(size_of(tmp_path / "run"))
        drop_moments(checkpoint)

    monkeypatch.setattr("gspo.training.training_run.drop_moments", drop_and_note_size)
    t = train(tmp_path, dtype, run_name="run", learning_rate=1e-3)
    count = t.model.num_parameters()
    moments = 8 * count
    parts = disk_bytes(count, torch.float32, dtype, optimizer_bytes=moments)
    written = parts.pop("while a checkpoint is written")
    assert size_of(tmp_path / "run") == pytest.approx(sum(parts.values()), rel=0.05)
    # A linked final model has a file of its own only in a run that goes on after its end.
    own_final = 0 if parts["final_model"] else dtype.itemsize * count
    at_most = sum(parts.values()) + written - own_final
    assert max(with_two_checkpoints) == pytest.approx(at_most, rel=0.05)


def test_a_model_is_saved_in_the_type_that_it_came_in_and_trained_in_float32(tmp_path):
    t = train(tmp_path, torch.bfloat16, run_name="run", learning_rate=1e-6)
    run = tmp_path / "run"
    exact = load_file(run / "checkpoints" / "step-2" / "model.safetensors")
    saved = load_file(run / "final_model" / "model.safetensors")
    live = dict(t.model.named_parameters())
    assert exact.keys() == saved.keys() == live.keys()  # the tied output layer is there once
    for name, weight in live.items():
        assert torch.equal(exact[name], weight) and exact[name].dtype == torch.float32
        assert torch.equal(saved[name], weight.to(torch.bfloat16)) and saved[name].dtype == torch.bfloat16
    assert any(not torch.equal(exact[name], saved[name].float()) for name in live)
    assert AutoModelForCausalLM.from_pretrained(run / "final_model").dtype == torch.bfloat16
