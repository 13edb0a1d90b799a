"""The studio as a page of its own: who gets in, what a closed page leaves behind, and faults before anything is served. Real processes, real requests."""
import base64
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbook.cli import main
from llmbook.serving import Door, address, is_private

psutil = pytest.importorskip("psutil", reason="psutil is not installed: it comes with JupyterLab")
pytestmark = pytest.mark.timeout(180)
CELL = "import subprocess; worker = subprocess.Popen(['sleep', '300'], start_new_session=True)\nfrom ipywidgets import HTML; HTML('a worker %d.' % worker.pid)"


class Server:
    "The studio's server in a process of its own; with a page of one cell in the studio's place, or the studio's."

    def __init__(self, folder: Path, *, cell: str | None = CELL, host: str = "127.0.0.1", **env):
        code = f"import signal, llmbook.serving as s; signal.signal(signal.SIGINT, signal.default_int_handler); s.CELL = {cell!r} or s.CELL; s.serve({str(folder / 'runs')!r}, 0, {'BROWSER' in env}, {host!r})"
        self.folder, self.said, self.workers = folder, [], []
        with open(folder / "server.log", "w") as log:
            self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "TMPDIR": str(folder), **env})
        while not (self.said and "token=" in self.said[-1]):
            if not (line := self.process.stdout.readline()): pytest.fail((folder / "server.log").read_text()[-2000:])
            self.said.append(line)
        self.url = self.said[-1].split()[-1]
        self.port, self.token = urlsplit(self.url).port, parse_qs(urlsplit(self.url).query)["token"][0]

    def ask(self, path: str, method: str = "GET", at: str = "127.0.0.1", **headers):
        "The answer's status, headers and body."
        connection = http.client.HTTPConnection(at, self.port, timeout=60)
        try:
            connection.request(method, path, headers={"Host": f"127.0.0.1:{self.port}", **headers})
            reply = connection.getresponse()
            return reply.status, reply.headers, b"" if reply.status == 101 else reply.read()
        finally: connection.close()

    def page(self) -> tuple[str, str, int]:
        "Open the page: its cookie, its kernel's id, the worker that its cell started."
        status, headers, body = self.ask(f"/?token={self.token}")
        assert status == 200, body
        text = body.decode()
        self.workers.append(int(re.search(r"a worker (\d+)\.", text)[1]))
        return headers["Set-Cookie"], json.loads(re.search(r'"kernelId": ("[^"]+")', text)[1]), self.workers[-1]

    def kernels(self) -> list[int]: return [p.pid for p in psutil.process_iter() if "ipykernel" in (line := " ".join(command(p))) and str(self.folder) in line]

    def end(self, how: int = signal.SIGINT) -> int:
        self.process.send_signal(how)
        return self.process.wait(30)

    def clean(self):
        if self.process.poll() is None: self.end()
        for pid in self.workers: os.kill(pid, signal.SIGKILL)


def command(process) -> list[str]:
    try: return process.cmdline()
    except psutil.Error: return []


