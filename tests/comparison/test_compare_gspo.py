"""The command: settings, runs that are made once, tables; with runs that are made up, and with real ones."""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

import compare_gspo
from data_loader import RowFormat, load_problems
from gspo.comparison.arms import Arm, arms_of, cells_of
from gspo.comparison.cells import cell_name, decided_differently
from gspo.comparison.claims import markdown
from gspo.comparison.paper import SCALES, sections
from gspo.comparison.runner import Interrupted, Runner, last_line
from gspo.policy.known_models import known_config
from gspo.training.config import GSPOConfig
from gspo.training.training_run import questions_digest
from support import ROOT
from train_gspo import given_flags

FAKE = shlex.join([sys.executable, str(ROOT / "tests" / "support" / "fake_training.py")])


def compare(folder, *arguments):
    """Run the command here on made-up runs. Returns the exit code."""
    return compare_gspo.main(["--launch", FAKE, "--output_dir", str(folder), "--name", "table", *arguments])


def result_in(folder):
    return json.loads((folder / "table" / "comparison.json").read_text())


def starts(folder):
    """How often each run was started."""
    return {path.parent.name: path.read_text().count("started") for path in folder.glob("cells/*/starts.txt")}


# ---- settings


def labels(*arguments):
    return [(arm.label, arm.baseline) for arm in arms_of(*arguments)]


def test_settings_are_compared_with_the_first_value_of_the_first_axis():
    assert labels("gspo,grpo", ["learning_rate=1,2"], []) == [
        ("gspo, learning_rate 1", None),
        ("gspo, learning_rate 2", "gspo, learning_rate 1"),
        ("grpo, learning_rate 1", "gspo, learning_rate 1"),
        ("grpo, learning_rate 2", "gspo, learning_rate 2"),
    ]
    assert labels(None, [], ["a: --kl_coef 1", "b:"]) == [("a", None), ("b", "a")]
    assert [arm.flags for arm in arms_of(None, ["shuffle_rewards=off,on"], [])] == [
        (),
        ("--shuffle_rewards",),
    ]


def test_a_setting_that_is_named_twice_gets_other_seeds(tmp_path):
    arms = arms_of("gspo,gspo", [], [])
    cells = cells_of(arms, ["--seed", "3", "--output_dir", str(tmp_path)], 2, given_flags)
    assert [(cell.arm, cell.index, cell.seed) for cell in cells] == [
        ("gspo", 0, 3), ("gspo (other seeds)", 0, 1003), ("gspo", 1, 4), ("gspo (other seeds)", 1, 1004),
    ]  # fmt: skip
    assert len({cell.folder for cell in cells}) == 4


def test_settings_may_differ_in_training_data_where_the_held_out_problems_are_given(tmp_path):
    arms = arms_of(None, ["dataset_path=a.jsonl,b.jsonl"], [])
    with pytest.raises(ValueError, match="--dataset_path differs"):
        cells_of(arms, [], 1, given_flags)
    assert len(cells_of(arms, ["--eval_path", "held_out.jsonl"], 1, given_flags)) == 2


def test_the_flags_of_a_run_are_its_settings(tmp_path):
    (tmp_path / "flags.txt").write_text("--kl_coef 0.5  # a comment")
    shared = [f"@{tmp_path / 'flags.txt'}", "--prompt_suffix", "-- Think.", "--shuffle_rewards"]
    for cell in cells_of(arms_of("gspo,grpo", [], []), [*shared, "--batch_size", "8"], 2, given_flags):
        assert GSPOConfig(**given_flags(cell.flags)) == cell.config
        assert cell.config.kl_coef == 0.5 and cell.config.prompt_suffix == "-- Think."


def test_flags_in_a_file_of_one_setting_are_looked_at_too(tmp_path):
    (tmp_path / "flags.txt").write_text("--kl_coef 1 --seed 7")
    arms = arms_of(None, [], ["a:", f"b: @{tmp_path / 'flags.txt'}"])
    with pytest.raises(ValueError, match="--seed of one setting does not go with a comparison"):
        cells_of(arms, [], 1, given_flags)


