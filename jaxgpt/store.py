"""Folders in object stores: gs://bucket/path and s3://bucket/path, by TensorStore's own drivers.

`folder` gives a Path for a local name, and for one in a store a StorePath, with as much of pathlib's interface as the
rooms need; TensorStore is imported when the first is used. Endpoints and credentials are the stores' own: AWS_*
variables (AWS_ENDPOINT_URL too) and ~/.aws for s3; GOOGLE_APPLICATION_CREDENTIALS, gcloud's file or the machine's
account for gs, STORAGE_EMULATOR_HOST for an emulator. TensorStore repeats failed requests by its own rules.

An object appears whole or not at all. A file that grows, `metrics.jsonl`, is a folder of objects there,
`metrics.jsonl/0001-000000`: generation and part. The parts of the highest generation are the file. A resumed run
begins a generation, so that a writer that was taken for dead and comes back changes nothing that counts.
"""

import contextlib
import dataclasses
import errno
import fnmatch
import functools
import hashlib
import logging
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

from jaxgpt import UserError, local_path

log = logging.getLogger(__name__)

RETRIES = 6  # of a request that fails, each after up to twice the time of the one before, 16 s at most: 30 s in all
RETRY_S = 1.0  # before the first
STALLED_S = 60  # a transfer that brings no byte for so long has failed
APPEND_S = 10.0  # a file that grows is sent so often
AGAIN_S = 1.0  # after an attempt that failed
PART_BYTES = 2**18  # its parts; what has been sent of the last one is sent again
CLOSE_S = 60.0  # how long its end may take
PIECE_BYTES = 2**25  # of a download at a time


