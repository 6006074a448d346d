"""The page in headless Chromium; skipped where it is not installed."""

import html
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from bfpo.report.html import write_report

from .fake_runs import SCRIPT
from .page import read_lines

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome here")

# The page is in a frame 360 px wide, because a window has a minimum width.
PHONE = """<!doctype html><body><iframe src="report.html" width="360" height="800"></iframe><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument;
  const open = [...page.querySelectorAll("details")].map(details => details.open);
  page.querySelectorAll("details").forEach(details => details.open = true);
  const boxes = [...page.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
  const sizes = boxes.map(box => [box.width, box.height]);
  document.body.textContent = JSON.stringify({
    width: page.documentElement.scrollWidth, height: page.documentElement.scrollHeight, open, sizes,
    title: page.title, scripts: page.scripts.length, images: page.images.length,
  });
};
</script>"""


def run_in_browser(path: Path, profile: Path):
    """Open a page whose script replaces the body by JSON, and return the content."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(html.unescape(re.search(r"<body>(.*)</body>", done.stdout)[1]))


def test_the_page_fits_a_phone_and_runs_no_script_of_a_model(tmp_path, runs):
    out = tmp_path / "out"
    # The prompt with the planted script is the only harmful one, so that it is among those shown.
    for folder in runs:
        for name in ("prompts", "completions", "verdicts"):
            path = folder / "evaluation" / f"{name}.jsonl"
            lines = [line for line in read_lines(path) if "harmful-000" in line or '"harmful-' not in line]
            path.write_text("".join(f"{line}\n" for line in lines))
    write_report(out, runs, title="A title", note="long " + "w" * 300)
    assert html.escape(SCRIPT, quote=True).replace("&#x27;", "&#39;") in (out / "report.html").read_text()
    (out / "phone.html").write_text(PHONE)
    page = run_in_browser(out / "phone.html", tmp_path / "profile")
    assert page["title"] == "A title"
    assert (page["scripts"], page["images"]) == (1, 0)
    # The frame's own scroll bar takes some of its 360 px.
    assert 300 < page["width"] <= 360
    assert page["height"] > 2000
    assert len(page["open"]) == 7
    assert not any(page["open"])
    assert len(page["sizes"]) > 10
    assert all(0 < width <= 360 and height > 0 for width, height in page["sizes"])


SEARCH = """<!doctype html><body><iframe src="report.html" width="400" height="800"></iframe><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, form = page.getElementById("search");
  const count = () => parseInt(page.getElementById("match-count").textContent);
  const counts = [count()];
  const set = (name, value) => {
    form[name].value = value;
    form.dispatchEvent(new Event("input")); counts.push(count());
  };
  set("verdict", "unsafe"); set("verdict", ""); set("words", "no such words"); set("words", "SNARE film");
  document.body.textContent = JSON.stringify([form.hidden, ...counts]);
};
</script>"""


def test_answers_can_be_searched(tmp_path, two_runs):
    shutil.copy(two_runs.folder / "report.html", tmp_path)
    (tmp_path / "search.html").write_text(SEARCH)
    hidden, total, unsafe, again, no_words, words = run_in_browser(tmp_path / "search.html", tmp_path / "profile")
    assert not hidden
    assert 0 < unsafe < total == again
    assert no_words == 0
    assert 0 < words < total / 4


class Chromium:
    """A headless browser, controlled by the DevTools protocol over two pipes."""

    def __init__(self, profile):
        (commands, self._commands), (self._responses, responses) = os.pipe(), os.pipe()
        options = f"--headless --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={profile}"
        # The browser reads from descriptor 3 and writes to 4.
        command = f"exec {CHROMIUM} {options} 3<&{commands} 4>&{responses}"
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(commands, responses), stdout=quiet, stderr=quiet
        )
        os.close(commands)
        os.close(responses)
        self._buffer, self._num_commands, self._session = b"", 0, {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}

    def open(self, page, *, width=1200, scheme="light"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        # The tab is left first, so that the same page is loaded again.
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=page.as_uri())
        deadline = time.monotonic() + 60
        while self.evaluate("document.readyState + ' ' + location.href") != f"complete {page.as_uri()}":
            assert time.monotonic() < deadline, f"{page} is not loaded after a minute"
            time.sleep(0.05)

    def send(self, method, **params):
        self._num_commands += 1
        message = {"id": self._num_commands, "method": method, "params": params, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                data = os.read(self._responses, 65536)
                assert data, "the browser ended"
                self._buffer += data
            line, _, self._buffer = self._buffer.partition(b"\0")
            response = json.loads(line)
            if response.get("id") == self._num_commands:
                return response["result"]

    def press(self, key, code, text=""):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)

    def evaluate(self, expression):
        options = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        return self.send("Runtime.evaluate", **options)["result"].get("value")

    def call(self, function, *arguments):
        return self.evaluate(f"({function})({', '.join(map(json.dumps, arguments))})")

    def take_screenshot(self, **clip):
        return self.send("Page.captureScreenshot", clip={**clip, "scale": 1})["data"]

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._responses)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


FOCUSED = """(() => {
  const controls = [...document.querySelectorAll("a, summary, input, select, [tabindex='0']")]
    .filter(control => control.checkVisibility());
  const active = document.activeElement, style = getComputedStyle(active);
  return [controls.indexOf(active), controls.length, style.outlineStyle !== "none" || style.boxShadow !== "none"];
})()"""


def test_the_keyboard_reaches_every_control_in_order_with_a_visible_focus(browser, two_runs):
    browser.open(two_runs.folder / "report.html")
    _, num_controls, _ = browser.evaluate(FOCUSED)
    assert num_controls > 10
    order = []
    for _ in range(num_controls):
        browser.press("Tab", 9)
        index, _, is_visible = browser.evaluate(FOCUSED)
        assert is_visible
        order.append(index)
    assert order == list(range(num_controls))
    # The keyboard opens a fold.
    browser.evaluate("document.querySelector('summary').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.evaluate("document.activeElement.parentElement.open") is True


# Sizes in pixels, after all folds that contain a table are opened.
LAYOUT = """() => {
  document.querySelectorAll("details:has(table)").forEach(details => details.open = true);
  const root = document.documentElement, box = selector => document.querySelector(selector).getBoundingClientRect();
  const cells = [...document.querySelectorAll("th, td, caption")];
  const texts = [...document.querySelectorAll("svg text")].filter(text => text.checkVisibility());
  const [section, plane, caption] = ["#plane", "#plane .panel", "#plane figcaption"].map(box);
  return {
    page: [root.scrollWidth, root.clientWidth],
    frames: [...document.querySelectorAll(".scroll")].map(frame => [frame.scrollWidth, frame.clientWidth]),
    cells: cells.length,
    clippedCells: cells.filter(cell => cell.scrollWidth > cell.clientWidth).map(cell => cell.textContent),
    clippedTexts: texts.filter(text => {
      const inner = text.getBoundingClientRect(), outer = text.ownerSVGElement.getBoundingClientRect();
      return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
    }).map(text => text.textContent),
    isCentered: Math.abs(plane.left + plane.right - section.left - section.right) < 2,
    isBesideCaption: caption.left > plane.right && caption.top < plane.bottom && caption.right > section.right - 2,
  };
}"""
# Place of a strip along the right edge of a frame, after its table is scrolled to its start (0) or its end (1).
STRIP = """(index, position) => {
  const frame = document.querySelectorAll(".scroll")[index];
  frame.scrollLeft = position * frame.scrollWidth;
  frame.scrollIntoView({behavior: "instant"});
  const box = frame.getBoundingClientRect(), x = Math.floor(box.right) - 5, y = Math.ceil(box.top) + 5;
  return {x: x + scrollX, y: y + scrollY, width: 3, height: Math.min(frame.clientHeight - 10, innerHeight - y)};
}"""
# Share of the pixels of an image that differ from the background of tables by more than a shade.
SHADED = """async data => {
  const bytes = Uint8Array.from(atob(data), char => char.charCodeAt(0));
  const image = await createImageBitmap(new Blob([bytes]));
  const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, image.width, image.height).data;
  const panel = getComputedStyle(document.querySelector(".scroll")).backgroundColor.match(/\\d+/g).map(Number);
  let shaded = 0;
  for (let start = 0; start < pixels.length; start += 4)
    shaded += panel.some((value, channel) => Math.abs(value - pixels[start + channel]) > 40);
  return shaded / (pixels.length / 4);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200, 1920])
@pytest.mark.parametrize("runs", ["two_judged_runs", "twelve_runs"])
def test_nothing_is_cut_and_frames_that_scroll_have_a_visible_edge(browser, request, runs, width, scheme):
    browser.open(request.getfixturevalue(runs).folder / "report.html", width=width, scheme=scheme)
    layout = browser.call(LAYOUT)
    assert layout["page"][0] <= layout["page"][1] <= width
    assert layout["cells"] > 100
    assert layout["clippedCells"] == layout["clippedTexts"] == []
    assert layout["isCentered"] or layout["isBesideCaption"]
    scrolls = [content > visible for content, visible in layout["frames"]]
    assert len(scrolls) >= 6

    def measure_edge(index, position):
        return browser.call(SHADED, browser.take_screenshot(**browser.call(STRIP, index, position)))

    for index, is_scrolling in enumerate(scrolls):
        if is_scrolling:
            assert measure_edge(index, 0) > 0.9
        assert measure_edge(index, 1) < 0.1
    # Tables of two runs scroll on narrow screens only.
    assert any(scrolls) == (width == 390 or runs == "twelve_runs")
