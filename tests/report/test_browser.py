"""The page in a browser: it draws, asks the network for nothing, and shows hostile text as text."""

import json
import shutil
import time
from dataclasses import replace

import pytest

from gspo.report.page import write_page
from gspo.report.run_record import read_run
from support import ROOT

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("no chromium and chromedriver on PATH", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

RECORDS = ROOT / "tests" / "report" / "records"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage"
).split()
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=http://example.invalid/x>\x1b[31mred\u202e"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def opened(browser, folder, *runs, width=1280):
    """Open the page of some runs in a window of this width."""
    page = folder / "report.html"
    write_page(runs, page)
    browser.get_log("browser"), browser.get_log("performance")
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    return page


def requests_of(browser, page):
    """The addresses that the page asked for, without its own; other pages of the browser have theirs."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    asked = [each["request"]["url"] for each in sent if each["documentURL"] == page.as_uri()]
    assert page.as_uri() in asked  # the log is on
    return [url for url in asked if url != page.as_uri()]


def many(run, count):
    lines = [run.metrics[i % len(run.metrics)] | {"step": i + 1} for i in range(count)]
    return replace(run, metrics=lines)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("names", [["healthy"], ["emergency_stop"], ["healthy", "gibberish", "interrupted"]])
def test_the_page_draws_without_an_error_or_a_request(browser, tmp_path, names, width):
    page = opened(browser, tmp_path, *(read_run(RECORDS / name) for name in names), width=width)
    assert browser.get_log("browser") == []
    assert requests_of(browser, page) == []
    # A run that stopped in its first rollout batch has its evaluation alone.
    expected = 1 if names == ["emergency_stop"] else 8
    assert browser.execute_script("return document.querySelectorAll('.charts canvas').length") == expected
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    # Each chart has something other than background on it.
    painted = """return [...document.querySelectorAll('.charts canvas')].map((canvas) =>
        canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some((x) => x))"""
    assert browser.execute_script(painted) == [True] * expected


def test_the_values_under_the_pointer_are_shown(browser, tmp_path):
    run = read_run(RECORDS / "healthy")
    opened(browser, tmp_path, run)
    # The pointer is put upon the third rollout batch of the first chart; all charts follow.
    browser.execute_script("""
        const over = document.querySelector('.charts .u-over'), box = over.getBoundingClientRect();
        const [low, high] = [plots[0].scales.x.min, plots[0].scales.x.max];
        const place = { clientX: box.left + box.width * (3 - low) / (high - low), clientY: box.top + 50 };
        over.dispatchEvent(new MouseEvent('mouseenter', place));
        over.dispatchEvent(new MouseEvent('mousemove', place));""")
    time.sleep(0.2)  # uPlot shows it with the next frame
    legends = browser.execute_script(
        "return [0, 3].map((i) => document.querySelectorAll('.u-legend')[i].innerText)"
    )
    third = run.metrics[2]
    for legend, value in zip(legends, (third["reward_mean"], third["grad_norm"]), strict=True):
        assert "3" in legend.split("\n")[0] and f"{value:.4g}".rstrip("0") in legend


def test_hostile_text_is_shown_as_text(browser, tmp_path):
    run = read_run(RECORDS / "healthy")
    lines = [
        {"step": step, "problem": 0, "prompt": HOSTILE, "answer": HOSTILE, "responses": [HOSTILE],
         "rewards": [float(step > 0)], "passed": [step > 0]}
        for step in (0, run.step)
    ]  # fmt: skip
    samples = [
        {"step": 1, "kind": "best", "prompt": HOSTILE, "response": HOSTILE, "reward": 1.0, "tokens": 3}
    ]
    config = run.config | {"model_name": HOSTILE}
    hostile = replace(run, name=HOSTILE, config=config, eval_samples=lines, samples=samples)
    page = opened(browser, tmp_path, hostile)
    assert browser.get_log("browser") == [] and requests_of(browser, page) == []
    assert browser.title != "owned"
    assert browser.execute_script("return document.querySelectorAll('main img, main script').length") == 0
    shown = browser.execute_script("return document.querySelector('details pre').textContent")
    assert shown == HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\x202e")


def test_a_run_of_a_thousand_rollout_batches_is_drawn_in_two_seconds(browser, tmp_path):
    opened(browser, tmp_path, many(read_run(RECORDS / "healthy"), 1000))
    drawn = browser.execute_script("return performance.getEntriesByName('drawn')[0].startTime / 1000")
    assert drawn < 2
