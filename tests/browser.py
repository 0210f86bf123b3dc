"""A headless Chromium for tests, driven over a pipe by the Chrome DevTools Protocol: no package, no port."""

import fcntl
import json
import os
import shutil
import subprocess

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars")


class Browser:
    """One page. `events` are all that the protocol has reported so far."""

    def __init__(self, profile):
        (ours_in, theirs_out), (theirs_in, ours_out) = os.pipe(), os.pipe()
        # Chromium reads commands from its file 3 and writes to its file 4. Far copies first: neither may overwrite the
        # other.
        far = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
        self.process = subprocess.Popen(
            [CHROMIUM, *QUIET, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=lambda: (os.dup2(far[0], 3), os.dup2(far[1], 4)), close_fds=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for fd in (theirs_in, theirs_out, *far):
            os.close(fd)
        self.reading, self.writing = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        self.buffer, self.count, self.events, self.session = b"", 0, [], None
        pages = self("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in pages if target["type"] == "page")
        self.session = self("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self("Emulation.setFocusEmulationEnabled", enabled=True)  # headless, no window has the focus

    def message(self):
        while b"\0" not in self.buffer:
            part = self.reading.read1(1 << 20)
            assert part, "Chromium ended"
            self.buffer += part
        raw, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(raw)

    def __call__(self, method, **params):
        """The result of a command of the protocol."""
        self.count += 1
        command = {"id": self.count, "method": method, "params": params}
        self.writing.write(json.dumps(command | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        self.writing.flush()
        while (message := self.message()).get("id") != self.count:
            self.events.append(message)
        assert "error" not in message, (method, message["error"])
        return message["result"]

    def open(self, path):
        """Loads a file and waits until it is there."""
        self.events.clear()
        self("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def js(self, expression):
        result = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if kind == "keyDown" and len(key) == 1 else {}
            self("Input.dispatchKeyEvent", type=kind, key=key, **text)

    def close(self):
        self.process.terminate()
        self.process.wait(30)
        self.reading.close()
        self.writing.close()