def upgrade(**headers) -> dict: return {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": base64.b64encode(b"0123456789abcdef").decode(), **headers}


@pytest.fixture(scope="module")
def server():
    "In a folder of a short name, since a socket's has at most 107 letters."
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as folder:
        s = Server(Path(folder))
        yield s
        s.clean()


@pytest.fixture(scope="module")
def visit(server): return server.page()


ADDRESSES = ["/", "/login", "/logout", "/voila/static/voila.js", "/voila/templates/lab/static/voila.js", "/voila/labextensions/anywidget/package.json", "/voila/api/themes/x", "/voila/files/studio.ipynb", "/voila/files/open.html",
             "/api/kernels/ID", "/api/kernels/ID/channels", "/voila/api/shutdown/ID", "/api/kernels", "/api/contents", "/tree", "/lab", "/nothing", "//", "/%2e%2e/%2e%2e/etc/passwd", "/voila/files/../studio.ipynb"]


@pytest.mark.parametrize("path", ADDRESSES)
def test_without_the_token_nothing_is_served(server, visit, path):
    "Whatever is asked, and however: a sentence, and no kernel more."
    path, before = path.replace("ID", visit[1]), server.kernels()
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        status, headers, body = server.ask(path, method)
        assert status == 403 and len(body) < 150 and "Set-Cookie" not in headers, (method, status, body)
    assert server.ask(path, **upgrade())[0] == 403
    assert server.kernels() == before


def test_what_looks_like_the_token_is_not(server, visit):
    t, cookie = server.token, visit[0].split(";")[0]
    name, _, signed = cookie.partition("=")
    forged = signed.rstrip('"').rpartition("|")[0]
    for query in ("token=", f"token={t[:-1]}", f"token={t}x", f"token={t.swapcase()}", f"token=%00{t}", f"Token={t}", f"tok={t}", f"x={t}", t): assert server.ask(f"/voila/static/voila.js?{query}")[0] == 403, query
    for headers in ({"Authorization": "token"}, {"Authorization": f"token {t[1:]}"}, {"Authorization": f"Basic {base64.b64encode(f'user:{t}'.encode()).decode()}"}, {"Cookie": f"{name}=1"}, {"Cookie": f"{name}={t}"}, {"Cookie": f'{name}={forged}|{"0" * 64}"'}, {"Cookie": f"token={t}"}, {"Cookie": f"other={signed}"}, {"Referer": server.url}):
        assert server.ask("/voila/static/voila.js", **headers)[0] == 403, headers


def test_with_the_token_or_its_cookie_everything_is_there(server, visit):
    cookie, kernel, _ = visit
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and server.token not in cookie
    for headers, query in (({"Cookie": cookie.split(";")[0]}, ""), ({"Authorization": f"token {server.token}"}, ""), ({}, f"?token={server.token}")):
        assert server.ask(f"/voila/static/voila.js{query}", **headers)[0] == 200
        assert json.loads(server.ask(f"/api/kernels/{kernel}{query}", **headers)[2])["id"] == kernel
        assert server.ask(f"/api/kernels/{kernel}/channels{query}", **upgrade(**headers))[0] == 101
    for path in ("/voila/files/studio.ipynb", "/voila/files/open.html", "/voila/files/index.html.j2", "/nothing"): assert server.ask(path, Cookie=cookie.split(";")[0])[0] in (302, 403, 404), "nothing that lies in the private folder is served as a file"


@pytest.mark.parametrize("headers", [{"Host": "news.example:{port}"}, {"Host": "127.0.0.1.news.example:{port}"}, {"Host": "10.0.0.1"}, {"Host": "localhost@news.example"}, {"Host": "[::1"}, {"Host": ""},
                                     {"Origin": "http://news.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}, {"Origin": "http://127.0.0.1:{port}.news.example"}, {"Host": "news.example", "Origin": "http://news.example"}], ids=str)
def test_other_names_and_other_pages_are_refused_even_with_the_token(server, visit, headers):
    headers = {k: v.format(port=server.port) for k, v in headers.items()}
    for known in ({"Cookie": visit[0].split(";")[0]}, {"Authorization": f"token {server.token}"}):
        for path in ("/", "/voila/static/voila.js", f"/api/kernels/{visit[1]}"): assert server.ask(path, **known, **headers)[0] in (400, 403), path
        assert server.ask(f"/api/kernels/{visit[1]}/channels", **upgrade(**known, **headers))[0] in (400, 403)
    assert server.ask("/voila/static/voila.js", Authorization=f"token {server.token}", Host=f"localhost:{server.port}", Origin=f"http://localhost:{server.port}")[0] == 200


def test_only_loopback_listens_and_kernels_talk_by_files(server, visit):
    "One port, of one address; the channels of kernels are files of a folder that only this user can enter. One port of theirs is left: an inlet for what forked children print, which gives nothing out."
    listen = lambda pid: [c.laddr.ip for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listen(server.process.pid) == ["127.0.0.1"]
    if sys.platform == "linux": assert [listen(pid) for pid in server.kernels()] == [["127.0.0.1"]]
    private, = server.folder.glob("llmbook-*")
    assert private.stat().st_mode & 0o777 == 0o700
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", server.port), 3): pass


def test_the_policy_of_the_page_names_no_other_server(server, visit):
    headers = server.ask(f"/api/kernels/{visit[1]}", Cookie=visit[0].split(";")[0])[1]
    assert "default-src 'self'" in headers["Content-Security-Policy"] and "http" not in headers["Content-Security-Policy"] and headers["Referrer-Policy"] == "no-referrer"


def gone(pids, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids): return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_the_end_takes_kernels_along_and_leaves_runs(tmp_path, how):
    "Ctrl-C and its relatives; even a killed server's kernels find out. What a page has started in a session of its own goes on."
    s = Server(tmp_path)
    _, _, worker = s.page()
    kernels = s.kernels()
    assert len(kernels) == 1
    try:
        code = s.end(how)
        assert gone(kernels) and psutil.pid_exists(worker)
        if how != signal.SIGKILL: assert code == 0 and list(tmp_path.glob("llmbook-*")) == [] and "closed" in s.process.stdout.readline() + s.process.stdout.readline(), (tmp_path / "server.log").read_text()
    finally: s.clean()


def test_a_page_says_goodbye_to_its_kernel(server):
    "What a closing page sends; with the cookie it needs nothing else, without it nothing happens."
    cookie, kernel, _ = server.page()
    before = server.kernels()
    assert server.ask(f"/voila/api/shutdown/{kernel}", "POST")[0] == 403 and server.kernels() == before
    assert server.ask(f"/voila/api/shutdown/{kernel}", "POST", Cookie=cookie.split(";")[0], Origin="http://127.0.0.1:1")[0] == 403 and server.kernels() == before
    assert server.ask(f"/voila/api/shutdown/{kernel}", "POST", Cookie=cookie.split(";")[0], Origin=f"http://127.0.0.1:{server.port}")[0] == 204
    assert len(server.kernels()) == len(before) - 1


def test_other_machines_only_if_asked_and_with_a_warning(tmp_path):
    s = Server(tmp_path, host="0.0.0.0")
    assert "Careful" in s.said[0] and len(s.said) == 2
    known = {"Authorization": f"token {s.token}"}
    assert s.ask("/voila/static/voila.js", at="127.0.0.2", Host="studio.example")[0] == 403
    assert s.ask("/voila/static/voila.js", at="127.0.0.2", Host="studio.example", **known)[0] == 200
    assert s.ask("/voila/static/voila.js", at="127.0.0.2", Host="studio.example", Origin="http://news.example", **known)[0] == 403
    assert s.end() == 0


def test_the_browser_gets_a_file_and_not_the_token(tmp_path):
    "Other users see which commands run, with their arguments."
    (tmp_path / "browser.sh").write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/argument; cp "${{1#file://}}" {tmp_path}/copy\n')
    (tmp_path / "browser.sh").chmod(0o755)
    s = Server(tmp_path, BROWSER=f"{tmp_path}/browser.sh %s")
    for _ in range(100):
        if (tmp_path / "copy").exists() and s.url in (tmp_path / "copy").read_text(): break
        time.sleep(0.1)
    assert s.end() == 0
    assert s.url in (tmp_path / "copy").read_text() and s.token not in (tmp_path / "argument").read_text() and (tmp_path / "argument").read_text().startswith("file://")


def test_faults_are_one_sentence(capsys, tmp_path, monkeypatch):
    "Before anything is served."
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        for args, word in ((["--port", taken], "--port"), (["--port", "70000"], "65535"), (["--host", "192.0.2.7"], "192.0.2.7"), (["--host", "no such host"], "no such host"), (["--root", str(tmp_path / "file")], "--root")):
            assert main(["studio", "--no-browser", "--root", str(tmp_path / "runs"), *args]) == 2, args
            said = capsys.readouterr()
            assert said.out == "" and said.err.startswith("llmbook: ") and word in said.err and said.err.count("\n") == 1, said.err
    monkeypatch.setitem(sys.modules, "voila.app", None)
    assert main(["studio", "--no-browser", "--root", str(tmp_path / "runs")]) == 2
    assert "pip install 'llmbook[studio]'" in capsys.readouterr().err


def test_the_module_needs_no_server_to_be_imported():
    code = "import sys, llmbook.serving; print([m for m in ('voila', 'tornado', 'jupyter_server', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"


@given(st.text(), st.text(), st.text())
def test_a_door_never_lets_a_stranger_in(host, origin, shown):
    door = Door("secret", frozenset({"127.0.0.1"}))
    assert door.knows(shown) == (shown == "secret")
    assert door.refusal(host, origin, False) and door.refusal("127.0.0.1:80", "http://127.0.0.1:80", False)
    if not door.refusal(host, origin, True): assert urlsplit(f"//{host}").hostname == "127.0.0.1" and (not origin or urlsplit(origin).netloc.lower() == host.lower())
    assert door.refusal("127.0.0.1:80", "http://127.0.0.1:80", True) == door.refusal("127.0.0.1:80", "", True) == ""


def test_addresses():
    assert [is_private(h) for h in ("127.0.0.1", "127.8.8.8", "::1", "localhost", "0.0.0.0", "::", "10.0.0.1", "studio.example")] == [True] * 4 + [False] * 4
    assert address("127.0.0.1", 80, "t") == "http://127.0.0.1:80/?token=t" and address("::1", 80, "t") == "http://[::1]:80/?token=t" and socket.gethostname() in address("0.0.0.0", 80, "t")
