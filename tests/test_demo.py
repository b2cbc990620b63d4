"""The demo page: what it answers, what it refuses, and that it works in a browser."""

import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from contextlib import closing, suppress

import numpy as np
import pytest
from commands import script
from PIL import Image
from test_export import checkpoint

from mindska import demo
from mindska.errors import PredictionError, RunError
from mindska.prediction import open_predictor

ANSWER = {"model": "a", "classes": [{"index": 0, "name": "<b>猫", "probability": 0.75}]}


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).resize((80, 60)).save(path)
    return path


class serving:
    """A server that runs in the background of a block."""

    def __init__(self, server):
        self.server = server

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self.server

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def seen():
    return []


@pytest.fixture
def server(seen):
    with serving(demo.DemoServer(lambda content: seen.append(content) or ANSWER)) as running:
        yield running


def ask(server, method="POST", path="/predict", body=None, **headers):
    """(status, content) of a request."""
    headers = {"Content-Type": demo.IMAGE, **{name.replace("_", "-"): value for name, value in headers.items()}}
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)) as connection:
        connection.request(method, path, body, {k: v for k, v in headers.items() if v is not None})
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if answer.getheader("Content-Type") == "application/json" else content


@pytest.mark.fault("html")
def test_the_page_and_the_answer(server, seen):
    status, page = ask(server, "GET", "/")
    assert status == 200 and page == demo.PAGE.read_bytes() and b"innerHTML" not in page
    assert ask(server, body=b"pixels") == (200, ANSWER) and seen == [b"pixels"]


@pytest.mark.fault("uploads")
def test_what_is_refused(server, seen):
    too_large = str(demo.MOST_BYTES + 1)
    for status, request in (
        (404, dict(method="GET", path="/../../etc/passwd")),
        (404, dict(method="GET", path="/demo.py")),
        (403, dict(method="GET", path="http://127.0.0.1/")),  # its own Host, without the port
        (404, dict(path="/", body=b"a")),
        (403, dict(body=b"a", Host="evil.example")),
        (403, dict(method="GET", path="/", Host="evil.example")),
        (415, dict(body=b"a", Content_Type="text/plain")),  # what other pages may send unasked
        (415, dict(body=b"a", Content_Type=None)),
        (413, dict(body=b"a", Content_Length=too_large)),
        (413, dict(body=b"a", Content_Length="9" * 5000)),
        (411, dict(body=b"a", Content_Length="-1")),
        (411, dict(body=b"a", Content_Length="²")),
        (411, dict(body=iter([b"a"]), Transfer_Encoding="chunked")),
        (400, dict(body=b"")),
        (501, dict(method="OPTIONS", path="/predict")),
        (501, dict(method="PUT", body=b"a")),
    ):
        assert ask(server, **request)[0] == status, request
    assert not seen and ask(server, body=b"a")[0] == 200


@pytest.mark.fault("uploads")
@pytest.mark.slow
def test_clients_that_stop_or_are_silent(server, seen, monkeypatch):
    monkeypatch.setattr(demo._Handler, "timeout", 1)
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\nContent-Type: {demo.IMAGE}\r\n"
    silent = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(20)]
    with socket.create_connection(("127.0.0.1", server.server_port)) as half:
        half.sendall(f"{head}Content-Length: 100\r\n\r\nshort".encode())
        half.settimeout(20)
        assert b"400" in half.recv(100)
    assert ask(server, body=b"a")[0] == 200 and seen == [b"a"]
    for connection in silent:
        connection.close()


@pytest.mark.fault("uploads")
def test_errors_of_the_network_are_shown():
    def fail(content):
        raise PredictionError("the network \x1b says no")

    with serving(demo.DemoServer(fail)) as server:
        assert ask(server, body=b"a") == (200, {"error": r"the network \x1b says no"})


def test_a_port_that_is_taken(server):
    with pytest.raises(RunError, match=rf"Port {server.server_port} cannot be used: .*choose another with --port"):
        demo.DemoServer(lambda content: {}, server.server_port)
    assert server.url.startswith("http://127.0.0.1:")
    with pytest.raises(SystemExit):
        script("demo").main(["--ckpt_path", "a.ckpt", "--port", "70000"])


