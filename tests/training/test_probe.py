"""The probe: what it says about inputs of which each deserves another advice, and how it samples."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gspo.policy.rollout import Rollout
from gspo.training.findings import figures_of, findings
from gspo.training.probe import Passes, Sampled, probe_training, run_seconds, sample_groups, shown
from gspo.training.training_run import epoch_order
from gspo_implementation import GSPOConfig
from support.commands import TINY, run_here
from support.sorting import Sort, problems, shared_prefix, trainer, weights_of


def exact(asked, responses):
    return [float(p.answer == r) for p, r in zip(asked, responses, strict=True)]


def reward_of(value):
    return lambda asked, _: [value] * len(asked)


def marked(asked, responses):
    """Pays for an answer after a mark, of which the prompt says nothing."""
    return [float(f"#### {p.answer}" == r) for p, r in zip(asked, responses, strict=True)]


def by_problem(asked, _):
    return [float(p.id[-1] in "02468") for p in asked]


class Failing:
    """Cannot judge responses to problems that end in one of these digits."""

    failure = "Traceback (most recent call last):\nKeyError: 'unit'\n"

    def __init__(self, digits):
        self.digits = digits

    def __call__(self, asked, responses):
        rewards = shared_prefix(asked, responses)
        return [None if p.id[-1] in self.digits else r for p, r in zip(asked, rewards, strict=True)]


def add_noise(t):
    log_probs = t.forward.log_probs
    t.forward.log_probs = lambda *arguments: [x + 0.01 * torch.randn(()) for x in log_probs(*arguments)]


def remove_chat_template(t):
    t.tokenizer.chat_template = None


def unsortable(count):
    """Problems that the model does not solve: the answer is in descending order."""
    return [replace(problem, answer=problem.answer[::-1]) for problem in problems(count)]


ROLLOUT = Rollout([1], [2, 3], [-0.1, -0.2], "12", True)
LONG = [Sort("7" * 600, "7" * 600) for _ in range(5)]
CASES = {  # name: (exit code, names of the findings, problems, reward, settings, change of the trainer)
    "can learn": (0, [], problems(20), shared_prefix, {}, None),
    "too hard": (1, ["Too hard"], unsortable(40), exact, {}, None),
    "too easy": (1, ["Too easy"], problems(40), reward_of(1.0), {}, None),
    "cut off": (1, ["Cut off"], problems(40), exact, {"max_new_tokens": 4}, None),
    "cut off and rewarded": (0, [], problems(20), shared_prefix, {"max_new_tokens": 4}, None),
    "form": (1, ["Form"], problems(40), marked, {}, None),
    "constant reward": (1, ["Constant reward"], problems(40), reward_of(0.5), {}, None),
    "unjudged": (1, ["Unjudged"], problems(20), Failing("0123456789"), {}, None),
    "some unjudged": (0, ["Unjudged"], problems(20), Failing("01"), {}, None),
    "tied groups": (1, ["Tied groups"], unsortable(40), by_problem, {}, None),
    "noise": (0, ["Noise"], problems(20), shared_prefix, {}, add_noise),
    "no chat template": (0, ["No chat template"], problems(20), shared_prefix, {}, remove_chat_template),
    "no room": (0, ["No room"], problems(20) + LONG, shared_prefix, {}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_each_cause_has_its_advice(name, capsys):
    code, names, train, reward_fn, settings, change = CASES[name]
    t = trainer(reward_fn=reward_fn, **settings)
    if change:
        change(t)
    before = weights_of(t.model)
    assert probe_training(t, train, problems(4, seed=1)) == code
    said = capsys.readouterr().out
    paragraph = next(line for line in said.splitlines() if line.startswith(("This model", "Training would")))
    assert [name for name in ALL_NAMES if f". {name}: " in paragraph] == names, said
    assert paragraph.startswith("This model can learn" if code == 0 else "Training would be in vain")
    assert ("KeyError: 'unit'\n" in said) == (names == ["Unjudged"])
    assert torch.equal(weights_of(t.model), before) and t.step == 0
    assert all(p.grad is None for p in t.model.parameters())


ALL_NAMES = ["Unjudged", "Constant reward", "Cut off", "Form", "Too hard", "Too easy", "Tied groups",
             "No room", "Noise", "No chat template", "Slow"]  # fmt: skip


def test_few_groups_without_a_signal_are_no_verdict(capsys):
    assert probe_training(trainer(reward_fn=exact), unsortable(3), problems(4, seed=1)) == 0
    assert "Too few groups to tell: of 3 sampled, none has a signal" in capsys.readouterr().out
    for value in (0.5, None):  # for these, few are enough
        assert probe_training(trainer(reward_fn=reward_of(value)), problems(3), problems(4, seed=1)) == 1


def test_more_groups_are_sampled_only_if_none_has_a_signal():
    for reward_fn, count in ((shared_prefix, 16), (reward_of(0.0), 32), (reward_of(None), 16)):
        t = trainer(reward_fn=reward_fn)
        assert len(sample_groups(t, problems(40)).samples) == count * 4
    assert len(sample_groups(trainer(reward_fn=reward_of(0.0)), problems(18)).samples) == 18 * 4


def test_the_first_responses_are_those_of_the_run():
    train = problems(20)
    sampled = sample_groups(trainer(), train).samples
    queries = [train[place] for place in epoch_order(0, 0, 20)]
    t = trainer()
    for index in range(2):
        batch = t.collect(queries[4 * index : 4 * index + 4], index)
        assert [s.rollout for s in batch.samples] == [
            s.rollout for s in sampled[16 * index : 16 * index + 16]
        ]
        assert [s.reward for s in batch.samples] == [s.reward for s in sampled[16 * index : 16 * index + 16]]


def test_an_answer_that_stands_there_by_accident_is_no_other_form():
    """Each response names every answer, so that the own one says nothing."""
    asked = [Sort(f"{i}", answer) for i, answer in enumerate(["yes", "no"] * 8)]
    t = trainer()
    samples = []
    for problem in asked:
        (sample, *_), _ = t._sample_and_reward([problem], 0, 1, 1.0)
        samples += [replace(sample, reward=0.0, rollout=replace(sample.rollout, text="Yes or no?"))] * 4
    figures = figures_of(samples, t.config, True)
    assert figures.with_answer == figures.answerable == figures.with_other_answer == 64
    assert [finding.name for finding in findings(figures)] == ["too hard"]
    right = [replace(s, rollout=replace(s.rollout, text=f"It is {s.problem.answer}.")) for s in samples]
    assert [finding.name for finding in findings(figures_of(right, t.config, True))] == ["form"]


@pytest.mark.parametrize(
    ("name", "below", "above"),
    [
        ("noise", {"noise_spread": 0.33}, {"noise_spread": 0.34}),
        ("noise", {"null_clip_fraction": 0.01}, {"null_clip_fraction": 0.011}),
        ("slow", {"hours": 24.0}, {"hours": 24.1}),
        ("no room", {"dropped_problems": 0}, {"dropped_problems": 1, "num_problems": 16}),
        ("too easy", {"all_right": 14, "with_signal": 2}, {"all_right": 15, "with_signal": 1}),
        (
            "too hard",
            {"all_wrong": 15, "with_signal": 2, "reward_mean": 0.01},
            {"all_wrong": 15, "with_signal": 1, "reward_mean": 0.01},
        ),
        ("cut off", {"truncated": 15}, {"truncated": 16}),
        ("form", {"with_answer": 14, "with_other_answer": 4.5}, {"with_answer": 14, "with_other_answer": 4}),
    ],
)
def test_where_the_findings_begin(name, below, above):
    t = trainer()
    t.engine = SimpleNamespace(generate=lambda prompts, size, _: [ROLLOUT] * (len(prompts) * size))
    healthy = replace(
        figures_of(sample_groups(t, problems(16)).samples, t.config, True),
        with_signal=12, all_right=2, all_wrong=2, reward_mean=0.4, only_reward=None, answerable=50,
    )  # fmt: skip
    assert findings(healthy) == findings(replace(healthy, **below)) == []
    assert [finding.name for finding in findings(replace(healthy, **above))] == [name]


def test_what_explains_the_others():
    """All are wrong: because they were cut, because they are in another form, or because they are wrong."""
    t = trainer(reward_fn=exact)
    wrong = figures_of(sample_groups(t, unsortable(40)).samples, t.config, True)
    for change, names in (
        ({}, ["too hard"]),
        ({"truncated": 114}, ["cut off", "too hard"]),  # of 128; those that ended are wrong as well
        ({"truncated": 116}, ["cut off"]),
        ({"with_answer": 60}, ["form"]),
    ):
        assert [finding.name for finding in findings(replace(wrong, **change))] == names


def test_a_signal_in_hardly_any_group_is_no_praise(capsys):
    first = problems(16)[epoch_order(0, 0, 16)[0]]
    t = trainer(reward_fn=lambda asked, r: [float(p == first and i % 2) for i, p in enumerate(asked)])
    assert probe_training(t, problems(16), problems(4, seed=1)) == 0
    said = capsys.readouterr().out
    assert "would learn little" in said and "only 1 of 16 groups sampled have a signal" in said


def test_the_time_of_a_run_is_estimated_from_its_parts():
    config = GSPOConfig(num_epochs=2, batch_size=4, mini_batch_size=1, group_size=8, eval_frequency=10)
    t = trainer(reward_fn=shared_prefix)
    samples = sample_groups(t, problems(16)).samples
    figures = replace(figures_of(samples, t.config, True), with_signal=8, groups=16, tokens_mean=10.0)
    sampled, passes = Sampled(samples, {}, response_s=0.5), Passes(0, 0, 0, log_prob_s=0.01, update_s=0.03)
    # 2 epochs of 100 problems: 1,600 responses of 10 tokens, half of them with a signal; 50 rollout batches
    # of 4 updates, of which the first needs no pass before; evaluations after 0, 10, 20, 30, 40 and 50.
    assert run_seconds(config, figures, sampled, passes, 100, 50) == pytest.approx(
        {"sampling": 800, "log-probabilities": 60, "updates": 240, "6 evaluations": 1200}
    )
    # With a KL term every group is trained on, and the starting model has a pass of its own.
    with_kl = run_seconds(replace(config, kl_coef=0.1), figures, sampled, passes, 100, 50)
    assert with_kl["log-probabilities"] == pytest.approx(1.75 * 160) and with_kl["updates"] == 480


def test_what_is_shown_cannot_move_the_cursor():
    assert shown("a\x1b[2Jb\nc") == "    a\\x1b[2Jb\n    c"
    assert len(shown("x" * 10_000)) < 1300


def test_the_command_probes_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_here(*TINY, "--probe", "--num_train_samples", 20)
    assert done.returncode == 0, done.stderr
    assert "A prompt, as the model sees it:\n    " in done.stdout
    assert "groups with a signal" in done.stdout and "2 evaluations" in done.stdout
    done = run_here(*TINY, "--probe", "--num_train_samples", 20, "--max_new_tokens", 2)
    assert done.returncode == 1 and "raise --max_new_tokens (now 2)" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_probe_continues_no_run(tmp_path):
    made = run_here(*TINY, "--output_dir", tmp_path, "--run_name", "r", "--num_train_samples", 2)
    assert made.returncode == 0
    done = run_here("--resume", tmp_path / "r", "--probe")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--model_name" in done.stderr


def test_a_run_says_the_same_about_its_first_batches_once(tmp_path, capsys):
    settings = {"output_dir": str(tmp_path), "eval_frequency": 0, "save_frequency": 0}
    trainer(reward_fn=exact, run_name="hard", **settings).train(unsortable(28), problems(2, seed=1))
    said = capsys.readouterr().err
    assert said.count("too hard: ") == 1
    assert "warning, rollout batches 1 to 5: too hard: 20 of 20 groups have no right response" in said
    trainer(run_name="fine", **settings).train(problems(28), problems(2, seed=1))
    assert "rollout batches 1 to 5" not in capsys.readouterr().err
