"""Shards -> one page that shows some of their samples, pictures and texts as training would read them.

    python -m data.preview 'shards/*.tar' --out preview.html

The page is a single file without scripts; its samples are spread over all shards, the same for the same seed.
"""

import base64
import html
import io
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

from data.address import permute
from data.parallel import bar
from data.records import BadSample
from data.shards import ShardSource
from model.files import write_whole

TEXT_LIMIT = 600  # characters of a sample's text that are shown
STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; background: #fafafa; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 16px }
article { background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: 10px; overflow-wrap: anywhere }
figure { margin: 0 0 6px; display: flex; gap: 4px; flex-wrap: wrap }
figcaption, code { color: #777; font-size: 12px }
.bad { border-color: #c33 }
"""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Show samples of shards on one page."""

    urls: tyro.conf.Positional[str]
    """Paths of the shards, with braces and wildcards."""
    out: Path = Path("preview.html")
    """The page to write."""
    n: int = 60
    """Samples to show."""
    seed: int = 0
    """Decides which."""
    side: int = 200
    """Pixels along the longer side of a picture on the page."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when the page was written, 2 with one sentence for input that cannot be used."""
    args = tyro.cli(Args, args=arguments, prog="python -m data.preview", description=__doc__)
    try:
        if min(args.n, args.side) < 1:
            raise ValueError("give --n and --side of at least 1")
        source = ShardSource(args.urls)
        text = page(source, args)
        write_whole(args.out, lambda path: path.write_text(text, encoding="utf-8"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


def page(source: ShardSource, args: Args) -> str:
    """HTML of `n` samples, broken ones with what is wrong."""
    count = min(args.n, len(source))
    cards, bad = [], Counter[str]()
    with bar("reading") as progress:
        for position in progress.track(range(count)):
            index = permute(position, len(source), args.seed, "preview")
            try:
                cards.append(_card(source.read(index), index, args.side))
            except BadSample as problem:
                bad[problem.reason] += 1
                cards.append(f'<article class="bad"><code>{index}</code><p>{html.escape(problem.reason)}</p></article>')
    title = html.escape(f"{args.urls}: {count:,} of {len(source):,} samples")
    problems = "".join(f"<p>{number:,} x {html.escape(reason)}</p>" for reason, number in bad.most_common())
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f"{head}<h1>{title}</h1>{problems}<main>{''.join(cards)}</main></html>\n"


def _card(raw: dict[str, Any], index: int, side: int) -> str:
    named = [(f"source {number}", picture) for number, picture in enumerate(raw["sources"])]
    named += [(name, raw[name]) for name in ("image", "mask") if raw[name] is not None]
    pictures = "".join(f'<img src="{data_url(picture, side)}" alt="{name}" title="{name}">' for name, picture in named)
    sizes = ", ".join(f"{name} {picture.width} x {picture.height}" for name, picture in named)
    described = {name: value for name, value in raw["json"].items() if name not in ("key", "status", "sha256", "caption")}
    rest = _short(json.dumps(described, ensure_ascii=False)) if described else ""
    return (
        f"<article><figure>{pictures}</figure><figcaption>{index} &middot; {html.escape(raw['key'])} &middot; {sizes}"
        f"</figcaption><p>{_short(raw['txt'])}</p><code>{rest}</code></article>"
    )


def _short(text: str) -> str:
    return html.escape(text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT] + " ...")


def data_url(picture: Image.Image, side: int, kind: str = "JPEG") -> str:
    """A picture as an address that holds it, at most `side` pixels along its longer side."""
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    stream = io.BytesIO()
    small.save(stream, kind, quality=85)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(stream.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main())
