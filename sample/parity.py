"""A release's MLLM and its base -> the proof that understanding is the base's: the same tensors, logits and answers.

The base is loaded by transformers' own class and runs by its own forward and `generate`, each question alone, with positions
of its own; ours is the one that has just drawn a picture. Both are given the same ids and pixels, which
tests/test_families.py holds against the family's own processor. Letters: P prefix tokens, V vocabulary."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sample.progress import Track, progress

DRAWN_FIRST = "a red circle"


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Prove that a release understands what its base does, bit for bit. Exit code 1 where it does not."""

    release: Path
    """The release folder."""
    images: int = 10
    """Held-out pictures of the world to ask about, some questions each."""
    pixels: int = 64
    """Along a side of them."""
    tokens: int = 16
    """Of an answer, at most."""
    seed: int = 0
    """Decides pictures and questions."""
    batch_size: int = 1
    """Questions that ours answers at once; rows of other lengths round otherwise in bfloat16."""
    json: Path | None = None
    """Where to write the measures."""


def parity(args: Parity) -> None:
    """Asks both, prints the measures, and writes them where told; exits with 1 where anything differs.

    Raises:
        ValueError: a number is out of range, or the release or its base cannot be loaded.
    """
    if min(args.images, args.pixels, args.tokens, args.batch_size) < 1:
        raise ValueError("give --images, --pixels, --tokens and --batch-size of at least 1")
    from model.hub import Source, fetched
    from sample.measures import show, write_json
    from sample.pipeline import Pipeline
    from sample.protocol import parts_of, protocol
    from sample.settings import Drawing

    pipeline = Pipeline.from_release(args.release)
    pipeline([DRAWN_FIRST], [args.seed], Drawing(steps=1))
    mllm = pipeline.model.mllm
    source = Source("mllm.path", mllm.config.path, mllm.config.revision)
    base: Any = fetched(source, mllm.model_class.from_pretrained, dtype=mllm.model.dtype, trust_remote_code=False)
    base = base.eval().to(mllm.device)
    measures, sha256 = compare(mllm, base, args, progress("asking"))
    show(f"{args.release} and {mllm.config.path}", measures)
    if args.json is not None:
        write_json(args.json, measures, protocol(args, parts_of(pipeline.model) | {"base": sha256}, drawn_first=DRAWN_FIRST))
    if any(measures[f"parity.{what}"].value != 1 for what in ("tensors", "logits", "answers")):
        sys.exit(1)


def compare(mllm: Any, base: Any, args: Parity, watch: Track = iter) -> tuple[dict[str, Any], str]:
    """Measures by name (`tensors`, `logits` and `answers`: shares that are the same bit for bit, letter for letter;
    `logits_difference`, and `cached_difference` of the path by which ours answers), and the sha256 of the base."""
    import torch

    from model.assets import fingerprint, tensors_of
    from model.prefix import Turn
    from sample.measures import Measure, share
    from sample.world_answers import exams

    ours, theirs = tensors_of(mllm.model), tensors_of(base)
    same = [name for name in ours.keys() & theirs.keys() if _equal(ours[name], theirs[name])]
    turns = [
        [Turn("user", exam.question.text, (exam.picture,) if mllm.builder.images is not None else ())]
        for exam in exams(args.seed, "val", args.images, args.pixels)
    ]
    equal, differences, cached, said = 0, [0.0], [0.0], []
    for conversation in watch(turns):
        prefix = mllm.builder([conversation]).to(mllm.device)
        given = _as_stock(mllm, prefix)
        with torch.no_grad():
            expected = base(**given, use_cache=False).logits  # [1, P, V]
            logits, by_cache = mllm.logits(prefix), base.lm_head(mllm.prefill(prefix).states)  # [1, P, V] each
            answer = base.generate(**given, generation_config=_greedy(mllm, base, args.tokens))
        equal += torch.equal(logits, expected)
        differences.append((logits.float() - expected.float()).abs().max().item())
        cached.append((by_cache.float() - expected.float()).abs().max().item())
        new = answer[0, prefix.ids.shape[1] :]
        said.append(mllm.builder.tokenizer.decode(new, skip_special_tokens=True))
    replies = []
    for start in range(0, len(turns), args.batch_size):
        prefix = mllm.builder(turns[start : start + args.batch_size])
        replies += mllm.answers(prefix.to(mllm.device), args.tokens)
    return {
        "parity.tensors": share(len(same), len(ours.keys() | theirs.keys())),
        "parity.logits": share(equal, len(turns)),
        "parity.answers": share(sum(a == b for a, b in zip(replies, said, strict=True)), len(turns)),
        "parity.logits_difference": Measure(max(differences), n=len(turns)),
        "parity.cached_difference": Measure(max(cached), n=len(turns)),
    }, fingerprint(theirs)


def _equal(one: Any, other: Any) -> bool:
    import torch

    return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())


def _as_stock(mllm: Any, prefix: Any) -> dict[str, Any]:
    """A prefix of one row as the stock class is given it, which finds the positions itself."""
    given = dict(mllm.arguments(prefix))
    del given["position_ids"]
    if mllm.position_axes:
        given["mm_token_type_ids"] = (prefix.ids == mllm.builder.image_id).int()
    return given


def _greedy(mllm: Any, base: Any, tokens: int) -> Any:
    """The likeliest token each time, none of the penalties that a model's own settings may have."""
    from transformers import GenerationConfig

    ends = base.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    every = {*listed, mllm.builder.tokenizer.eos_token_id} - {None}
    return GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=sorted(every), pad_token_id=mllm.builder.pad_id
    )
