"""Where bytes of shards come from: files on this machine, or URLs, read by ranges through a bounded cache on disk.

https, and through fsspec the stores whose packages are installed (s3fs, gcsfs, adlfs; huggingface_hub for hf). Nothing else
is a URL here: `pipe:` and its like would run programs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from model.files import write_whole

SCHEMES = {
    **dict.fromkeys(("http", "https"), "'fsspec[http]'"),
    "s3": "s3fs",
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    "hf": "huggingface_hub",
}
"""The schemes that are read, each with the package that reads it."""
MAX_OPEN_FILES = 64
TRIES, FIRST_WAIT_SECONDS = 6, 0.5  # of a range that does not come: a server may be away for a quarter of a minute
MOMENTARY = (408, 429)  # answers of a web server that say "not now"
SHARES = 1024  # a process reports what it wrote each time that is this small a part of the cache's bound
FILLED = 0.75  # to which a full cache is emptied


class Span(NamedTuple):
    """Bytes of a shard."""

    path: str
    start: int
    end: int


@dataclass(frozen=True)
class CacheConfig:
    """Samples of remote shards that are kept on this machine; all processes share them."""

    folder: Path | None = None
    """None: querybridge/samples below the user's cache folder."""
    gigabytes: float = 50.0
    """The most it holds; what was read longest ago goes first."""

    def __post_init__(self) -> None:
        if self.gigabytes <= 0:
            raise ValueError(f"data.cache.gigabytes is {self.gigabytes}; give room for some samples, such as 50")


def is_url(path: str) -> bool:
    """Whether `path` names something elsewhere. ValueError for a scheme that is not read."""
    scheme = urlsplit(path).scheme
    if not scheme:
        return False
    if scheme not in SCHEMES or "://" not in path:
        raise ValueError(f"{path!r} is not read: give local paths, or URLs of {', '.join(SCHEMES)}")
    return True


def beside(path: str, ending: str) -> str:
    """The path or URL that ends so in addition; the query of a signed URL stays behind it."""
    if not is_url(path) or not urlsplit(path).query:
        return path + ending
    parts = urlsplit(path)
    return parts._replace(path=parts.path + ending).geturl()


def unsigned(path: str) -> str:
    """The same without the query of a signed URL, which is another each time."""
    return urlsplit(path)._replace(query="").geturl() if is_url(path) else path


def name_of(path: str) -> str:
    """The name of a file."""
    return os.path.basename(unsigned(path))


_stores: dict[tuple[int, str], Any] = {}
"""By process and scheme. A forked worker makes its own, and must not let go of its parent's: closing what both share would
leave the parent waiting for ever."""


def store_of(url: str) -> Any:
    """The fsspec file system of a URL, this process's own. ValueError where its package is missing."""
    import fsspec

    scheme = urlsplit(url).scheme
    key = os.getpid(), scheme
    if key not in _stores:
        options = {"client_kwargs": {"trust_env": True}} if scheme.startswith("http") else {}
        try:
            _stores[key] = fsspec.filesystem(scheme, **options)
        except ImportError as error:
            raise ValueError(f"{url} needs a package that is not installed; pip install {SCHEMES[scheme]}") from error
    return _stores[key]


