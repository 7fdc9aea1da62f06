"""The page, the picture and the command, from files alone."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from gspo.report.__main__ import main
from gspo.report.charts import COLOURS, charts, groups_of
from gspo.report.curves import draw_curves
from gspo.report.live import DRAWING_SHARE, LiveReport
from gspo.report.page import figure, text, write_page
from gspo.report.run_record import read_run
from support import ROOT

RECORDS = ROOT / "tests" / "report" / "records"
HOSTILE = "</script><script>document.title='owned'</script>\x1b[31m\u202e\ud800 & <b>"


def long_run(batches=1000):
    """A run of many rollout batches with long texts, from a real one."""
    run = read_run(RECORDS / "healthy")

    def many(lines, count):
        return [lines[i % len(lines)] | {"step": i + 1} for i in range(count)]

    samples = [
        {"step": i // 2 + 1, "kind": ("best", "worst")[i % 2], "response": "word " * 2000, "reward": 0.5}
        for i in range(2 * batches)
    ]
    problem = {"prompt": "p " * 500, "answer": None, "responses": ["r " * 2000] * 4, "rewards": [1.0] * 4}
    texts = [problem | {"step": step, "problem": i} for step in (0, batches) for i in range(100)]
    evaluations = [run.evaluations[0], *many(run.evaluations, batches)[24::25]]
    return replace(
        run, metrics=many(run.metrics, batches), evaluations=evaluations, samples=samples, eval_samples=texts
    )


def test_the_report_of_a_long_run_is_small(tmp_path):
    write_page([long_run()], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 3e6
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    problems = page.count('<summary class="">Problem')
    samples = page.count('<summary class="">Rollout batch')
    assert 10 <= problems < 100 and re.search(f"{problems} of [0-9]+ problems, ", page)
    assert 10 <= samples < 1000 and f"{samples} of the 1000 rollout batches" in page


def test_text_of_a_model_cannot_leave_its_element(tmp_path):
    run = read_run(RECORDS / "healthy")
    problem = {"step": 0, "problem": 0, "prompt": HOSTILE, "responses": [HOSTILE], "rewards": [1.0]}
    write_page([replace(run, name=HOSTILE, eval_samples=[problem])], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 3 and "<b>" not in page
    assert "\x1b" not in page and "\u202e" not in page and "\\x1b[31m" in page
    write_page([replace(run, name=HOSTILE), run], tmp_path / "report.html")  # the name is in its charts
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("</script>") == 3


def test_figures_and_texts_of_any_kind_can_be_shown():
    assert [figure(x) for x in (float("nan"), None, "?", 1.23456789)] == ["not judged"] * 3 + ["1.235"]
    assert text(None) == "null" and text({"a": "<"}) == "{&quot;a&quot;: &quot;&lt;&quot;}"
    assert text("x" * 5000) == "x" * 2000 + " ... (3000 more characters)"


def test_runs_that_differ_in_the_seed_are_a_band():
    """Two seeds and one run of another learning rate: mean, lowest and highest, by hand."""
    run = read_run(RECORDS / "no_difference")

    def with_clipping(name, seed, learning_rate, values):
        metrics = [b | {"clip_fraction_eligible": v} for b, v in zip(run.metrics, values, strict=False)]
        config = run.config | {"seed": seed, "learning_rate": learning_rate, "run_name": name}
        return replace(run, name=name, config=config, metrics=metrics)

    runs = [
        with_clipping("run0", 0, 1e-5, [0.1, 0.2, 0.9]),
        with_clipping("run1", 1, 1e-5, [0.3, 0.4]),
        with_clipping("other", 0, 2e-5, [0.5]),
    ]
    assert [[run.name for run in same] for same in groups_of(runs)] == [["run0", "run1"], ["other"]]
    _, drawn, *_ = charts(runs)
    lines = {(line.kind, line.colour): (line.x, line.y) for line in drawn.lines}
    # As far as both have come.
    assert lines["line", COLOURS[0]] == ([1, 2], [0.2, 0.3])
    assert lines["low", COLOURS[0]] == ([1, 2], [0.1, 0.2])
    assert lines["high", COLOURS[0]] == ([1, 2], [0.3, 0.4])
    assert lines["line", COLOURS[1]] == ([1], [0.5])
    assert any("run0 with 2 seeds" in line.label for line in drawn.lines)


def test_a_chart_of_one_run_has_its_evaluations_with_intervals():
    run = read_run(RECORDS / "healthy")
    drawn, *_ = charts([run])
    lines = {line.kind: dict(zip(line.x, line.y, strict=True)) for line in drawn.lines}
    last = run.evaluations[-1]
    low, high = last["interval_95"]
    at = last["step"]
    assert (lines["low"][at], lines["points"][at], lines["high"][at]) == (low, last["pass_at_1"], high)


def with_vllm(run):
    """The run as one of vLLM, whose rollout batches but the first have responses to compare."""
    compared = {"masked_fraction": 0.2, "sampler_ess": 0.7}
    metrics = [run.metrics[0], *(batch | compared for batch in run.metrics[1:])]
    return replace(run, metrics=metrics, config=run.config | {"rollout_engine": "vllm"})


def test_experts_have_a_chart_where_there_are_some():
    run = read_run(RECORDS / "healthy")
    metrics = [run.metrics[0], *(batch | {"routing_changed": 0.1} for batch in run.metrics[1:])]
    titles = [[chart.title for chart in charts([each])] for each in (run, replace(run, metrics=metrics))]
    assert titles[1] == [*titles[0], "Experts that changed since pi_old"]


def test_sampler_and_trainer_have_a_chart_where_they_are_two():
    run = read_run(RECORDS / "healthy")
    assert not any("Sampler against" in chart.title for chart in charts([run]))
    last = charts([with_vllm(run)])[-1]
    assert last.title == "Sampler against trainer ! mismatch"
    steps = [batch["step"] for batch in run.metrics[1:]]
    assert [(line.x, line.y) for line in last.lines] == [
        (steps, [share] * len(steps)) for share in (0.2, 0.7)
    ]
    # Beside a run that samples by itself.
    titles = [chart.title for chart in charts([run, with_vllm(run)])]
    assert titles[-1] == "Sampler against trainer: masked"


@pytest.mark.parametrize(("edit", "height"), ((replace, 1260), (with_vllm, 1575)))
def test_the_picture_is_drawn(tmp_path, edit, height):
    draw_curves(edit(read_run(RECORDS / "gibberish")), tmp_path / "training_curves.png")
    with Image.open(tmp_path / "training_curves.png") as image:
        assert image.size == (1170, height)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 100
    assert [path.name for path in tmp_path.iterdir()] == ["training_curves.png"]


# ---- the command


def test_the_command_writes_into_the_run_and_prints_the_verdict(tmp_path, capsys):
    folder = shutil.copytree(RECORDS / "healthy", tmp_path / "run")
    assert main([str(folder)]) == 0
    assert "It learned, and no alarm was raised." in capsys.readouterr().out
    assert (folder / "report.html").exists() and (folder / "training_curves.png").exists()


def test_several_runs_give_one_page_here(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(RECORDS / "healthy"), str(RECORDS / "gibberish")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert capsys.readouterr().out.endswith("report.html\n")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.index('<h1 class="">healthy</h1>') < page.index('<h1 class="">gibberish</h1>')


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_without_a_run_is_one_line_and_exit_2(tmp_path, capsys, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    assert main([folder]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_1(tmp_path, capsys):
    assert main([str(RECORDS / "healthy"), "--output", str(tmp_path / "none" / "report.html")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_command_does_not_import_torch():
    code = "import sys, gspo.report.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- during a run


class Clock:
    """Seconds that pass only where a test says so."""

    seconds = 0.0

    def __call__(self):
        return self.seconds


def test_live_drawing_takes_at_most_its_share_of_the_time(tmp_path, monkeypatch):
    clock = Clock()
    drawn = []

    def draw(run, path):
        clock.seconds += 2
        drawn.append(run.step)

    monkeypatch.setattr("gspo.report.live.draw_curves", draw)
    folder = shutil.copytree(RECORDS / "healthy", tmp_path / "run")
    live = LiveReport(folder, clock)
    for step in range(1, 1001):
        clock.seconds += 10
        live.write("metrics", step, {})
    assert 2 * len(drawn) <= DRAWING_SHARE * clock.seconds
    assert len(drawn) >= 20
    live.close()
    assert (folder / "report.html").exists()


def test_a_failure_to_draw_is_said_once(tmp_path, capsys):
    live = LiveReport(tmp_path / "gone")
    live.close()
    live.close()
    assert capsys.readouterr().err.count("curves and report") == 1
