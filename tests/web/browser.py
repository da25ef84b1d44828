#!/usr/bin/python3
"""Looks at the page of `qrelay web` in a browser, while a real daemon relays mail.

    tests/web/browser.py QRELAY DIR    the binary under test, and where screenshots go

The daemon loads its configuration anew, loses a worker, stops and starts again, and the page has to
show it. Names of a listener and of a next hop are markup, which must stay text. The browser may ask
nobody but `qrelay web` for anything, and may have nothing to complain about. Prometheus's own tools
read the metrics.
"""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as text_metrics
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

# Longest wait for anything, in seconds.
PATIENCE = 30
# Names that would be markup, were they not put in as text.
LISTENER = "<img src=x onerror=alert(1)>"
NEXT_HOP = "<script>alert(2)<script>"
# Least contrast of text, by the guidelines for accessible pages (WCAG 2, level AA).
CONTRAST = 4.5

CONFIG = f"""
settings{{workers=2, worker_connections=16}}
local seen = shared:new('seen')
qmqp_listen('$DIR/{LISTENER}', function(m)
  seen:incr(m.sender)
  sleep(0.002)
  if m.sender == 'refuse@example.com' then return m:reject('no') end
  if m.sender == 'later@example.com' then return m:defer('later') end
  return m:connect(m.sender == 'other@example.com' and '$DIR/{NEXT_HOP}' or '$DIR/next')
end)
"""


