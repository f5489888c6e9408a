"""Pictures and captions of your own -> shards that data.shards and every webdataset reader can read.

python -m data.write folder photos/ --out shards/photos            # photo.jpg beside photo.txt
python -m data.write jsonl list.jsonl --out shards/list            # {"image": "a.png", "caption": "..."} a line
python -m data.write jsonl llava.json --images images --out shards/chat     # a list with "image" and "conversations"
python -m data.write emoji --font NotoColorEmoji.ttf --out shards/emoji
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from data.emoji import open_emoji_font
from data.pack import Item, Written, write_shards
from data.records import BadSample, label_of, messages_of
from data.shard_index import IMAGES

DESCRIPTION = "Pack pictures and captions of your own into shards that data.shards and every webdataset reader can read."
CAPTIONS = ("caption", "text", "instruction")  # the fields of a JSONL line that may hold the text; the first that is there
TEXTLESS = ("messages", "conversations", "label")  # fields that make a sample without a caption


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Pack a folder's jpg, png and webp files (and its subfolders'), each with its caption in a .txt file beside it."""

    folder: tyro.conf.Positional[Path]
    out: Path
    """Folder to create."""
    shard_size: int = 10_000
    """Samples in a shard."""

    def write(self) -> Written:
        """Pack the files in the order of their paths."""
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a folder; name one that holds images")
        files = [path.relative_to(self.folder) for path in sorted(self.folder.rglob("*")) if path.is_file()]
        jobs = [path for path in files if path.suffix.lower() != ".txt" and not path.name.startswith(".")]
        return write_shards(jobs, self._read, self.out, self.shard_size, _readable)

    def _read(self, path: Path) -> Item:
        if path.suffix.lower().removeprefix(".") not in IMAGES:
            raise BadSample("a file is neither jpg, png nor webp")
        caption_file = (self.folder / path).with_suffix(".txt")
        if not caption_file.is_file():
            raise BadSample("an image has no .txt file beside it")
        caption = _decode(caption_file.read_bytes()).strip()
        if not caption:
            raise BadSample("a caption is empty")
        return Item(caption, _bytes(self.folder, str(path)), described={"path": _readable(path)})


@dataclass(frozen=True, kw_only=True)
class Jsonl:
    """Pack a JSONL file: one object a line with "image" (a path) and "caption"; or a JSON file that is a list of them, as
    LLaVA's and ShareGPT's are.

    "text" or "instruction" may stand for "caption". "sources" (paths) are the images an edit starts from, and there an
    "instruction" comes first; "messages" with "images" (paths) is a conversation; "label" is a class number. All other
    fields go into the sample's json as they are; one that is null counts as absent."""

    file: tyro.conf.Positional[Path]
    out: Path
    """Folder to create."""
    images: Path | None = None
    """Folder that image paths start from; the JSONL's own folder unless given."""
    shard_size: int = 10_000
    """Samples in a shard."""

    def write(self) -> Written:
        """Pack the lines, or the objects of the list, in their order."""
        content = self.file.read_bytes()
        listed = content.lstrip()[:1] == b"["
        lines = self._listed(content) if listed else [line for line in enumerate(content.splitlines(), 1) if line[1].strip()]
        where = "entry" if listed else "line"
        return write_shards(lines, self._read, self.out, self.shard_size, lambda line: f"{where} {line[0]}")

    def _listed(self, content: bytes) -> list[tuple[int, Any]]:
        try:
            return list(enumerate(json.loads(content), 1))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.file} is no JSON list ({error}); give one, or one object a line") from error

    def _read(self, job: tuple[int, Any]) -> Item:
        number, held = job
        fields = self._parse(number, held) if isinstance(held, bytes) else held
        if not isinstance(fields, dict):
            where = "line" if isinstance(held, bytes) else "entry"
            raise ValueError(f"{self.file} {where} {number} is not a JSON object; give nothing else")
        fields = {name: value for name, value in fields.items() if value is not None}  # null: an absent column
        root = self.images or self.file.parent
        names = CAPTIONS[::-1] if fields.get("sources") else CAPTIONS
        told = next((name for name in names if fields.get(name)), "caption")
        caption = fields.get(told) or ""
        if not isinstance(caption, str):
            raise BadSample("a caption is not text")
        if not caption.strip() and not any(name in fields for name in TEXTLESS):
            raise BadSample('a line has neither "caption" nor "messages" nor "label"')
        if any(name in fields for name in TEXTLESS[:2]):
            messages_of(fields)
        elif not caption.strip():
            label_of(fields)
        sources = fields.get("sources", fields.get("images", []))
        if not isinstance(sources, list):
            raise BadSample("sources or images is not a list of paths")
        image = _bytes(root, fields["image"]) if "image" in fields else None
        if image is None and not sources and not any(name in fields for name in TEXTLESS[:2]):
            raise BadSample('a line has no "image"')
        rest = {name: value for name, value in fields.items() if name not in (told, "image", "sources", "images")}
        return Item(caption, image, tuple(_bytes(root, path) for path in sources), rest)

    def _parse(self, number: int, line: bytes) -> Any:
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.file} line {number} is not JSON ({error}); give one object a line") from error


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """Pack the emoji of a colour font with their Unicode names as captions (Debian: fonts-noto-color-emoji)."""

    out: Path
    """Folder to create."""
    font: Path = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    """Font file with colour bitmaps."""
    size: int = 128
    """Pixels a side."""
    shard_size: int = 10_000
    """Samples in a shard."""

    def write(self) -> Written:
        """Pack the emoji of one code point each, in the order of their code points."""
        font = open_emoji_font(self.font, self.size)
        return write_shards(font.code_points, font.item, self.out, self.shard_size)


def _bytes(root: Path, path: Any) -> bytes:
    if not isinstance(path, str):
        raise BadSample("an image is not given as a path")
    try:
        return (root / path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null character, or half of a surrogate pair
        raise BadSample("an image file cannot be read") from error


def _readable(path: Path) -> str:
    """A path as text; what is not UTF-8 in it is replaced."""
    return os.fsencode(path.as_posix()).decode(errors="replace")


def _decode(text: bytes) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("a text file is not UTF-8") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when shards were written, 2 with one sentence for input that cannot be used."""
    command = tyro.cli(Folder | Jsonl | Emoji, args=arguments, prog="python -m data.write", description=DESCRIPTION)
    try:
        written = command.write()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"samples {written.samples:,}, shards {written.shards:,}: {command.out}")
    for reason, count in written.skipped.most_common():
        named = written.named[reason]
        print(f"skipped {count:,}: {reason} ({', '.join(named)}{', ...' * (count > len(named))})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