class Files:
    """Local files, of which the most recent stay open."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()  # path -> descriptor, least recently used first

    def read(self, span: Span) -> bytes:
        """The bytes, fewer where the file ends."""
        return os.pread(self._descriptor(span.path), span.end - span.start, span.start)

    def fetch(self, spans: Sequence[Span]) -> None:
        """Nothing: they are here."""

    def _descriptor(self, path: str) -> int:
        if path not in self._open:
            if len(self._open) == MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY)
        self._open.move_to_end(path)
        return self._open[path]

    def __del__(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": OrderedDict()}  # descriptors do not survive pickling to a worker


class Urls:
    """Remote files. `fetch` brings many ranges at once; `read` finds them in the cache."""

    def __init__(self, cache: CacheConfig) -> None:
        self._folder = cache.folder or user_cache() / "samples"
        self._room = int(cache.gigabytes * 1e9)
        self._written = 0  # bytes that this process has not yet said

    def read(self, span: Span) -> bytes:
        """The bytes, fewer where the file ends. OSError where they do not come."""
        held = self._kept(span)
        return self._bring([span])[0] if held is None else held

    def fetch(self, spans: Sequence[Span]) -> None:
        """Bring what the cache lacks of these, at once."""
        missing = [span for span in dict.fromkeys(spans) if not self._place(span).is_file()]
        if missing:
            self._bring(missing)

    def _kept(self, span: Span) -> bytes | None:
        place = self._place(span)
        try:
            data = place.read_bytes()
            os.utime(place)  # read now: the last to go
        except FileNotFoundError:
            return None
        return data if len(data) == span.end - span.start else None  # cut short by a crash of the machine

    def _bring(self, spans: Sequence[Span]) -> list[bytes]:
        found, came = _download(spans), []
        for span, data in zip(spans, found, strict=True):
            if isinstance(data, OSError):
                raise data
            if len(data) > span.end - span.start:
                raise OSError(f"{span.path} comes whole where a part was asked for; its server must serve ranges of bytes")
            self._keep(self._place(span), data)
            came.append(data)
        return came

    def _keep(self, place: Path, data: bytes) -> None:
        write_whole(place, lambda draft: draft.write_bytes(data))
        self._written += len(data)
        if self._written > self._room / SHARES:
            self._report_written()

    def _report_written(self) -> None:
        """Add what this process has written to the cache's recorded total, and make room where that is over the bound."""
        with (self._folder / ".held").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # another process is at it; the next time
            except OSError:
                pass  # a file system without locks
            file.seek(0)
            said = file.read()
            total, self._written = int(said or self._room) + self._written, 0  # nothing said yet: look
            if total > self._room:
                total = self._make_room()
            file.truncate(0)
            file.write(str(total))

    def _make_room(self) -> int:
        """Let the samples go that were read longest ago, if the cache is full; the bytes that it holds then."""
        held = list(_held(self._folder))
        total = sum(state.st_size for state, _ in held)
        if total <= self._room:
            return total
        for state, path in sorted(held, key=lambda entry: entry[0].st_mtime_ns):
            path.unlink(missing_ok=True)
            total -= state.st_size
            if total <= self._room * FILLED:
                break
        return total

    def _place(self, span: Span) -> Path:
        name = hashlib.sha256(repr(tuple(span)).encode()).hexdigest()
        return self._folder / name[:2] / name[2:]


@contextmanager
def local_copy(path: str) -> Iterator[str]:
    """The local path of a whole file; one from elsewhere is fetched and lives as long as the context. OSError where it does
    not come."""
    if not is_url(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy, store = os.path.join(folder, "shard.tar"), store_of(path)
        for attempt in range(TRIES):
            wait(attempt)
            try:
                store.get_file(path, copy)
                break
            except Exception as error:
                problem = unreached(path, error)
                if attempt == TRIES - 1 or isinstance(problem, FileNotFoundError):
                    raise problem from error
        yield copy


def user_cache() -> Path:
    """Where this program may keep what it can make or fetch again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "querybridge"


def download(urls: Sequence[str]) -> list[bytes | OSError]:
    """Whole small files, at once, and an error for each that does not come: FileNotFoundError where there is none."""
    return _download([(url, None, None) for url in urls])


def wait(attempt: int) -> None:
    """Sleep before retry number `attempt`, twice as long each time; not before the first try, 0."""
    if attempt:
        time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))


def unreached(path: str, error: Exception) -> OSError:
    """What an error of a store means; their classes have nothing in common. FileNotFoundError: asking again is of no use."""
    cause = error.__cause__
    if isinstance(cause, TimeoutError) or (isinstance(cause, Exception) and type(cause).__module__.startswith("aiohttp")):
        error = cause  # whatever a web server answers to the question for a file's size, fsspec calls it not found
    status = getattr(error, "status", 0)
    why = f"{type(error).__name__}: {error}"
    if isinstance(error, FileNotFoundError | PermissionError) or (400 <= status < 500 and status not in MOMENTARY):
        return FileNotFoundError(f"{path} is not there, or not for us ({why}); see whether the address is right")
    return OSError(
        f"{path} does not come after {TRIES} tries ({why}); see whether the address and the network are right, then run "
        "again to go on from the last checkpoint"
    )


def _held(folder: Path) -> Iterator[tuple[os.stat_result, Path]]:
    """What a cache holds."""
    for part in (entry.path for entry in os.scandir(folder) if entry.is_dir()):
        for entry in os.scandir(part):
            with suppress(FileNotFoundError):  # another process has just renamed its draft
                yield entry.stat(), Path(entry.path)


def _download(spans: Sequence[tuple[str, int | None, int | None]]) -> list[bytes | OSError]:
    """Ranges of remote files, at once, with an error in place of what does not come; what fails for a moment is asked for
    again, a little later each time."""
    store, found = store_of(spans[0][0]), dict[tuple[str, int | None, int | None], bytes | OSError]()
    for attempt in range(TRIES):
        open_ones = [span for span in spans if not isinstance(found.get(span), bytes | FileNotFoundError)]
        if not open_ones:
            break
        wait(attempt)
        paths, starts, ends = (list(each) for each in zip(*open_ones, strict=True))
        contents = store.cat_ranges(paths, starts, ends, on_error="return")
        found |= {
            span: content if isinstance(content, bytes) else unreached(span[0], content)
            for span, content in zip(open_ones, contents, strict=True)
        }
    return [found[span] for span in spans]
