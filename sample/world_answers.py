"""Held-out scenes -> how often the MLLM answers questions about them rightly, by kind of question; and two controls.

`blank`: the same questions about an empty grey picture. `chance`: the most frequent answer to each wording, which is what
can be known without looking.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from data.world.captions import plural
from data.world.questions import KINDS, Question, questions
from data.world.render import render
from data.world.scene import COLOURS, OPPOSITE, SHAPES, SIZES, make_scene, random_for
from model.frozen import FrozenMLLM
from model.prefix import Turn
from sample.measures import Measure, share
from sample.progress import Track

_WORDS = [*COLOURS, *SHAPES, *SIZES, *OPPOSITE, *map(plural, SHAPES)]
_SCENE_WORDS = re.compile(r"\b(an?|" + "|".join(sorted(_WORDS, key=len, reverse=True)) + r")\b")
LONGEST_ANSWER = 16  # tokens; the longest right one is "the" with a colour and a shape


@dataclass(frozen=True)
class Exam:
    """A question and the picture that it is about."""

    question: Question
    picture: Image.Image


def exams(seed: int, split: str, pictures: int, size: int = 64) -> list[Exam]:
    """All questions about `pictures` scenes of a split, `size` pixels a side; a pure function of its arguments."""
    made = []
    for index in range(pictures):
        scene = make_scene(seed, index, split)
        picture = Image.fromarray(render(scene, size))
        asked = questions(scene, random_for(seed, "exam", split, index))
        made += [Exam(question, picture) for question in asked]
    return made


SEEING, BLANK, CHANCE = "understanding", "understanding.blank", "understanding.chance"
MEASURES = tuple(f"{of}.{kind}" for of in (SEEING, BLANK, CHANCE) for kind in (*KINDS, "all"))
"""The names of what `understanding` measures, where something of each kind is asked."""


def understanding(
    mllm: FrozenMLLM,
    asked: Sequence[Exam],
    batch_size: int = 32,
    watch: Track = iter,
) -> dict[str, Measure]:
    """Accuracy by kind and overall, with the picture (`understanding.colour`), without it (`understanding.blank.colour`),
    and of the best guess (`understanding.chance.colour`). `watch` may show progress over the batches."""
    blank = [Exam(exam.question, Image.new("RGB", exam.picture.size, (128, 128, 128))) for exam in asked]
    wanted = [exam.question.answer for exam in asked]
    both = answers(mllm, [*asked, *blank], batch_size, watch)
    given, unseeing = both[: len(asked)], both[len(asked) :]
    kinds = [exam.question.kind for exam in asked]
    measures = _by_kind(SEEING, kinds, [a == b for a, b in zip(given, wanted, strict=True)])
    measures |= _by_kind(BLANK, kinds, [a == b for a, b in zip(unseeing, wanted, strict=True)])
    return measures | _by_kind(CHANCE, kinds, best_guess([exam.question for exam in asked]))


def answers(mllm: FrozenMLLM, asked: Sequence[Exam], batch_size: int, watch: Track = iter) -> list[str]:
    """The likeliest answer to each question, lower case, without a closing full stop."""
    given: list[str] = []
    for start in watch(range(0, len(asked), batch_size)):
        batch = asked[start : start + batch_size]
        prefix = mllm.builder([[Turn("user", exam.question.text, (exam.picture,))] for exam in batch])
        given += mllm.answers(prefix.to(mllm.device), LONGEST_ANSWER)
    return [answer.strip().lower().rstrip(".") for answer in given]


def best_guess(asked: Sequence[Question]) -> list[bool]:
    """Whether each question is answered by the most frequent answer to its wording.

    Answers are compared by their place among the choices, so that "which is larger, A or B" has a first and a second.
    """
    keys = [(wording(question.text), len(question.choices)) for question in asked]
    places = [question.choices.index(question.answer) for question in asked]
    frequent: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)
    for key, place in zip(keys, places, strict=True):
        frequent[key][place] += 1
    return [place == frequent[key].most_common(1)[0][0] for key, place in zip(keys, places, strict=True)]


def wording(text: str) -> str:
    """A question with the words of its scene taken out."""
    return _SCENE_WORDS.sub("_", text)


def _by_kind(name: str, kinds: Sequence[str], right: Sequence[bool]) -> dict[str, Measure]:
    measures = {}
    for kind in KINDS:
        of_kind = [is_right for asked, is_right in zip(kinds, right, strict=True) if asked == kind]
        if of_kind:
            measures[f"{name}.{kind}"] = share(sum(of_kind), len(of_kind))
    return measures | {f"{name}.all": share(sum(right), len(right))}
