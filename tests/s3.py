"""An S3 server over real HTTP, behind a proxy that misbehaves when it is told to."""

import http.client
import http.server
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from armillary import storage

SET_ANEW = ("connection", "transfer-encoding", "date", "server")  # headers, by the proxy


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to the S3 server. `faults` are used up one by one by requests of objects with `methods`.

    From the request number `die_at` of those that change something, none is answered any more, nor passed on, or that
    one still is: as when the process that asks is killed.
    """

    def __init__(self, server: tuple[str, int]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.faults, self.got, self.lock = server, [], Counter(), threading.Lock()
        self.methods = ("GET",)
        self.changes, self._end, self._passed, self.dead = 0, 0, False, False

    def die_at(self, end: int, passed: bool) -> None:
        """0: live again."""
        self.changes, self._end, self._passed, self.dead = 0, end, passed, False

    def dies(self, method: str) -> tuple[bool, bool]:
        """Whether a request is passed on, and whether it is answered."""
        with self.lock:
            if self.dead or method in ("GET", "HEAD"):
                return not self.dead, not self.dead
            self.changes += 1
            self.dead = self.changes == self._end
            return not self.dead or self._passed, not self.dead


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _pass_on(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        body, fault = self._body(), None
        if self.command in self.server.methods and path.count("/") > 1:
            with self.server.lock:
                self.server.got[path.rpartition("/")[2]] += 1
                fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "500":
            return self._answer(500, {"Content-Length": "0"}, b"")
        if fault == "gone":  # no answer at all
            self.close_connection = True
            return None
        passed, answered = self.server.dies(self.command)
        if not passed:
            self.close_connection = True
            return None
        upstream = http.client.HTTPConnection(*self.server.upstream)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        content = answer.read()
        if not answered:
            self.close_connection = True
            return None
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in SET_ANEW}
        if self.command != "HEAD":
            headers["Content-Length"] = str(len(content))
        if fault == "slow":
            time.sleep(1)
        if fault == "other":
            content = bytes([content[0] ^ 1]) + content[1:]
        return self._answer(answer.status, headers, content[: len(content) // 2] if fault == "cut" else content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        del self.headers["Transfer-Encoding"]
        self.headers["Content-Length"] = str(len(body))
        return body

    def _answer(self, status, headers, content):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        if len(content) != int(headers.get("Content-Length", 0)) and self.command != "HEAD":
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def log_message(self, *_):
        """Nothing."""


@contextmanager
def s3_server() -> Iterator[Proxy]:
    """Within, S3 is a server of this process with an empty bucket, "bucket"; the proxy before it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port())
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hush", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",  # or no changed byte would come as far as our checksum
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
    }.items():  # fmt: skip
        patch.setenv(name, value)
    patch.setattr(storage, "FIRST_WAIT", 0.01)
    S3FileSystem.clear_instance_cache()  # of an earlier server, at another port
    boto3.resource("s3").create_bucket(Bucket="bucket")
    try:
        yield proxy
    finally:
        proxy.shutdown()
        server.stop()
        patch.undo()
