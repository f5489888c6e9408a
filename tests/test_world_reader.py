"""The judge: always right on clean renders, right on mildly damaged ones, silent about what it cannot tell."""

import random
from dataclasses import replace

import numpy as np
import pytest

from data.world.blobs import IGNORED_AREA, label
from data.world.check import KINDS, agrees, check, morph, soften, tally
from data.world.reader import CLAIMED, UNCLEAR, Found, Reading, read
from data.world.render import render
from data.world.scene import BACKGROUNDS, COLOURS, SHAPES, SPLITS, Object, Scene, make_scene

ONE = Scene("white", (Object("square", "green", "large", 0.5, 0.5),))


CHANGES = ({"shape": "circle"}, {"colour": UNCLEAR}, {"size": "small"}, {"x": 0.53})


def judge(seed: int = 11, **pictures: int):
    return tally(check(pictures, seed))


def test_clean_renders_are_read_right():
    result = judge(clean=600)["clean"]
    assert (result.right, result.wrong) == (600, 0)


def test_mildly_soft_and_noisy_renders_are_read_right():
    result = judge(soft=200)["soft"]
    assert result.right >= 198
    assert result.wrong == 0


def test_sketchy_renders_are_mostly_read_and_never_misread():
    result = judge(sketchy=80)["sketchy"]
    assert result.right >= 60
    assert result.wrong == 0


def test_deceptive_pictures_are_not_claimed():
    results = judge(noise=30, blurred=40, crossfade=40, morph=100)
    assert all(result.right == 0 for kind, result in results.items() if kind != "blurred")
    assert [results[kind].wrong for kind in ("noise", "blurred", "crossfade")] == [0, 0, 0]
    assert results["morph"].wrong <= 8  # half way from circle to cross lies close to a diamond


def test_confidence_falls_along_a_morph_and_the_other_shape_takes_over():
    shares = (0, 0.15, 0.5, 0.85, 1)
    objects = [read(morph("circle", "triangle", share, 64, random.Random(3))).objects[0] for share in shares]
    assert [thing.shape for thing in objects] == ["circle", "circle", UNCLEAR, "triangle", "triangle"]
    confidences = [thing.confidence for thing in objects]
    assert confidences[0] > confidences[1] > confidences[2] < confidences[3] < confidences[4]


@pytest.mark.parametrize("size", [48, 96, 128, 250])
def test_every_size_of_picture_is_read_alike(size):
    for index in range(12):
        scene = make_scene(4, index, SPLITS[index % 4])
        assert agrees(read(render(scene, size)), scene)


def test_a_reading_becomes_a_scene():
    scene = read(render(ONE)).scene()
    assert scene.background == "white"
    assert (scene.objects[0].name, scene.objects[0].size) == ("green square", "large")


def test_a_colour_between_two_entries_is_unclear():
    picture = render(ONE).astype(np.float32)
    inside = (picture != 250).any(-1)
    middle = (np.array(COLOURS["orange"]) + COLOURS["yellow"]) / 2
    picture[inside] = middle
    found = read(picture.astype(np.uint8))
    assert [(thing.shape, thing.colour) for thing in found.objects] == [("square", UNCLEAR)]
    assert not found.clear


def test_a_background_between_two_entries_is_unclear():
    picture = render(ONE).astype(np.int16)
    picture[(picture == 250).all(-1)] = 200
    reading = read(picture.astype(np.uint8))
    assert reading.background == UNCLEAR
    assert not reading.clear
    assert reading.objects[0].shape == "square"


def test_small_artefacts_are_ignored_and_larger_blobs_are_not():
    picture = render(ONE)
    side = int((IGNORED_AREA * 64 * 64) ** 0.5)
    picture[3 : 3 + side, 3 : 3 + side] = COLOURS["red"]
    picture[31:33, 31:33] = COLOURS["red"]  # on the square
    assert agrees(read(picture), ONE)
    picture[3 : 5 + side, 3 : 5 + side] = COLOURS["red"]
    speck = read(picture).objects[0]
    assert (speck.colour, speck.size) == ("red", UNCLEAR)
    assert speck.confidence < CLAIMED


def test_an_empty_canvas_has_a_background_and_nothing_else():
    for name, colour in BACKGROUNDS.items():
        reading = read(np.full((64, 64, 3), colour, np.uint8))
        assert reading == Reading(name, (), 1.0)


def test_faint_traces_are_no_clear_empty_canvas():
    faint = soften(render(make_scene(5, 3, "counts")), 8, 0, np.random.default_rng(0))
    assert not read(faint).clear


def test_touching_objects_of_one_colour_are_two():
    scene = Scene(
        "gray",
        (Object("diamond", "red", "small", 0.3, 0.5), Object("diamond", "red", "small", 0.55, 0.5)),
    )
    assert agrees(read(render(scene)), scene)


def test_agreement_needs_every_word_and_place():
    found = Found("square", "green", "large", 0.5, 0.5, 0.18, 0.9)
    assert agrees(Reading("white", (found,), 0.9), ONE)
    for other in (
        Reading("gray", (found,), 0.9),
        Reading("white", (), 0.9),
        Reading("white", (found, found), 0.9),
        *(Reading("white", (replace(found, **change),), 0.9) for change in CHANGES),
    ):
        assert not agrees(other, ONE)


def test_label_equals_a_flood_fill():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.integers(0, 3, (12, 15))
        numbers = label(values)
        assert ((numbers > 0) == (values > 0)).all()
        assert _partition(numbers) == _partition(_flood(values))


def _flood(values: np.ndarray) -> np.ndarray:
    numbers = np.zeros(values.shape, int)
    for start in zip(*np.nonzero(values), strict=True):
        todo = [start] if numbers[start] == 0 else []
        new = numbers.max() + 1
        while todo:
            row, column = todo.pop()
            inside = 0 <= row < values.shape[0] and 0 <= column < values.shape[1]
            if inside and numbers[row, column] == 0 and values[row, column] == values[start]:
                numbers[row, column] = new
                todo += [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return numbers


def _partition(numbers: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(numbers == n).tolist()) for n in range(1, numbers.max() + 1)}


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((64, 64, 3), np.float32),
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 80, 3), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(picture):
    with pytest.raises(ValueError, match=r"^image: needs .* first$"):
        read(picture)


def test_every_kind_of_picture_is_drawn_from_its_address():
    for draw in KINDS.values():
        scene = make_scene(0, 1)
        first, second = (draw(scene, 64, np.random.default_rng(1))[1] for _ in range(2))
        assert first.dtype == np.uint8
        assert (first == second).all()


def test_shapes_of_all_kinds_were_met():
    met = {thing.shape for index in range(60) for thing in make_scene(11, index, SPLITS[index % 4]).objects}
    assert met == set(SHAPES)