def folder(name: "str | os.PathLike[str] | StorePath") -> "AnyPath":
    """The folder, or the file, that `name` is: local, or in a store. UserError on a name that cannot be one."""
    if isinstance(name, StorePath):
        return name
    scheme, there, rest = os.fspath(name).partition("://")
    if not there or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        if short := re.match(rf"({'|'.join(DRIVERS)}):", os.fspath(name)):
            hint = f"write {short[1]}://BUCKET/PATH, or ./{name} for a folder here"
            raise UserError(f"{name} is neither a folder in a store nor a plain one; {hint}")
        return local_path(name)
    bucket, _, key = rest.partition("/")
    if scheme not in DRIVERS:
        raise UserError(f"{name}: there is no store {scheme}://; write gs://BUCKET/PATH or s3://BUCKET/PATH, or a path")
    key = key.rstrip("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket) or not key:
        raise UserError(f"{name} names no folder of a bucket; write {scheme}://BUCKET/PATH")
    if not key.isprintable() or any(part in ("", ".", "..") for part in key.split("/")):
        raise UserError(f"{name!r}: a path in a store has no empty part, no . and no ..; write {scheme}://BUCKET/PATH")
    return StorePath(scheme, bucket, key)


def append(path: "AnyPath") -> "IO[str] | Appender":
    """A text file, local or in a store, opened to append to. Raises OSError."""
    return path.open("a", encoding="utf-8", errors="backslashreplace") if isinstance(path, Path) else Appender(path)


DRIVERS = {"gs": "gcs", "s3": "s3"}


@dataclasses.dataclass(frozen=True, order=True)
class StorePath:
    """An object, or a prefix of objects: a file or a folder.

    Where the store fails, methods raise OSError with `filename` and `strerror`: ENOENT where there is no such object,
    EACCES where credentials are refused, EPERM where the bucket is not there, ECONNABORTED where it may pass.
    """

    scheme: str
    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"

    def __truediv__(self, name: "str | PurePosixPath") -> "StorePath":
        return dataclasses.replace(self, key=f"{self.key}/{name}")

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "StorePath":
        return dataclasses.replace(self, key=self.key.rpartition("/")[0])

    @property
    def parents(self) -> "list[StorePath]":
        """None: there are no folders to make or to remove in a store."""
        return []

    def absolute(self) -> "StorePath":
        return self

    def with_name(self, name: str) -> "StorePath":
        return self.parent / name

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """A folder is there as soon as anything is in it."""

    rmdir = mkdir

    # --- objects ---

    @property
    def grows(self) -> bool:
        """Whether this is a folder of parts that are one file."""
        return self.key.endswith(".jsonl")

    def spec(self) -> dict[str, Any]:
        """The TensorStore kvstore of all that is under this folder."""
        return {**_bucket_spec(self.scheme, self.bucket), "path": f"{self.key}/"}

    def objects(self) -> list[str]:
        """The names of all objects under this folder, relative to it, in order."""
        with self._told():
            store = _bucket(self.scheme, self.bucket).copy()
            store.path = f"{self.key}/"
            found = sorted(key.decode(errors="replace") for key in store.list().result())
            if not found and self.scheme == "gs":  # TensorStore 0.1.86 takes a refusal to list for an empty list
                _bucket(self.scheme, self.bucket).read(self.key).result()
            return found

    def get(self) -> tuple[bytes, bytes]:
        """The object's bytes and its generation. Raises FileNotFoundError."""
        with self._told():
            found = _bucket(self.scheme, self.bucket).read(self.key).result()
        if found.state != "value":
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self))
        return found.value, found.stamp.generation

    def put(
        self, data: bytes, *, replacing: bytes | None = None, retries: int | None = None, timeout: float | None = None
    ) -> bytes | None:
        """Writes the object, if `replacing` is given only in place of that generation (ABSENT: of none).

        The new generation; None where there was another one. A write that was applied and whose answer was lost is
        seen by reading the object back: `data` is then what is there, so conditional writes need data of their own.
        """
        with self._told():
            store = _bucket(self.scheme, self.bucket, retries)
            condition = {} if replacing is None else {"if_equal": replacing}
            stamp = store.write(self.key, data, **condition).result(timeout)
            if replacing is None or stamp.generation:
                return stamp.generation
            found = store.read(self.key).result(timeout)
            return found.stamp.generation if found.state == "value" and found.value == data else None

    def read_bytes(self) -> bytes:
        for _ in range(3 if self.grows else 0):
            with contextlib.suppress(FileNotFoundError):  # its run began a generation at this moment: again
                if parts := self.parts()[1]:
                    return b"".join((self / part).get()[0] for part in parts)
        return self.get()[0]

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes start … stop-1, all of which are there, else OSError with ERANGE."""
        return self._range(start, stop)[0]

    def generation(self) -> bytes:
        """What tells this content of the object from another. Raises FileNotFoundError."""
        try:
            return self._range(0, 1)[1]
        except OSError as error:
            if error.errno != errno.ERANGE:
                raise
            return b"empty"

    def _range(self, start: int, stop: int) -> tuple[bytes, bytes]:
        with self._told():
            found = _bucket(self.scheme, self.bucket).read(self.key, byte_range=slice(start, stop, None)).result()
        if found.state != "value":
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self))
        return found.value, found.stamp.generation

    def write_bytes(self, data: bytes) -> None:
        """Writes the object; of a file that grows, its next generation."""
        self.put_parts(data) if self.grows else self.put(data)

    def put_parts(self, data: bytes) -> None:
        """A file that grows begins again with `data`, in a new generation; the old one goes with the next `open`."""
        generation, _ = self.parts()
        (self / part_name(generation + 1, 0)).put(data)

    def parts(self) -> tuple[int, list[str]]:
        """The highest generation, 0 for none, and its parts."""
        found = [key for key in self.objects() if re.fullmatch(r"\d{4,}-\d{6}", key)]
        generation = max((int(key.partition("-")[0]) for key in found), default=0)
        return generation, [key for key in found if int(key.partition("-")[0]) == generation]

    def unlink(self, missing_ok: bool = True) -> None:
        with self._told():
            _bucket(self.scheme, self.bucket).write(self.key, None).result()

    def remove_all(self, names: list[str]) -> None:
        """Removes objects under this folder."""
        with self._told():
            store = _bucket(self.scheme, self.bucket)
            for gone in [store.write(f"{self.key}/{name}", None) for name in names]:
                gone.result()

    # --- what pathlib calls files and folders ---

    def is_file(self) -> bool:
        if self.grows:
            return self.is_dir()
        try:
            return bool(self.generation())
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        return bool(self.objects())

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> "Iterator[StorePath]":
        yield from (self / name for name in dict.fromkeys(key.partition("/")[0] for key in self.objects()))

    def glob(self, pattern: str) -> "list[StorePath]":
        """Objects right in this folder."""
        return [self / key for key in self.objects() if "/" not in key and fnmatch.fnmatchcase(key, pattern)]

    @contextlib.contextmanager
    def writing(self) -> Iterator[IO[bytes]]:
        """A temporary local file that becomes the object at the end of the block, not after an exception."""
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            self.write_bytes(file.read())

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # TensorStore's are ValueErrors, for the most part, that begin with a status
            raise os_error(error, self) from None


AnyPath = Path | StorePath


def part_name(generation: int, part: int) -> str:
    return f"{generation:04}-{part:06}"


ABSENT = b"\x02"  # the generation of an object that is not there, as TensorStore writes it


# --- TensorStore ---


@functools.cache
def _bucket(scheme: str, bucket: str, retries: int | None = None) -> Any:
    import tensorstore as ts

    return ts.KvStore.open(_bucket_spec(scheme, bucket), context=context(retries)).result()


def context(retries: int | None = None) -> Any:
    """TensorStore's, with our bounds on how long it tries."""
    import tensorstore as ts

    how = {"max_retries": RETRIES if retries is None else retries, "initial_delay": f"{RETRY_S}s", "max_delay": "16s"}
    cache = {"total_bytes_limit": 2**26}  # of databases' indices
    return ts.Context({"s3_request_retries": how, "gcs_request_retries": how, "cache_pool": cache})