def test_models_that_would_get_problems_of_other_levels_are_refused(tmp_path, capsys):
    known_config("Qwen/Qwen2.5-0.5B-Instruct").save_pretrained(tmp_path)
    models = ["--vary", f"model_name=tiny,{tmp_path}", "--dataset", "math", "--device", "cpu"]
    own = ["--output_dir", str(tmp_path / "out"), "--num_train_samples", "4", "--num_eval_samples", "4"]
    assert compare_gspo.main([*models, *own]) == 2
    said = capsys.readouterr().err
    assert "held-out problems differ between" in said and "(easy) and" in said and "(medium)" in said


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "nothing to compare"),
        (["--vary", "learning=1,2"], "--vary learning=1,2: give a flag"),
        (["--vary", "seed=1,2"], "--vary seed=1,2: give a flag"),
        (["--arm", "wide"], "give a name and flags"),
        (["--arm", "a: --system_prompt don't"], "don't\": No closing quotation"),
        (["--arm", "a:", "--arm", "a: --kl_coef 1"], "two settings are named 'a'"),
        (["--algorithms", "gspo,grpo", "--run_name", "x"], "--run_name does not go with a comparison"),
        (["--algorithms", "gspo,grpo", "--resume=latest"], "--resume does not go with a comparison"),
        (["--arm", "a:", "--arm", "b: --seed 1"], "--seed of one setting does not go with a comparison"),
        (["--vary", "rollout_rows=1,2"], "'rollout_rows 1' and 'rollout_rows 2' are the same setting"),
        (["--algorithms", "gspo,sapo", "--left_clip_range", "1e-3"], "sapo clips nothing on that side"),
        (["--vary", "data_seed=0,1"], "--data_seed differs between settings (0, 1)"),
        (["--algorithms", "gspo,grpo", "--kl_coef", "-1"], "--kl_coef must be at least 0"),
    ],
)
def test_bad_input_is_one_line(arguments, said, capsys):
    assert compare_gspo.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_run_is_named_by_all_that_it_depends_on(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("one")

    def name(**settings):
        return cell_name(GSPOConfig(**{"seed": 1, "dataset_path": str(data)} | settings))

    plain = name()
    assert plain.startswith("auto-gspo-seed1-")
    same = {"output_dir": "elsewhere", "log_to": "wandb", "micro_batch_tokens": 5, "save_frequency": 1}
    assert [name(**{key: value}) for key, value in same.items()] == [plain] * len(same)
    other = {"learning_rate": 1.0, "eval_frequency": 3, "num_epochs": 2, "data_seed": 1, "temperature": 0.5}
    assert len({plain, *(name(**{key: value}) for key, value in other.items())}) == 1 + len(other)
    data.write_text("two")
    assert name() != plain
    assert cell_name(GSPOConfig(device="cuda")) != cell_name(GSPOConfig(device="cpu"))


def test_held_out_problems_are_known_by_their_questions_alone(tmp_path):
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(20)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))

    def digest(suffix, count=4):
        form = RowFormat(prompt_suffix=suffix)
        return questions_digest(load_problems("file", "eval", count, path=str(data), form=form))

    assert digest(" Think.") == digest(" Be brief.") != digest(" Think.", 3)


def test_what_is_left_open_and_decided_differently_is_told(tmp_path, capsys):
    sized = ["--vary", "group_size=4,8", "--model_name", "tiny", "--dataset", "sort", "--device", "cpu"]
    assert compare_gspo.main([*sized, "--output_dir", str(tmp_path), "--estimate"]) == 0
    options, flags = compare_gspo.parse([*sized, "--output_dir", str(tmp_path)])
    cells = cells_of(arms_of(None, options.vary, []), flags, 2, given_flags)
    compare_gspo.check_settings(cells)
    told = capsys.readouterr().err
    assert told == "warning: --eval_samples is left open and differs between runs (4, 8): name it for all\n"
    runs = [(cell.config, {"lora_rank": 32 * cell.index, "left_clip_range": cell.index}) for cell in cells]
    assert decided_differently(runs) == [
        "--lora_rank is left open and differs between runs (0, 32): name it for all"
    ]