def wait(what, condition):
    """Waits until the condition returns something, and returns it."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited in vain: {what}")


def netstring(data):
    return b"%d:%s," % (len(data), data)


def submit(path, sender):
    """Sends a mail, and returns the first byte of the answer."""
    with socket.socket(socket.AF_UNIX) as stream:
        stream.settimeout(PATIENCE)
        stream.connect(str(path))
        parts = [b"Subject: x\n\nx\n", sender.encode(), b"a@example.org"]
        stream.sendall(netstring(b"".join(map(netstring, parts))))
        answer = stream.recv(1024)
        return answer[answer.find(b":") + 1 :][:1].decode()


class Site:
    """A directory with a daemon, next hops, and `qrelay web`."""

    def __init__(self, qrelay, directory):
        self.qrelay = qrelay
        self.directory = directory
        self.control = str(directory / "control")
        self.processes = []
        self.sending = True
        self.answers = []
        self.senders = [threading.Thread(target=self.send, daemon=True) for _ in range(2)]

    def begin(self):
        directory = self.directory
        config = CONFIG.replace("$DIR", str(directory))
        (directory / "config.lua").write_text(config)
        for name in ["next", NEXT_HOP]:
            self.start("sink", "--listen", str(directory / name))
            wait("a next hop", (directory / name).exists)
        self.daemon = self.start_daemon()
        self.web = self.start(
            "web", "--control", self.control, "--listen", "127.0.0.1:0", stderr=subprocess.PIPE
        )
        self.url = re.search(rb"http://[^/]*/", self.web.stderr.readline())[0].decode()

    def start(self, *arguments, stderr=subprocess.DEVNULL):
        """Starts a process of qrelay."""
        process = subprocess.Popen(
            [self.qrelay, *arguments], stdout=subprocess.DEVNULL, stderr=stderr
        )
        self.processes.append(process)
        return process

    def start_daemon(self):
        config = str(self.directory / "config.lua")
        daemon = self.start("--config", config, "--control", self.control)
        wait("a daemon", lambda: os.path.exists(self.control))
        wait("a listener", (self.directory / LISTENER).exists)
        return daemon

    def send(self):
        """Sends mails until told otherwise. A daemon that is away is tried again."""
        count = 0
        while self.sending:
            count += 1
            sender = {0: "refuse", 5: "later", 7: "other"}.get(count % 12, "a")
            try:
                answer = submit(self.directory / LISTENER, f"{sender}@example.com")
                self.answers.append(answer)
            except OSError:
                pass
            # A steady load that leaves the machine time for the browser.
            time.sleep(0.01)

    def workers(self):
        return [one["pid"] for one in self.status()["workers"] if one["state"] == "ready"]

    def wait_for_incident(self, kind, number):
        """Waits for so many incidents of a kind, and returns what the last one is."""
        def texts():
            return [one["text"] for one in self.status()["incidents"] if one["kind"] == kind]
        return wait(kind, lambda: len(texts()) >= number and texts()[-1])

    def status(self):
        return json.loads(self.get("status.json"))

    def get(self, path, accept="*/*"):
        request = urllib.request.Request(self.url + path, headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.read().decode()

    def end(self):
        self.sending = False
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            process.wait(PATIENCE)


class Page:
    """The page in a browser."""

    def __init__(self, url):
        options = Options()
        options.binary_location = "/usr/bin/chromium"
        # The sandbox doesn't work for root. No other page than this one is shown.
        for option in ["headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"]:
            options.add_argument(f"--{option}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(service=Service("/usr/bin/chromedriver"), options=options)
        self.url = url
        self.driver.get(url)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0]).innerText", selector)

    def look(self, width, height, theme):
        """Sets the size of the window, and whether the reader likes it light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        wait("the size", lambda: self.run("return innerWidth") == width)

    def alarm(self):
        """Returns what the page says is wrong, which is nothing most of the time."""
        return self.run("const box = document.querySelector('#trouble');"
                        "return box.hidden ? '' : box.textContent")

    def screenshot(self, path, width, height):
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        options = {"captureBeyondViewport": True, "clip": clip}
        answer = self.driver.execute_cdp_cmd("Page.captureScreenshot", options)
        path.write_bytes(base64.b64decode(answer["data"]))

    def marks(self):
        """Returns what the marks of the first chart stand for."""
        script = "return [...document.querySelectorAll('#rate .flagged title')]"
        return "\n".join(self.run(script + ".map((title) => title.textContent)"))

    def complaints(self):
        """Returns what the browser has complained about since the last time."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def foreign_requests(self):
        """Returns what the browser has asked for elsewhere."""
        urls = set()
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] in ["Network.requestWillBeSent", "Network.webSocketCreated"]:
                parameters = message["params"]
                urls.add(parameters.get("request", parameters)["url"])
        assert urls, "no request was noted"
        return [url for url in urls if not url.startswith((self.url, "data:"))]


# Returns the texts whose contrast with what lies behind them is too low.
LOW_CONTRAST = """
const parse = (color) => color.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => {
  const part = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
};
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const color = parse(getComputedStyle(node).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color;
  }
  return [255, 255, 255];
};
const found = [];
for (const node of document.querySelectorAll('body *')) {
  const own = [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
  if (!own || node.closest('svg, script, style, noscript, [hidden]')) continue;
  const [one, other] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort();
  const [low, high] = one < other ? [one, other] : [other, one];
  const ratio = (high + 0.05) / (low + 0.05);
  if (ratio < arguments[0]) found.push(`${node.textContent.trim()}: ${ratio.toFixed(2)}`);
}
return found;
"""

# Tries to put markup into the page, as a fault of its script would. Returns what comes of it.
INJECT = """
try {
  document.querySelector('footer').innerHTML = '<b id="injected">x</b>';
} catch (error) {
  return error.name;
}
return 'nothing';
"""


def check_complaints(page, expected="no complaint"):
    """The browser complains of nothing else."""
    others = [line for line in page.complaints() if expected not in line]
    assert others == [], others


def check_names(page):
    """Names are text."""
    assert LISTENER in page.text("#listeners"), page.text("#listeners")
    wait("the next hop", lambda: NEXT_HOP in page.text("#hops"))
    assert page.run("return document.images.length") == 0
    assert page.run("return document.scripts.length") == 1
    check_complaints(page)
    assert page.run(INJECT) == "TypeError"
    check_complaints(page, "TrustedHTML")


def check_texts(page):
    """Every chart and every table says in words what it is."""
    labels = page.run("return [...document.querySelectorAll('svg')].map((one) => one.ariaLabel)")
    assert len(labels) == 3 and all("in the last" in label for label in labels), labels
    tables = page.run("return [...document.querySelectorAll('table')].map((t) => t.caption.innerText)")
    assert len(tables) >= 6 and all(tables), tables


def check_looks(page, directory):
    """The page can be read in each of its forms."""
    colors = set()
    for name, width, theme in [
        ("light", 1280, "light"),
        ("dark", 1280, "dark"),
        ("narrow", 390, "light"),
        ("narrow-dark", 320, "dark"),
    ]:
        page.look(width, 900, theme)
        wide = page.run("return document.documentElement.scrollWidth")
        assert wide <= width, f"{name}: {wide} of {width} columns"
        low = page.run(LOW_CONTRAST, CONTRAST)
        assert not low, f"{name}: low contrast: {low}"
        colors.add(page.run("return getComputedStyle(document.body).backgroundColor"))
        # The charts are drawn anew for the new width.
        wait("charts", lambda: page.run(
            "return [...document.querySelectorAll('svg')].every((one) => {"
            " const grid = one.querySelector('.grid');"
            " return grid && Math.abs(grid.getAttribute('x2') - one.clientWidth) < 2; })"
        ))
        height = page.run("return document.documentElement.scrollHeight")
        page.screenshot(directory / f"{name}.png", width, height)
    assert len(colors) == 2, colors
    page.look(1280, 900, "light")


def check_metrics(site):
    """Prometheus's own tools can read the metrics."""
    text = site.get("metrics")
    subprocess.run(["promtool", "check", "metrics"], input=text.encode(), check=True)
    families = {family.name: family for family in text_metrics(text)}
    listeners = {sample.labels["listener"] for sample in families["qrelay_mails"].samples}
    assert any(LISTENER in listener for listener in listeners), listeners
    form = "application/openmetrics-text; version=1.0.0"
    names = {family.name for family in open_metrics(site.get("metrics", form))}
    assert names == set(families), names ^ set(families)


def scenario(site, page, directory):
    rate = "return document.querySelector('#rate path:last-of-type')?.getAttribute('d') ?? ''"
    wait("a status", lambda: page.text("#state") == "serving")
    for sender in site.senders:
        sender.start()
    wait("mails", lambda: "K" in site.answers and "D" in site.answers and "Z" in site.answers)
    shown = wait("a chart", lambda: page.run(rate))
    wait("a chart that moves", lambda: page.run(rate) != shown)
    wait("a rate", lambda: re.match(r"[1-9]", page.run("return document.title")))
    wait("times", lambda: "ms" in page.text("#phases"))
    check_names(page)
    check_texts(page)

    site.daemon.send_signal(signal.SIGHUP)
    load = site.wait_for_incident("load", 2)
    wait("a mark of the load", lambda: load in page.marks())
    workers = wait("workers", lambda: len(site.workers()) == 2 and site.workers())
    os.kill(workers[0], signal.SIGKILL)
    crash = site.wait_for_incident("crash", 1)
    wait("a mark of the crash", lambda: crash in page.marks())
    wait("the crash in words", lambda: crash in page.text("#problems"))
    check_metrics(site)

    # Whoever loads the page sees what was before: more points than the page could have got since.
    page.driver.refresh()
    points = "return (document.querySelector('#rate path:last-of-type')?.getAttribute('d') ?? '')"
    wait("the past", lambda: page.run(points + ".split('L').length") > 5)
    wait("the marks", lambda: load in page.marks() and crash in page.marks())
    check_looks(page, directory)
    check_complaints(page)

    # A daemon that says nothing, and one that isn't there.
    site.daemon.send_signal(signal.SIGSTOP)
    wait("an alarm", lambda: "no answer from the daemon" in page.alarm())
    site.daemon.send_signal(signal.SIGCONT)
    wait("a status", lambda: page.text("#state") == "serving")
    site.daemon.terminate()
    assert site.daemon.wait(PATIENCE) == 0
    wait("an alarm", lambda: "can’t be reached" in page.alarm())
    assert site.control in page.alarm(), page.alarm()
    assert page.text("#state") == "not reachable"
    page.screenshot(directory / "down.png", 1280, 900)
    site.daemon = site.start_daemon()
    wait("the end of the alarm", lambda: not page.alarm())
    wait("a status", lambda: page.text("#state") == "serving")
    # The browser notes each answer that is none.
    check_complaints(page, "503 (Service Unavailable)")
    assert page.foreign_requests() == [], "the browser asked others"


def main():
    qrelay, directory = os.path.abspath(sys.argv[1]), Path(sys.argv[2])
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qrelay-web-") as place:
        site = Site(qrelay, Path(place))
        try:
            site.begin()
            page = Page(site.url)
            try:
                scenario(site, page, directory)
            finally:
                page.driver.quit()
        finally:
            site.end()
    print(f"{len(site.answers)} mails; screenshots in {directory}")


if __name__ == "__main__":
    main()