@pytest.mark.slow
def test_classes_and_attention(tmp_path, photo):
    """Those of `predict.py`, and the mean of `attention_weights`; in half of the cases an exported model's."""
    predictor = open_predictor(checkpoint(tmp_path / "a.ckpt", "sk_resnet18"), batch_size=1, image_size=(64, 64))
    with serving(demo.open_demo(predictor, topk=3)) as server:
        status, found = ask(server, body=photo.read_bytes())
        assert status == 200 and found["model"] == "sk_resnet18"
        (expected,) = predictor([str(photo)], 3)
        assert [c["name"] for c in found["classes"]] == [name for _, name, _ in expected.classes]
        assert [c["probability"] for c in found["classes"]] == pytest.approx([p for *_, p in expected.classes])
        assert [unit["unit"] for unit in found["attention"]] == [f"stages.{i}.{j}" for i in range(4) for j in range(2)]
        for unit in found["attention"]:
            assert [path["kernel"] for path in unit["paths"]] == ["3x3", "5x5"]
            assert sum(path["share"] for path in unit["paths"]) == pytest.approx(1)
        status, found = ask(server, body=b"no image")
        assert status == 200 and found["error"].startswith("the image cannot be read: it is no image that we open")
    script("export").main(["--ckpt_path", str(tmp_path / "a.ckpt"), "--format", "onnx", "--input_size", "64"])
    predictor = open_predictor(tmp_path / "sk_resnet18.onnx", batch_size=1)
    with serving(demo.open_demo(predictor, topk=3)) as server:
        found = ask(server, body=photo.read_bytes())[1]
    assert [c["name"] for c in found["classes"]] == [name for _, name, _ in expected.classes]
    assert "attention" not in found


class Browser:
    """Headless Chromium, told what to do by its DevTools protocol over two pipes."""

    def __init__(self, program, folder):
        to_browser, self.send_end = os.pipe()
        self.receive_end, from_browser = os.pipe()
        command = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, program, *flags, "--remote-debugging-pipe", f"--user-data-dir={folder}"],
            pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser), os.close(from_browser)
        self.number, self.received, self.session = 0, b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.send_end, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.received:
                part = os.read(self.receive_end, 1 << 16)
                assert part, "the browser has ended"
                self.received += part
            one, _, self.received = self.received.partition(b"\0")
            answer = json.loads(one)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, code):
        result = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, code, seconds=90):
        deadline = time.monotonic() + seconds
        while not self.run(code):
            assert time.monotonic() < deadline, self.run("document.body.innerText")
            time.sleep(0.1)

    def close(self):
        with suppress(Exception):
            self.call("Browser.close")
        os.close(self.send_end), os.close(self.receive_end)
        self.process.wait(20)


DROP = """
(async () => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([Uint8Array.from(atob("%s"), (c) => c.charCodeAt(0))], "%s"));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
})()
"""


@pytest.mark.fault("html")
@pytest.mark.slow
def test_in_a_browser(tmp_path, photo):
    """An image that is dropped, one that is chosen, and a file that is none; what is shown is text and bars."""
    import base64

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no Chromium is installed")
    path = checkpoint(tmp_path / "a.ckpt", "sk_resnet18")
    predictor = open_predictor(path, batch_size=1, image_size=(64, 64))
    predictor.class_names[0] = "<img src=x onerror=document.title='hacked'>"
    text = "document.getElementById('results').innerText"
    with serving(demo.open_demo(predictor, topk=10)) as server:
        browser = Browser(program, tmp_path / "profile")
        try:
            browser.call("Page.navigate", url=server.url)
            browser.wait_for("document.readyState === 'complete' && !!document.getElementById('drop')")
            browser.run(DROP % (base64.b64encode(photo.read_bytes()).decode(), "a.png"))
            browser.wait_for(f"{text}.includes('stages.3.1')")
            shown = browser.run(text)
            assert "sk_resnet18" in shown and "<img src=x" in shown and "Attention of each unit, 3x3 : 5x5" in shown
            assert browser.run("document.title") == "mindska" and "kind 3" in shown
            assert browser.run("document.querySelectorAll('.bar i').length") == 10 + 2 * 8
            assert browser.run("document.getElementById('image').naturalWidth") == 80
            if folder := os.environ.get("MINDSKA_SCREENSHOTS"):
                picture = browser.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
                with open(os.path.join(folder, "demo.png"), "wb") as file:  # noqa: PTH118, PTH123
                    file.write(base64.b64decode(picture))
            browser.run(DROP % (base64.b64encode(b"no image").decode(), "a.txt"))
            browser.wait_for("document.getElementById('status').innerText.includes('the image cannot be read')")
            assert browser.run(text) == ""
            root = browser.call("DOM.getDocument")["root"]["nodeId"]
            node = browser.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
            browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(photo)])
            browser.wait_for(f"{text}.includes('stages.3.1')")
            assert browser.run(text) == shown
        finally:
            browser.close()