# ---- made-up runs


def test_figures_and_verdicts_of_made_up_runs(tmp_path, capsys):
    assert compare(tmp_path, "--vary", "learning_rate=0.5,0.8,0.501", "--seeds", "4") == 0
    result = result_in(tmp_path)
    assert [arm["label"] for arm in result["arms"]] == [f"learning_rate {x}" for x in ("0.5", "0.8", "0.501")]
    means = result["arms"][1]["means"]
    # pass@1 goes from about 0 to .8 in one step, and its mean over the rollout batches is half of that
    assert means["final pass@1"]["mean"] == pytest.approx(0.8, abs=0.05)
    assert means["area under curve"]["mean"] == pytest.approx(0.4, abs=0.05)
    assert means["clip_fraction"]["mean"] == pytest.approx(0.8) and means["responses"]["mean"] == 24
    by_name = {(each["of"], each["measure"]): each for each in result["differences"]}
    ahead = by_name["learning_rate 0.8", "final pass@1"]
    # the noise is that of the seed and the problem, which both settings share: paired, it is gone
    assert ahead["verdict"] == "learning_rate 0.8 is ahead" and ahead["mean"] == pytest.approx(0.3)
    assert ahead["low"] == pytest.approx(0.3) and ahead["high"] == pytest.approx(0.3)
    assert (tmp_path / "table" / "report.html").stat().st_size > 50_000
    assert (tmp_path / "table" / "comparison.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert (
        "learning_rate 0.8 - learning_rate 0.5" in out
        and (tmp_path / "table" / "table.txt").read_text() in out
    )
    assert not list(tmp_path.glob("cells/*/checkpoints"))


def test_a_setting_against_itself_over_five_seeds(tmp_path):
    arms = ["--arm", "a: --learning_rate 0.5", "--arm", "b: --learning_rate 0.5"]
    assert compare(tmp_path, *arms, "--seeds", "5") == 0
    result = result_in(tmp_path)
    assert [each["verdict"] for each in result["differences"]] == ["no difference seen"] * 3
    assert [seed["seed"] for seed in result["arms"][1]["seeds"]] == [1000, 1001, 1002, 1003, 1004]


def test_models_are_kept_or_discarded(tmp_path):
    rates = ["--vary", "learning_rate=0.5,1", "--seeds", "1"]
    assert compare(tmp_path, *rates) == 0
    assert len(list(tmp_path.glob("cells/*/*/*.safetensors"))) == 1  # the other run was stopped
    assert len(list(tmp_path.glob("cells/*/checkpoints"))) == 1
    assert compare(tmp_path, *rates, "--discard_models") == 0
    assert not list(tmp_path.glob("cells/*/*/*.safetensors")) + list(tmp_path.glob("cells/*/checkpoints"))
    assert compare(tmp_path, *rates) == 0 and set(starts(tmp_path).values()) == {1}


def test_a_sixth_seed_adds_to_five(tmp_path):
    rates = ["--vary", "learning_rate=0.5,0.8"]
    assert compare(tmp_path, *rates, "--seeds", "2") == 0
    assert compare(tmp_path, *rates, "--seeds", "3") == 0
    assert len(starts(tmp_path)) == 6 and set(starts(tmp_path).values()) == {1}
    assert [seed["seed"] for seed in result_in(tmp_path)["arms"][0]["seeds"]] == [0, 1, 2]


def test_a_run_that_is_stopped_for_good_counts_with_its_last_evaluation(tmp_path, capsys):
    assert compare(tmp_path, "--vary", "learning_rate=0.5,1", "--seeds", "2") == 0
    dead = result_in(tmp_path)["arms"][1]
    assert dead["died"] == 2 and [seed["died"] for seed in dead["seeds"]] == ["loss is nan"] * 2
    assert abs(dead["means"]["final pass@1"]["mean"]) < 0.05
    assert "died: learning_rate 1, seed 0, after rollout batch 1: loss is nan" in capsys.readouterr().out
    verdict = result_in(tmp_path)["differences"][0]["verdict"]
    assert verdict == "learning_rate 0.5 is ahead (2 of 2 runs of learning_rate 1 died)"
    assert compare(tmp_path, "--vary", "learning_rate=0.5,1", "--seeds", "2") == 0
    assert set(starts(tmp_path).values()) == {1}  # it would die again


