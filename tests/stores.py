"""Object stores on loopback for tests and scripts/faults: moto's S3, a small GCS, and a proxy that fails on request.

gcp-storage-emulator (2026.7.19) does not do: it ignores ifGenerationMatch on uploads, answers reads without
x-goog-generation, and a range beyond the end with 206. `GCS` below has of the JSON API what TensorStore's driver asks
for, conditions and ranges as Google documents them.

    python tests/stores.py        both, with bucket `bucket`; prints the variables that name them, and waits
"""

import contextlib
import http.client
import http.server
import json
import logging
import os
import re
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator

BUCKET = "bucket"


class Server(http.server.ThreadingHTTPServer):
    """On a free port of 127.0.0.1, in a thread."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, handler: type):
        super().__init__(("127.0.0.1", 0), handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that went away is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm, wbufsize = True, -1  # else headers wait 40 ms for the answer's body to follow

    def log_message(self, *args):
        """Nothing."""

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class GCS(Server):
    """Google's JSON API, as far as TensorStore uses it. objects: {(bucket, name): (generation, bytes)}."""

    def __init__(self):
        self.objects: dict[tuple[str, str], tuple[int, bytes]] = {}
        self.generation, self.lock, self.buckets = 1000, threading.Lock(), {BUCKET}
        super().__init__(GCSHandler)


class GCSHandler(Handler):
    server: GCS

    def handle_any(self) -> None:
        body, url = self.body(), urllib.parse.urlsplit(self.path)
        query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
        match = re.fullmatch(r"(?:/upload)?/storage/v1/b/([^/]+)/o(?:/([^/]+))?", url.path)
        if not match or match[1] not in self.server.buckets:
            return self.answer(404, b'{"error": {"code": 404, "message": "The specified bucket does not exist."}}')
        name = query["name"] if self.command == "POST" else urllib.parse.unquote(match[2] or "")
        with self.server.lock:
            self.serve((match[1], name), query, body)

    def serve(self, key: tuple[str, str], query: dict[str, str], body: bytes) -> None:
        objects = self.server.objects
        generation, content = objects.get(key, (0, b""))
        wanted, unwanted = query.get("ifGenerationMatch"), query.get("ifGenerationNotMatch")
        if wanted is not None and int(wanted) != generation:
            return self.answer(412)
        if not key[1]:
            names = sorted(name for bucket, name in objects if bucket == key[0])
            low, high, prefix = (query.get(k, "") for k in ("startOffset", "endOffset", "prefix"))
            found = [x for x in names if x.startswith(prefix) and x >= low and (not high or x < high)]
            return self.answer(200, json.dumps({"items": [{"name": x} for x in found]}).encode())
        if self.command == "POST":
            self.server.generation += 1
            objects[key] = self.server.generation, body
            described = {"name": key[1], "bucket": key[0], "generation": str(self.server.generation)}
            return self.answer(200, json.dumps({**described, "size": str(len(body))}).encode())
        if not generation:
            return self.answer(404)
        if self.command == "DELETE":
            del objects[key]
            return self.answer(204)
        if unwanted is not None and int(unwanted) == generation:
            return self.answer(304)
        headers = {"x_goog_generation": str(generation)}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", "")):
            start, stop = int(span[1]), min(int(span[2] or len(content) - 1) + 1, len(content))
            if start >= len(content):
                return self.answer(416)
            headers["content_range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            return self.answer(206, content[start:stop], **headers)
        return self.answer(200, content, **headers)

    do_GET = do_POST = do_DELETE = handle_any


class Proxy(Server):
    """Hands requests on to `target`, and counts them; `fault`, told method, path and headers, may do otherwise.

    A fault is None, an HTTP status to answer with, "drop" to cut the connection, "late" to hand on and then cut it, or
    a number of seconds, a float, to wait before.
    """

    def __init__(self, target: str):
        self.target, self.count = urllib.parse.urlsplit(target).netloc, Counter()
        self.sent = self.received = 0  # bytes
        self.drop_conditions = False  # as a store that does not know them
        self.fault: Callable[[str, str], None | int | str | float] = lambda method, path: None
        super().__init__(ProxyHandler)


class ProxyHandler(Handler):
    server: Proxy

    def handle_any(self) -> None:
        body = self.body()
        self.server.count[self.command] += 1
        self.server.sent += len(body)
        fault = self.server.fault(self.command, self.path)
        if isinstance(fault, float):
            time.sleep(fault)
        if fault == "drop":
            self.close_connection = True
            return self.connection.close()
        if isinstance(fault, int):
            content = b'{"error": {"code": %d, "message": "made to fail"}}' % fault
            return self.answer(fault, content if "/storage/v1/" in self.path else b"<Error><Code>Fault</Code></Error>")
        there, path, headers = http.client.HTTPConnection(self.server.target), self.path, dict(self.headers.items())
        if self.server.drop_conditions:
            headers = {name: value for name, value in headers.items() if not name.lower().startswith("if-")}
            path = re.sub(r"&ifGenerationMatch=\d+", "", path)
        there.request(self.command, path, body, headers)
        found = there.getresponse()
        content = found.read()
        self.server.received += len(content)
        if fault == "late":
            there.close()
            self.close_connection = True
            return self.connection.close()
        self.send_response(found.status)
        for name, value in found.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        self.send_header("content-length", found.getheader("content-length") or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        there.close()

    do_GET = do_POST = do_DELETE = do_PUT = do_HEAD = handle_any


@contextlib.contextmanager
def stores() -> Iterator[tuple[Proxy, Proxy, dict[str, str]]]:
    """The proxies of S3 and GCS, and the environment by which both are found."""
    from moto.server import ThreadedMotoServer

    moto, gcs = ThreadedMotoServer("127.0.0.1", port=0, verbose=False), GCS()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto.start()
    host, port = moto.get_host_and_port()
    s3, gs = Proxy(f"http://{host}:{port}"), Proxy(gcs.url)
    made = http.client.HTTPConnection(host, port)
    made.request("PUT", f"/{BUCKET}")
    assert made.getresponse().status == 200
    variables = {
        **dict(AWS_ENDPOINT_URL=s3.url, AWS_ACCESS_KEY_ID="tests", AWS_SECRET_ACCESS_KEY="not-to-be-logged"),
        **dict(AWS_REGION="us-east-1", STORAGE_EMULATOR_HOST=gs.url, TENSORSTORE_GCS_HTTP_URL=gs.url),
    }
    from jaxgpt import store

    store._bucket.cache_clear()  # what the process opened is another's
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield s3, gs, variables
    finally:
        store._bucket.cache_clear()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        moto.stop()
        for server in (s3, gs, gcs):
            server.shutdown()
            server.server_close()


if __name__ == "__main__":
    with stores() as (_, _, variables):
        print(" ".join(f"{name}={value}" for name, value in variables.items()), flush=True)
        sys.stdin.read()