def _bucket_spec(scheme: str, bucket: str) -> dict[str, Any]:
    """The kvstore of a bucket, from the environment. Nothing secret is in it."""
    env = os.environ
    env.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(STALLED_S))
    env.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    spec: dict[str, Any] = {"driver": DRIVERS[scheme], "bucket": bucket}
    if scheme == "gs":
        if emulator := env.get("STORAGE_EMULATOR_HOST"):
            env.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator if "://" in emulator else f"http://{emulator}")
        return spec
    configured = _aws_config()
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or configured.get("region")
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or configured.get("endpoint_url")
    if endpoint:
        spec |= {"endpoint": endpoint.rstrip("/"), "aws_region": region or "us-east-1"}
    elif region:
        spec["aws_region"] = region
    if env.get("AWS_ACCESS_KEY_ID"):  # else TensorStore looks, and complains of each place that has none
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def _aws_config() -> dict[str, str]:
    """The profile's values in ~/.aws/config, which TensorStore reads for credentials alone."""
    import configparser

    path = local_path(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config")
    profile = os.environ.get("AWS_PROFILE", "default")
    parser = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
        parser.read(path)
    for section in ([profile] if profile == "default" else []) + [f"profile {profile}"]:
        if parser.has_section(section):
            return dict(parser[section])
    return {}


def os_error(error: BaseException, path: StorePath | None) -> OSError:
    """What TensorStore says, as the OSError that the rooms expect, without what the server sent: it may name a key."""
    if isinstance(error, OSError):
        return error
    text = str(error)
    parts = re.split(r" \[|\n", text)[0].strip().split(": ")  # a status, what was being done, what went wrong
    status = parts.pop(0) if re.fullmatch("[A-Z_]+", parts[0]) else ""
    while len(parts) > 1 and parts[0].startswith("Error "):
        parts.pop(0)
    http = re.search(r"http_response_code='(\d+)'", text)
    brief = ": ".join(parts).replace("Unknown", "the store refused") + (f" (HTTP {http[1]})" if http else "")
    number = errno.ECONNABORTED
    if (http and http[1] in ("401", "403")) or re.search("credentials|CREDENTIALS", brief):
        number, brief = errno.EACCES, f"{brief}; check the credentials"
    elif http and http[1] == "507":
        number = errno.ENOSPC
    elif status in ("NOT_FOUND", "INVALID_ARGUMENT", "FAILED_PRECONDITION"):  # of a bucket
        number = errno.EPERM
    elif status == "OUT_OF_RANGE" or (http and http[1] == "416"):
        number = errno.ERANGE
    elif not re.search("retry attempts failed|CURL error", brief) and status not in AWAY:
        number = errno.EIO
    return OSError(number, brief[:300], str(path or "s3://"))


AWAY = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")  # statuses that may pass

# --- files that grow ---


class Appender:
    """A text file in a store, as `append` opens it. A thread sends what is new every APPEND_S, so that no write waits.

    While the store cannot be had, lines stay in memory, and are sent when it can. `sync` waits until all are there.
    """

    def __init__(self, path: StorePath):
        self._path = path
        generation, parts = path.parts()
        self._generation = max(1, generation)
        self._part = 1 + max((int(part.partition("-")[2]) for part in parts), default=-1)
        self._stamp = ABSENT  # of the part that is being written
        self._text = bytearray()  # of that part
        self._sent = self._total_sent = self._total = 0  # bytes: of the part; of all
        self._wanted = threading.Condition()
        self._hurry = self._closing = self._old_gone = False
        self._error: OSError | None = None
        self._attempts = 0
        self._thread = threading.Thread(target=self._send, name=f"{path.name}", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        data = text.encode("utf-8", "backslashreplace")
        with self._wanted:
            self._text += data
            self._total += len(data)
            self._wanted.notify_all()
        return len(text)

    def flush(self) -> None:
        """The thread does it."""

    def sync(self, seconds: float = CLOSE_S) -> None:
        """Returns when all that was written is in the store. Raises OSError where that cannot be had."""
        deadline = time.monotonic() + seconds
        with self._wanted:
            goal, tried = self._total, self._attempts
            self._hurry = True
            self._wanted.notify_all()
            # an attempt under way may not hold it all: the one after it does
            while self._total_sent < goal and time.monotonic() < deadline:
                if self._error and self._attempts > tried + 1:
                    raise self._error
                self._wanted.wait(0.5)
            if self._total_sent < goal:
                raise self._error or OSError(errno.ETIMEDOUT, f"not written in {seconds:g} s", str(self._path))

    def close(self) -> None:
        try:
            self.sync()
        except OSError as error:
            lost = self._total - self._total_sent
            log.warning("%s: the last %d bytes are not in the store (%s)", self._path, lost, error.strerror)
        with self._wanted:
            self._closing = True
            self._wanted.notify_all()
        with _telling:
            _failing.pop(self._path.parent, None)  # a later run of this process tells of its own

    def __enter__(self) -> "Appender":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self) -> None:
        while True:
            with self._wanted:
                while self._total_sent == self._total and not self._closing:
                    self._wanted.wait()
                if self._closing:
                    return
                self._wanted.wait_for(lambda: self._hurry or self._closing, APPEND_S)
                data, fresh = bytes(self._text), len(self._text) - self._sent
            try:
                self._put(data)
                error = None
                succeeded(self._path)  # said before who waits for this attempt goes on
            except OSError as raised:
                error = raised
                if failed(self._path):
                    log.warning("%s: %s; what is new stays in memory until it can be", self._path, error.strerror)
            with self._wanted:
                if error is None:
                    self._sent += fresh
                    self._total_sent += fresh
                    self._hurry = self._hurry and self._total_sent < self._total
                    if self._sent >= PART_BYTES:
                        self._next_part()
                self._error = error
                self._attempts += 1
                self._wanted.notify_all()
            if error is None:
                continue
            with self._wanted:
                self._wanted.wait_for(lambda: self._closing, AGAIN_S)

    def _put(self, data: bytes) -> None:
        stamp = None
        while stamp is None:
            part = self._path / part_name(self._generation, self._part)
            stamp = part.put(data, replacing=self._stamp)
            if stamp is None and (earlier := self._earlier(part, data)):
                self._stamp = earlier
            elif stamp is None:  # somebody else's part: this one's new lines go into the next
                with self._wanted:
                    self._next_part()
                    data = bytes(self._text)
        self._stamp = stamp
        if not self._old_gone:
            found = self._path.objects()
            self._path.remove_all([key for key in found if key < part_name(self._generation, 0)])
            self._old_gone = True

    def _earlier(self, part: StorePath, data: bytes) -> bytes | None:
        """The generation of a part that holds the beginning of `data`: a write of ours, whose answer was lost."""
        with contextlib.suppress(FileNotFoundError):
            found, generation = part.get()
            return generation if data.startswith(found) else None

    def _next_part(self) -> None:
        """Begins a part with what has not been sent."""
        del self._text[: self._sent]
        self._part, self._stamp, self._sent = self._part + 1, ABSENT, 0


# --- outages: one is said once, by the first write that fails, whatever else fails then ---

_failing: dict[StorePath, dict[str, float]] = {}  # of each run's folder, what could not be written, and since when
_telling = threading.Lock()


def failed(path: StorePath) -> bool:
    """Notes that a file or folder of a run cannot be written; whether that is the first of the run, to be said."""
    with _telling:
        first = path.parent not in _failing
        _failing.setdefault(path.parent, {}).setdefault(path.name, time.monotonic())
        return first


def succeeded(path: StorePath) -> None:
    """Notes that it was written. Says so if nothing of the run is failing any more."""
    with _telling:
        failing = _failing.get(path.parent, {})
        since = min(failing.values(), default=0.0)
        if failing.pop(path.name, None) is None or failing:
            return
        del _failing[path.parent]
    log.warning("%s is written to again, after %d s", path.parent, time.monotonic() - since)


def away(error: BaseException) -> str:
    """Why a store cannot be had, if that is what this error of ours or of TensorStore's says; else ""."""
    found = os_error(error, None) if type(error) is ValueError else error
    if not isinstance(found, OSError) or "://" not in str(found.filename):
        return ""
    return str(found.strerror) if found.errno in (errno.EACCES, errno.ECONNABORTED) else ""


def read_ranges(ranges: Sequence[tuple[StorePath, int, int]]) -> list[bytes]:
    """Bytes start … stop-1 of each object, asked for all at once. Raises OSError."""
    asked = [
        (path, stop - start, _bucket(path.scheme, path.bucket).read(path.key, byte_range=slice(start, stop, None)))
        for path, start, stop in ranges
    ]
    found = []
    for path, size, future in asked:
        with path._told():
            value = future.result().value
        if len(value) != size:
            raise FileNotFoundError(errno.ENOENT, "there is no such object, or it is shorter", str(path))
        found.append(value)
    return found


def fetch(source: StorePath, to: Path, size: int | None, check: Callable[[str], None]) -> None:
    """Copies an object into a local file, which appears whole. size: in bytes, if known; check: is told the sha256."""
    partial = to.with_name(f"{to.name}.{secrets.token_hex(4)}.partial")
    digest, start, piece = hashlib.sha256(), 0, PIECE_BYTES
    try:
        with open(partial, "wb") as file:
            while piece and start != size:
                if not threading.main_thread().is_alive():
                    raise OSError(errno.ECANCELED, "the process ends", str(source))
                try:
                    data = source.read_range(start, start + piece if size is None else min(start + piece, size))
                except OSError as error:
                    if error.errno != errno.ERANGE:
                        raise
                    if size is not None:
                        raise UserError(f"{source} is not of {size:,} bytes: it is truncated or damaged") from None
                    piece //= 2  # a range that goes beyond the end is refused
                    continue
                file.write(data)
                digest.update(data)
                start += len(data)
            file.flush()
            os.fsync(file.fileno())
        check(digest.hexdigest())
        partial.replace(to)
    except OSError as error:
        if error.filename is None:  # of a write
            error.filename = str(to)
        raise
    finally:
        partial.unlink(missing_ok=True)