def test_a_run_whose_reward_is_to_be_mended_has_failed_and_goes_on(tmp_path, monkeypatch, capsys):
    down = tmp_path / "down"
    down.touch()
    monkeypatch.setenv("FAKE_UNJUDGED", str(down))
    assert compare(tmp_path, "--vary", "learning_rate=0.5,0.8", "--seeds", "2") == 1
    assert "FAILED: learning_rate 0.8, seed 1: train_gspo.py: emergency stop" in capsys.readouterr().out
    down.unlink()
    assert compare(tmp_path, "--vary", "learning_rate=0.5,0.8", "--seeds", "2") == 0
    assert [arm["died"] for arm in result_in(tmp_path)["arms"]] == [0, 0]
    assert set(starts(tmp_path).values()) == {2}


def test_gpus_are_divided_among_runs_side_by_side():
    def parts(jobs, gpus):
        runner = Runner(jobs, gpus=gpus)
        return [",".join(runner._gpus_of(place)) for place in range(jobs)]

    assert parts(2, ["0", "1"]) == ["0", "1"] and parts(3, ["a", "b"]) == ["a", "b", "a"]
    assert parts(2, list("01234")) == ["0,1", "2,3"]


def test_how_many_runs_are_made_side_by_side(monkeypatch):
    monkeypatch.setattr(compare_gspo, "visible_gpus", lambda: list("0123"))

    def jobs(flags, *arguments):
        options, own = compare_gspo.parse([*arguments, *flags])
        return compare_gspo.jobs_of(cells_of([Arm("a", ())], own, 1, given_flags), options)

    server = ["--rollout_engine", "vllm", "--vllm_url", "http://127.0.0.1:8000"]
    assert jobs([]) == 4 and jobs([], "--launch", "torchrun") == 1 and jobs([], "--jobs", "3") == 3
    assert jobs([], "--launch", "torchrun", "--jobs", "2") == 2 and jobs(server) == 1
    with pytest.raises(ValueError, match="--jobs 2 with --vllm_url: a server has the weights of one run"):
        jobs(server, "--jobs", "2")


def test_a_failed_run_is_shown_and_goes_on_with_the_same_command(tmp_path, capsys):
    assert compare(tmp_path, "--vary", "learning_rate=0.5,2", "--seeds", "2") == 1
    out = capsys.readouterr().out
    assert "FAILED: learning_rate 2, seed 0: no space left on device" in out
    assert compare(tmp_path, "--vary", "learning_rate=0.5,2", "--seeds", "2") == 1
    assert sorted(starts(tmp_path).values()) == [1, 1, 2, 2]


def test_a_failed_run_takes_no_part_in_the_figures(tmp_path):
    assert compare(tmp_path, "--vary", "learning_rate=0.5,2", "--seeds", "3") == 1
    result = result_in(tmp_path)
    assert result["arms"][1]["seeds"] == [] and "mean" not in result["differences"][0]
    assert len(result["failed"]) == 3


def test_settings_with_other_held_out_problems_are_not_compared(tmp_path, capsys):
    assert compare(tmp_path, "--learning_rate", "0.5", "--vary", "max_length=512,99", "--seeds", "2") == 0
    verdicts = {each["verdict"] for each in result_in(tmp_path)["differences"]}
    assert verdicts == {"other held-out problems: not compared"}
    assert "in --max_length are left out" in capsys.readouterr().out
    for path in tmp_path.glob("cells/*/config.json"):  # runs from before there was a digest
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"data": {"train_problems": config["data"]["train_problems"]}}))
    assert compare(tmp_path, "--learning_rate", "0.5", "--vary", "max_length=512,99", "--seeds", "2") == 0
    assert result_in(tmp_path)["differences"][0]["verdict"] == "no difference seen"


