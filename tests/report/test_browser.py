"""The page in a real browser: headless Chromium, where there is one."""

import html
import json
import os
import re
import shutil
import subprocess
import time

import pytest

from bfpo.report.html import write_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome here")

# Opened inside a page of its own in a frame 360 px wide, which no least width of a window can widen.
PHONE = """<!doctype html><body><iframe src="report.html" width="360" height="800"></iframe><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument;
  const folded = [...page.querySelectorAll("details")].map(one => one.open);
  page.querySelectorAll("details").forEach(one => one.open = true);
  const boxes = [...page.querySelectorAll("svg")].map(one => one.getBoundingClientRect());
  const sizes = boxes.map(box => [box.width, box.height]);
  document.body.textContent = JSON.stringify({
    width: page.documentElement.scrollWidth, height: page.documentElement.scrollHeight, folded, sizes,
    title: page.title, scripts: page.scripts.length, images: page.images.length,
  });
};
</script>"""


def dump(path, profile) -> str:
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_a_browser_shows_the_page_on_a_phone_and_runs_nothing_in_it(tmp_path, runs, fake):
    out = tmp_path / "out"
    # The prompt with the planted script is the only harmful one, so that it is among those shown.
    for folder in runs:
        for name in ("prompts", "completions", "verdicts"):
            path = folder / "evaluation" / f"{name}.jsonl"
            rows = [
                line
                for line in path.read_text().splitlines(keepends=True)
                if "harmful-000" in line or '"harmful-' not in line
            ]
            path.write_text("".join(rows))
    write_report(out, runs, title="A title", note="long " + "w" * 300)
    assert html.escape(fake.script, quote=True).replace("&#x27;", "&#39;") in (out / "report.html").read_text()
    (out / "phone.html").write_text(PHONE)
    seen = json.loads(html.unescape(re.search(r"<body>(.*)</body>", dump(out / "phone.html", tmp_path / "p"))[1]))
    assert seen["title"] == "A title"
    assert (seen["scripts"], seen["images"]) == (1, 0)
    # The frame's own scroll bar takes some of its 360 px.
    assert 300 < seen["width"] <= 360
    assert seen["height"] > 2000
    assert len(seen["folded"]) == 7
    assert not any(seen["folded"])
    assert len(seen["sizes"]) > 10
    assert all(0 < width <= 360 and height > 0 for width, height in seen["sizes"])


SEARCH = """<!doctype html><body><iframe src="report.html" width="400" height="800"></iframe><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, form = page.getElementById("search");
  const count = () => parseInt(page.getElementById("found").textContent);
  const seen = [form.hidden, count()];
  const set = (name, value) => {
    form[name].value = value;
    form.dispatchEvent(new Event("input")); seen.push(count());
  };
  set("verdict", "unsafe"); set("verdict", ""); set("words", "no such words"); set("words", "SNARE film");
  document.body.textContent = JSON.stringify(seen);
};
</script>"""


def test_answers_are_searched_by_the_one_script_that_the_page_allows(tmp_path, runs):
    write_report(tmp_path / "out", runs)
    (tmp_path / "out" / "search.html").write_text(SEARCH)
    page = dump(tmp_path / "out" / "search.html", tmp_path / "p")
    hidden, everything, unsafe, again, none, words = json.loads(
        html.unescape(re.search(r"<body>(.*)</body>", page)[1])
    )
    assert not hidden
    assert 0 < unsafe < everything == again
    assert none == 0
    assert 0 < words < everything / 4


class Chromium:
    """A headless browser that is asked by the DevTools protocol over two pipes."""

    def __init__(self, page, profile):
        (reads, self._to), (answers, writes) = os.pipe(), os.pipe()
        options = f"--headless --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={profile}"
        # The browser reads from descriptor 3 and writes to 4.
        command = f"exec {CHROMIUM} {options} 3<&{reads} 4>&{writes}"
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(reads, writes), stdout=quiet, stderr=quiet
        )
        os.close(reads)
        os.close(writes)
        self._from, self._rest, self._asked, self._session = answers, b"", 0, {}
        target = self.ask("Target.createTarget", url=page.as_uri())["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        # A new tab is first the complete, empty page about:blank.
        until = time.monotonic() + 60
        while self.value("document.readyState + ' ' + location.href") != f"complete {page.as_uri()}":
            assert time.monotonic() < until, f"{page} isn't loaded after a minute"
            time.sleep(0.05)

    def ask(self, method, **params):
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": params, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                read = os.read(self._from, 65536)
                assert read, "the browser ended"
                self._rest += read
            answer, _, self._rest = self._rest.partition(b"\0")
            if (found := json.loads(answer)).get("id") == self._asked:
                return found["result"]

    def press(self, key, code, text=""):
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)

    def value(self, expression):
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)


FOCUSED = """(() => {
  const all = [...document.querySelectorAll("a, summary, input, select, [tabindex='0']")]
    .filter(one => one.checkVisibility());
  const here = document.activeElement, style = getComputedStyle(here);
  return [all.indexOf(here), all.length, style.outlineStyle !== "none" || style.boxShadow !== "none"];
})()"""


def test_the_keyboard_reaches_every_control_in_order_and_shows_where_it_is(tmp_path, runs):
    write_report(tmp_path / "out", runs)
    browser = Chromium(tmp_path / "out" / "report.html", tmp_path / "p")
    try:
        _, controls, _ = browser.value(FOCUSED)
        assert controls > 10
        walked = []
        for _ in range(controls):
            browser.press("Tab", 9)
            place, _, shown = browser.value(FOCUSED)
            assert shown
            walked.append(place)
        assert walked == list(range(controls))
        # A fold opens by the keyboard.
        browser.value("document.querySelector('summary').focus()")
        browser.press("Enter", 13, "\r")
        assert browser.value("document.activeElement.parentElement.open") is True
    finally:
        browser.close()
