"""A stand-in for Cloud Storage: buckets in memory, behind what clients ask of its JSON API.

What decides whether a client works is kept: generations and the conditions on them, byte ranges,
uploads in one piece and in several, listings in short pages. There are no directories and no
appending, as in the service.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 4  # entries of a listing; the service gives 1,000, and clients must ask for the rest
FORBIDDEN = "forbidden-bucket"  # exists, and refuses everything


class Object(NamedTuple):
    """One version of an object."""

    content: bytes
    generation: int


class Storage:
    """Buckets, and the uploads that are under way."""

    def __init__(self, *buckets: str):
        self.buckets: dict[str, dict[str, Object]] = {name: {} for name in buckets}
        self.uploads: dict[str, tuple[str, str, dict[str, str], bytearray]] = {}
        self.writers: dict[str, str] = {}  # the client that wrote each object
        self.reads: list[tuple[str, str]] = []  # names of objects, and the ranges asked for
        self.numbers = itertools.count(1)
        self.fails: Callable[[], bool] = lambda: False  # asked at each request: answer 503?
        self.send: Callable[[int], None] = lambda size: None  # called with the bytes of each body
        self.lock = threading.RLock()


class Refusal(Exception):
    """An answer that is no success: its status."""


def described(bucket: str, name: str, found: Object) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "size": str(len(found.content)),
        "generation": str(found.generation),
        "metageneration": "1",
        "storageClass": "STANDARD",
        "timeCreated": "2025-01-01T00:00:00.000Z",
        # Another time for each version: clients tell by it whether an object has changed.
        "updated": datetime.fromtimestamp(found.generation, UTC).strftime("%FT%T.000Z"),
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it holds back an answer for 40 ms
    storage: Storage

    def log_message(self, *_):
        pass

    def handle_any(self):
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query, True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.storage.send(len(body))
        match = re.fullmatch(r"/(upload/|download/)?storage/v1/b/([^/]+)(/o(?:/(.+))?)?", url.path)
        try:
            if match is None:
                raise Refusal(501)
            if self.storage.fails():
                raise Refusal(503)
            kind, bucket, objects, name = match.groups()
            if bucket == FORBIDDEN:
                raise Refusal(403)
            if bucket not in self.storage.buckets:
                raise Refusal(404)
            with self.storage.lock:
                if name and "/rewriteTo/b/" in name:
                    self.copy(bucket, name)
                elif kind == "upload/":
                    self.upload(bucket, query, body)
                elif name:
                    self.object(bucket, unquote(name), query, kind == "download/")
                elif objects:
                    self.answer(200, self.listing(bucket, query))
                else:
                    self.answer(200, {"kind": "storage#bucket", "name": bucket})
        except Refusal as refusal:
            status = refusal.args[0]
            self.answer(status, {"error": {"code": status, "message": f"status {status}"}})

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def answer(self, status: int, content: Any, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        empty = status in (204, 304)
        self.storage.send(0 if empty else len(body))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if not empty:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not empty:
            self.wfile.write(body)

    def find(self, bucket: str, name: str, query: dict[str, str]) -> Object | None:
        """The object, where the conditions of the request hold."""
        found = self.storage.buckets[bucket].get(name)
        generation = str(found.generation) if found else "0"
        if query.get("ifGenerationMatch", generation) != generation:
            raise Refusal(412)
        if query.get("ifGenerationNotMatch") == generation:
            raise Refusal(304)
        return found

    def object(self, bucket: str, name: str, query: dict[str, str], download: bool) -> None:
        found = self.find(bucket, name, query)
        if found is None:
            raise Refusal(404)
        if self.command == "DELETE":
            del self.storage.buckets[bucket][name]
            self.answer(204, b"")
        elif not download and query.get("alt") != "media":
            self.answer(200, described(bucket, name, found))
        else:
            content, status, headers = found.content, 200, {}
            self.storage.reads.append((name, self.headers.get("Range", "")))
            asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if asked:
                size, (first, last) = len(content), asked.groups()
                begin = int(first) if first else max(0, size - int(last))
                end = min(size, int(last) + 1) if first and last else size
                if begin >= size:
                    raise Refusal(416)
                content, status = content[begin:end], 206
                headers["Content_Range"] = f"bytes {begin}-{end - 1}/{size}"
            self.answer(status, content, x_goog_generation=str(found.generation), **headers)

    def copy(self, bucket: str, names: str) -> None:
        source, _, target = names.partition("/rewriteTo/b/")
        to_bucket, _, name = target.partition("/o/")
        found = self.storage.buckets[bucket].get(unquote(source))
        if found is None:
            raise Refusal(404)
        written = Object(found.content, next(self.storage.numbers))
        self.storage.buckets[to_bucket][unquote(name)] = written
        resource = described(to_bucket, unquote(name), written)
        self.answer(200, {"kind": "storage#rewriteResponse", "done": True, "resource": resource})

    def listing(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        objects, prefix = self.storage.buckets[bucket], query.get("prefix", "")
        delimiter, entries = query.get("delimiter"), {}
        for name in sorted(objects):
            begin, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
            if not name.startswith(prefix) or not begin <= name < end:
                continue
            rest = name[len(prefix) :]
            folder = delimiter and delimiter in rest
            entries[prefix + rest.partition(delimiter)[0] + delimiter if folder else name] = folder
        left = [name for name in sorted(entries) if name > query.get("pageToken", "")]
        page = left[: min(PAGE, int(query.get("maxResults", PAGE)))]
        return {
            "kind": "storage#objects",
            "items": [described(bucket, n, objects[n]) for n in page if not entries[n]],
            "prefixes": [name for name in page if entries[name]],
        } | ({"nextPageToken": page[-1]} if len(page) < len(left) else {})

    def upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        if "upload_id" in query:  # another piece of an upload that was begun before
            bucket, name, conditions, content = self.storage.uploads[query["upload_id"]]
            content += body
            if self.headers["Content-Range"].endswith("/*"):
                self.answer(308, b"", Range=f"bytes=0-{len(content) - 1}")
            else:
                self.write(bucket, name, conditions, bytes(content))
        elif query["uploadType"] == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            identity = str(next(self.storage.numbers))
            self.storage.uploads[identity] = (bucket, name, query, bytearray())
            host = self.headers["Host"]
            place = f"http://{host}/upload/storage/v1/b/{bucket}/o?upload_id={identity}"
            self.answer(200, {}, Location=place)
        elif query["uploadType"] == "multipart":
            mark = self.headers["Content-Type"].partition("boundary=")[2].strip("\"'").encode()
            _, described_by, content, _ = body.split(b"--" + mark)
            content = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
            content = content.removesuffix(b"\n").removesuffix(b"\r")
            name = json.loads(re.split(rb"\r?\n\r?\n", described_by, maxsplit=1)[1])["name"]
            self.write(bucket, name, query, content)
        else:
            self.write(bucket, query["name"], query, body)

    def write(self, bucket: str, name: str, query: dict[str, str], content: bytes) -> None:
        self.find(bucket, name, query)
        written = Object(content, next(self.storage.numbers))
        self.storage.buckets[bucket][name] = written
        self.storage.writers[f"{bucket}/{name}"] = self.headers.get("User-Agent", "")
        self.answer(200, described(bucket, name, written))


class Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """Clients hang up on answers that they know enough of, and when they are killed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serving(storage: Storage) -> Iterator[dict[str, str]]:
    """Serves ``storage`` and gives the environment that leads gcsfs and TensorStore there."""
    handler = type("OwnHandler", (Handler,), {"storage": storage})
    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "FSSPEC_GCS_TOKEN": "anon",
            # gcsfs would ask another service, over another protocol, what kind of bucket it is.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