def test_a_run_fails_for_the_reason_that_it_gives_itself(tmp_path):
    log = tmp_path / "log"
    box, trace = "=" * 60, "Traceback (most recent call last):\n"
    launcher = (
        f"torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n{box}\nRoot Cause:\n{box}\n"
    )
    log.write_text("train_gspo.py: of an earlier start\n")
    begin = log.stat().st_size
    for said, reason in {
        "": "",
        "Killed\n": "Killed",
        "ValueError: printed by a reward\nbatch 3\n": "batch 3",
        f"{trace}[rank1]: ZeroDivisionError: by zero\n{trace}{launcher}": "ZeroDivisionError: by zero",
        "ValueError: b\ntrain_gspo.py: no space\n" + launcher: "train_gspo.py: no space",
    }.items():
        with log.open("r+") as file:
            file.truncate(begin)
            file.seek(begin)
            file.write(said)
        assert last_line(log, begin) == reason


def test_a_signal_in_the_instant_of_a_start_ends_the_run(tmp_path):
    class Signalled(Runner):
        def _process(self, cell, place):
            process = super()._process(cell, place)
            os.kill(os.getpid(), signal.SIGTERM)
            return process

    (cell,) = cells_of([Arm("a", ())], ["--output_dir", str(tmp_path)], 1, given_flags)
    begin = time.monotonic()
    with pytest.raises(Interrupted):
        Signalled(1, "sh -c 'sleep 60'").run([cell])
    assert time.monotonic() - begin < 30


def test_one_setting_under_two_names_is_refused(tmp_path, capsys):
    arms = ["--arm", "a: --learning_rate 0.5", "--arm", "b: --learning_rate 0.5 --kl_coef 0"]
    assert compare(tmp_path, *arms) == 2
    assert "'a' and 'b' are the same setting" in capsys.readouterr().err


