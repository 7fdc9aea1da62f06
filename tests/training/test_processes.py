"""How work is dealt to several processes, what they agree on, and what they refuse."""

import json
from types import SimpleNamespace

import pytest
import torch

from gspo.policy.log_probs import MAX_FORWARD_TOKENS
from gspo.training.config import GSPOConfig
from gspo.training.forward_passes import ForwardPasses, deal_groups
from gspo.training.processes import LAUNCHER_SETTINGS, Processes, refuse_idle_processes
from support import one_fails, unequal_gpus
from support.on_ranks import on_ranks

distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)


def samples(*groups):
    """Samples of groups of two: the tokens of the prompt, and of each response with its signal."""
    return [
        SimpleNamespace(
            rollout=SimpleNamespace(prompt_ids=[0] * prompt), num_tokens=tokens, has_signal=has_signal
        )
        for prompt, *responses in groups
        for tokens, has_signal in responses
    ]


def test_whole_groups_are_dealt_by_their_tokens():
    dealt = samples(
        (1, (2, True), (2, True)),  # 5 tokens
        (9, (1, True), (50, False)),  # 10, the response without a signal left out
        (1, (1, False), (1, False)),
        (2, (1, True), (1, True)),  # 4
        (3, (1, True), (4, True)),  # 8
    )
    assert deal_groups(dealt, 2, 1) == [[0, 1, 2, 6, 7, 8, 9]]
    assert deal_groups(dealt, 2, 2) == [[2, 6, 7], [0, 1, 8, 9]]
    assert deal_groups(dealt, 2, 5) == [[2], [8, 9], [0, 1], [6, 7], []]


def test_a_pass_is_never_cut_where_all_processes_wait_for_it():
    for count, expected in ((1, 10 * MAX_FORWARD_TOKENS), (2, MAX_FORWARD_TOKENS)):
        config = GSPOConfig(micro_batch_tokens=10 * MAX_FORWARD_TOKENS)
        assert ForwardPasses(config, SimpleNamespace(count=count)).max_tokens == expected


def test_all_processes_halve_a_pass_if_one_has_to(capsys):
    """The others come to the end of it, and then repeat it."""
    lacking = iter((True, False))
    others = SimpleNamespace(count=2, is_main=True, any=lambda flag: flag or next(lacking))
    passes = ForwardPasses(GSPOConfig(micro_batch_tokens=64), others)
    tokens = []
    assert passes.retry(lambda: tokens.append(passes.max_tokens) or "result", []) == "result"
    assert tokens == [64, 32] and "from now on 32 tokens per forward pass" in capsys.readouterr().err


def test_with_shards_no_process_repeats_a_pass(capsys):
    passes = ForwardPasses(GSPOConfig(micro_batch_tokens=64, shard="full"), SimpleNamespace(count=2))

    def run_out_of_memory():
        raise RuntimeError("CUDA out of memory.")

    with pytest.raises(RuntimeError, match="out of memory"):
        passes.retry(run_out_of_memory, [])
    assert "--resume with --micro_batch_tokens 32" in capsys.readouterr().err


def test_fewer_queries_than_processes_are_refused():
    refuse_idle_processes(GSPOConfig(batch_size=4), 4)
    with pytest.raises(ValueError, match="--batch_size 4: .* the 6 processes .* give --batch_size 6, and"):
        refuse_idle_processes(GSPOConfig(batch_size=4), 6)


@pytest.mark.parametrize(("variable", "name"), LAUNCHER_SETTINGS.items())
def test_a_launcher_that_would_shard_is_refused(monkeypatch, variable, name):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"launched with {name} .*give --shard full"):
        Processes("cpu")


@distributed
def test_the_smallest_gpu_decides_for_all_processes(tmp_path):
    on_ranks(2, unequal_gpus.configurations, tmp_path, "[80, 18]")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for config in first:  # 80 GB have room for AdamW and 128 rows
        assert config["optimizer"] == "adamw_8bit" and config["rollout_rows"] == 80


@distributed
def test_all_processes_raise_an_error_if_one_fails(tmp_path):
    on_ranks(2, one_fails.errors, tmp_path)
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    odd = str(UnicodeDecodeError("utf-8", b"", 0, 1, "odd"))
    bug, gone = ["KeyError", "'bug'"], ["EngineError", "gone"]
    told = ["ProcessFailed", "process 1 failed: KeyError: 'bug'"]
    unlucky, unlucky_told = ["UnicodeDecodeError", odd], ["ValueError", odd]
    # Pairs of each() and on_main().
    assert main == [0, 0, told, 0, gone, 0, told, unlucky, unlucky, unlucky]
    assert other == [1, 0, bug, 0, gone, 0, bug, unlucky_told, unlucky_told, unlucky_told]
