"""Two headless browsers to be driven alike: Chromium by its driver, over HTTP; Firefox by Marionette, which
it has built in."""

import base64
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(what, seconds=40):
    end = time.time() + seconds
    while True:
        try:
            return what()
        except OSError:
            if time.time() > end:
                raise
            time.sleep(0.1)


class Browser:
    """script(code, *arguments) runs the body of an async function in the page and returns what it returns."""

    process = None

    def script(self, code, *arguments):
        # in the page's own scope, by eval: a driver's scripts do not see the page's let and const
        call = (
            f"window.answer = null; (async (...args) => {{ {code} }})(...{json.dumps(arguments)}).then("
            "(value) => { window.answer = JSON.stringify({value}); },"
            "(error) => { window.answer = JSON.stringify({error: String(error)}); });"
        )
        self.execute(f"(window.wrappedJSObject || window).eval({json.dumps(call)});")
        while not (answer := self.execute("return (window.wrappedJSObject || window).answer;")):
            time.sleep(0.02)
        result = json.loads(answer)
        if "error" in result:
            raise RuntimeError(result["error"])
        return result.get("value")

    def until(self, condition, seconds=120):
        """Waits until an expression of the page is true."""
        end = time.time() + seconds
        while not self.script(f"return !!({condition});"):
            if time.time() > end:
                raise TimeoutError(
                    f"never true: {condition}; status: {self.script('return $(`status`).textContent;')}"
                )
            time.sleep(0.1)

    def picture(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.screenshot()))

    def close(self):
        if self.process:
            self.process.terminate()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Chromium(Browser):
    name = "Chromium"

    @staticmethod
    def there():
        return shutil.which("chromium") and shutil.which("chromedriver")

    def __init__(self, width=1200, height=900):
        self.folder = tempfile.mkdtemp()
        self.port = free_port()
        self.process = subprocess.Popen(
            ["chromedriver", f"--port={self.port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--no-first-run",
            f"--user-data-dir={self.folder}",
            f"--window-size={width},{height}",
        ]
        chrome = {"binary": shutil.which("chromium"), "args": options}
        capabilities = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": chrome}}}
        self.session = ""
        self.session = "/session/" + wait_for(lambda: self.post("/session", capabilities))["sessionId"]
        self.post("/timeouts", {"script": 300000})

    def post(self, path, body):
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{self.session}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=400) as answer:
            return json.loads(answer.read())["value"]

    def dark(self, on):
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.post(
            "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": [feature]}}
        )

    def size(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.post("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics})

    def open(self, url):
        self.post("/url", {"url": url})

    def execute(self, script):
        return self.post("/execute/sync", {"script": script, "args": []})

    def screenshot(self):
        params = {"captureBeyondViewport": True, "format": "png"}
        width, height = self.script("return [window.innerWidth, document.documentElement.scrollHeight];")
        params["clip"] = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        return self.post("/goog/cdp/execute", {"cmd": "Page.captureScreenshot", "params": params})["data"]

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            self.post(
                "/goog/cdp/execute",
                {"cmd": "Input.dispatchKeyEvent", "params": {"type": kind, "key": key, "code": key}},
            )

    def close(self):
        try:
            request = urllib.request.Request(f"http://127.0.0.1:{self.port}{self.session}", method="DELETE")
            urllib.request.urlopen(request, timeout=20).close()
        except OSError:
            pass
        super().close()


class Firefox(Browser):
    name = "Firefox"

    @staticmethod
    def there():
        return shutil.which("firefox") or shutil.which("firefox-esr")

    def __init__(self, width=1200, height=900):
        self.folder, port = tempfile.mkdtemp(), free_port()
        with open(os.path.join(self.folder, "user.js"), "w") as file:
            preferences = {
                "marionette.port": port,
                "browser.shell.checkDefaultBrowser": False,
                "app.update.enabled": False,
                "datareporting.policy.dataSubmissionEnabled": False,
                "network.captive-portal-service.enabled": False,
                "network.connectivity-service.enabled": False,
            }
            for name, value in preferences.items():
                file.write(f'user_pref("{name}", {json.dumps(value)});\n')
        self.process = subprocess.Popen(
            [
                self.there(),
                "--headless",
                "--marionette",
                "--no-remote",
                "--profile",
                self.folder,
                f"--width={width}",
                f"--height={height}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=dict(os.environ, MOZ_HEADLESS="1", HOME=self.folder),
        )
        self.socket = wait_for(lambda: socket.create_connection(("127.0.0.1", port)), 90)
        self.socket.settimeout(400)
        self.buffer, self.sent = b"", 0
        self.receive()  # its greeting
        self.send("WebDriver:NewSession", {})
        self.send("WebDriver:SetTimeouts", {"script": 300000})

    def receive(self):
        while b":" not in self.buffer:
            self.buffer += self.more()
        length, self.buffer = self.buffer.split(b":", 1)
        while len(self.buffer) < int(length):
            self.buffer += self.more()
        message, self.buffer = self.buffer[: int(length)], self.buffer[int(length) :]
        return json.loads(message)

    def more(self):
        data = self.socket.recv(1 << 20)
        if not data:
            raise ConnectionError("Firefox has closed")
        return data

    def send(self, command, parameters):
        self.sent += 1
        data = json.dumps([0, self.sent, command, parameters]).encode()
        self.socket.sendall(str(len(data)).encode() + b":" + data)
        _, _, error, result = self.receive()
        if error:
            raise RuntimeError(error.get("message", str(error)))
        return result

    def size(self, width, height):
        self.send("WebDriver:SetWindowRect", {"width": width, "height": height})

    def open(self, url):
        self.send("WebDriver:Navigate", {"url": url})

    def execute(self, script):
        return self.send(
            "WebDriver:ExecuteScript", {"script": script, "args": [], "sandbox": None, "newSandbox": False}
        )["value"]

    def screenshot(self):
        return self.send("WebDriver:TakeScreenshot", {"full": True, "hash": False})["value"]

    def close(self):
        self.socket.close()
        super().close()