def test_a_file_that_changes_during_a_comparison_ends_it(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("one")
    arms = ["--vary", "learning_rate=0.5,0.8", "--seeds", "2", "--dataset_path", str(data)]
    told = Runner._is_there

    def change(self, cell):
        if told(self, cell):
            data.write_text("two")
        return told(self, cell)

    monkeypatch.setattr(Runner, "_is_there", change)
    assert compare(tmp_path, *arms) == 2
    assert "learning_rate 0.8, seed 0: a file that it depends on has changed" in capsys.readouterr().err
    assert len(starts(tmp_path)) == 1


def test_a_run_that_may_have_read_a_changed_file_is_deleted(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("one")
    started = Runner._process

    def start_and_change(self, cell, place):
        process = started(self, cell, place)
        data.write_text("two")
        return process

    monkeypatch.setattr(Runner, "_process", start_and_change)
    monkeypatch.setenv("FAKE_WAIT_S", "1")
    arms = ["--vary", "learning_rate=0.5,0.8", "--seeds", "1", "--dataset_path", str(data)]
    assert compare(tmp_path, *arms) == 2
    assert "learning_rate 0.5, seed 0: a file that it depends on has changed" in capsys.readouterr().err
    assert not starts(tmp_path)


def test_a_killed_run_is_said_to_be_killed(tmp_path):
    assert compare(tmp_path, "--vary", "learning_rate=0.5,4", "--seeds", "1") == 1
    table = (tmp_path / "table" / "table.txt").read_text()
    assert "FAILED: learning_rate 4, seed 0: killed by SIGKILL" in table


def test_two_comparisons_at_once_in_one_folder_are_refused(tmp_path, capsys):
    (tmp_path / "cells").mkdir()
    with (tmp_path / "cells" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert compare(tmp_path, "--vary", "learning_rate=0.5,0.8") == 2
    assert "another comparison is at work" in capsys.readouterr().err and not starts(tmp_path)


def test_input_that_is_refused_ends_the_comparison_at_once(tmp_path, capsys):
    assert compare(tmp_path, "--vary", "learning_rate=3,0.5", "--seeds", "50") == 2
    assert capsys.readouterr().err.endswith("train_gspo.py: there is no such thing\n")
    assert len(starts(tmp_path)) <= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_comparison_that_is_stopped_twice_ends_as_one_that_was_not(tmp_path, number):
    rates = ["--vary", "learning_rate=0.5,0.8", "--seeds", "3", "--jobs", "2"]
    assert compare(tmp_path / "whole", *rates) == 0
    stopped = tmp_path / "stopped"
    command = [sys.executable, str(ROOT / "compare_gspo.py"), "--launch", FAKE, "--output_dir", str(stopped)]
    slow = os.environ | {"FAKE_WAIT_S": "0.5"}
    for runs in (1, 4):
        process = subprocess.Popen([*command, "--name", "table", *rates], env=slow)
        while len(starts(stopped)) < runs:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == (130 if number == signal.SIGTERM else -number)
    # What a kill may leave behind before a run has a record.
    empty = next(path for path in stopped.glob("cells/*") if path.is_dir())
    leftover = empty.with_name(f"{empty.name}.log")
    assert leftover.exists()
    assert compare(stopped, *rates) == 0

    def plain(folder):
        return json.loads(json.dumps(result_in(folder)).replace(str(folder), ""))

    assert plain(stopped) == plain(tmp_path / "whole")
    assert (stopped / "table" / "table.txt").read_text() == (tmp_path / "whole/table/table.txt").read_text()


# ---- the preset


def test_claims_whose_runs_failed_are_left_out(tmp_path, monkeypatch, capsys):
    own = ["--launch", FAKE, "--output_dir", str(tmp_path), "--jobs", "2", "--seeds", "2"]
    monkeypatch.setenv("FAKE_FAILS", "gspo_token")
    assert compare_gspo.main(["--preset", "paper", "--quick", *own]) == 1
    failed = json.loads((tmp_path / "paper-quick" / "paper.json").read_text())
    assert failed["failed"] == 4 and "(4 of them failed" in capsys.readouterr().out
    monkeypatch.delenv("FAKE_FAILS")
    assert compare_gspo.main(["--preset", "paper", "--quick", *own]) == 0
    whole = json.loads((tmp_path / "paper-quick" / "paper.json").read_text())
    assert whole["failed"] == 0 and whole["claims"][3:] == failed["claims"]  # three are read off the curves


def test_the_preset_keeps_its_own_flags_and_names_those_of_the_user(tmp_path, capsys):
    own = ["--preset", "paper", "--quick", "--seeds", "1", "--output_dir", str(tmp_path), "--launch", FAKE]
    assert compare_gspo.main([*own, "--learning_rate", "1e-4"]) == 2
    assert "--learning_rate: --preset paper has values of its own" in capsys.readouterr().err
    assert compare_gspo.main([*own, "--batch_size", "16"]) == 0
    assert compare_gspo.main([*own, "--seed", "5"]) == 0
    texts = [(folder / "claims.md").read_text() for folder in tmp_path.glob("paper-quick-*")]
    assert len(texts) == 2 and any("--batch_size 16`" in text for text in texts)


@pytest.mark.parametrize("name", SCALES)
def test_every_run_of_the_preset_has_valid_flags(name, tmp_path):
    scale = SCALES[name]
    own = ["--output_dir", str(tmp_path)]
    folders = set()
    for section in sections(scale):
        cells = cells_of(section.arms, [*scale.flags, *own], 3, given_flags)
        assert {arm.baseline for arm in section.arms} - {None} <= {arm.label for arm in section.arms}
        folders |= {cell.folder for cell in cells}
    assert len(folders) < 3 * sum(len(section.arms) for section in sections(scale))  # some are shared


def test_the_table_of_claims_is_made_of_the_json():
    claim = {"claim": "more", "paper": ".15", "measured": ".1", "holds": "yes"}
    environment = {"gpus": [], "cpu_cores": 2, "git_commit": "0123456789abcdef", "versions": {"torch": "2"}}
    made = {"command": "--preset paper", "seeds": 3, "runs": 9, "environment": environment}
    lines = markdown({"claims": [claim], **made}).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 5
    assert (
        lines[2] == "| more | .15 | .1 | yes |" and "2 CPU cores" in lines[-1] and "0123456789." in lines[-1]
    )
