"""Labels -> tokens, and scenes -> labels."""

from collections import Counter

import numpy as np
import pytest
import torch

from data.world.captions import Caption, Group, describe
from data.world.dense import COLOUR_NAMES, SHAPE_NAMES, colour_and_shape
from data.world.labels import OBJECTS, WORDS, Withhold, encode, encode_caption, labels_config, nothing
from data.world.render import render
from data.world.scene import BACKGROUNDS, COLOURS, make_scene, random_for
from data.world.wanted import ANYWHERE, LINKED
from model.files import write_tensors
from model.labels import LABELS_FILE, UNKNOWN, Labels, LabelsConfig, load_labels

TELL_ALL = Withhold(0, 0, 0, 0, 0, 0, 0)


def test_tokens_have_unit_scale_and_a_class_label_is_one_token():
    torch.manual_seed(0)
    labels = Labels(LabelsConfig(vocabulary=1001, width=64))
    tokens = labels(torch.randint(1001, (50, 1, 1)))
    assert tokens.shape == (50, 1, 64)
    torch.testing.assert_close(tokens.square().mean(-1), torch.ones(50, 1), rtol=1e-3, atol=1e-3)


def test_plain_labels_are_their_vectors(tmp_path):
    labels = Labels(LabelsConfig(vocabulary=4, width=8, plain=True))
    assert torch.equal(labels(torch.tensor([[[2]], [[0]]]))[:, 0], labels.embed_word.weight[[2, 0]])
    write_tensors(tmp_path / LABELS_FILE, labels.state_dict())
    assert load_labels(tmp_path).config == labels.config


def test_labels_with_places_need_them():
    labels = Labels(labels_config(32))
    with pytest.raises(ValueError, match="places"):
        labels(torch.zeros(1, 1 + OBJECTS, 3, dtype=torch.long))


def test_a_scene_told_in_full_can_be_told_back():
    def rounded(place) -> tuple[float, ...]:
        return tuple(np.round(np.asarray(place, np.float32), 4).tolist())

    for index in range(50):
        scene = make_scene(3, index)
        words, places = encode(scene.to_json(), TELL_ALL, 0, index)
        assert WORDS[words[0, 0]] == scene.background
        told = Counter()
        for row, place in zip(words[1:], places[1:], strict=True):
            if WORDS[row[0]] != "none":
                told[*(WORDS[word] for word in row), rounded(place)] += 1
        things = Counter((t.colour, t.shape, t.size, rounded((t.x, t.y, 0))) for t in scene.objects)
        assert told == things


def test_what_is_withheld_is_withheld_as_often_as_said_and_the_same_each_time():
    withhold = Withhold(everything=0.1, captions=0.0, places=0.5, sizes=0.3, backgrounds=0.2, colours=0.0, shapes=0.0)
    scenes = [make_scene(4, index).to_json() for index in range(1000)]
    told = [encode(scene, withhold, 7, index) for index, scene in enumerate(scenes)]
    nothing = np.mean([(words == UNKNOWN).all() for words, _ in told])
    assert abs(nothing - 0.1) < 0.03
    some = [(words, places) for words, places in told if (words != UNKNOWN).any()]
    assert abs(np.mean([words[0, 0] == UNKNOWN for words, _ in some]) - 0.2) < 0.05
    assert abs(np.mean([places[1, 2] > 0 for _, places in some]) - 0.5) < 0.06
    for index in (0, 17):
        again = encode(scenes[index], withhold, 7, index)
        assert all(np.array_equal(a, b) for a, b in zip(told[index], again, strict=True))


def test_what_a_caption_says_can_be_told_back():
    """Groups, link and background, from the labels alone."""

    def said(word: int) -> str | None:
        return None if word == UNKNOWN else WORDS[word]

    linked = {pair: how for how, pair in LINKED.items()}
    for index in range(200):
        caption = describe(make_scene(8, index), random_for(8, "test", index))
        words, places = encode_caption(caption)
        things = [tuple(map(said, row)) for row in words[1:] if said(row[0]) != "none"]
        assert Counter(things) == Counter((g.colour, g.shape, g.size) for g in caption.groups for _ in range(g.count))
        assert said(words[0, 0]) == caption.background
        told = tuple(tuple(np.round(place.astype(float), 4).tolist()) for place in places[1:])
        placed = [row for row, place in enumerate(told) if place != ANYWHERE]
        if caption.link is None:
            assert not placed
            continue
        first, second = (sum(g.count for g in caption.groups[:i]) for i in (caption.link[0], caption.link[2]))
        assert sorted((first, second)) == placed
        assert linked[told[first], told[second]] == caption.link[1]


def test_the_decoder_is_told_captions_as_often_as_said_and_the_bridge_the_same():
    scenes = [make_scene(4, index).to_json() for index in range(400)]
    full = [encode(scene, TELL_ALL, 7, index) for index, scene in enumerate(scenes)]
    only = Withhold(everything=0.0, captions=1.0)
    told = [encode(scene, only, 7, index) for index, scene in enumerate(scenes)]
    assert all((places[:, 2] > 0).all() for _, places in told)
    assert not any((places[1, 2] > 0).any() for _, places in full)
    half = Withhold(0, 0.5, 0, 0, 0, 0, 0)
    assert abs(np.mean([encode(s, half, 7, i)[1][1, 2] > 0 for i, s in enumerate(scenes)]) - 0.5) < 0.08
    words, _ = encode_caption(Caption("a shape", (Group(1),)))
    assert (words == nothing()[0]).sum() == words.size - OBJECTS + 1  # four things are not there, the first may be any


def test_dense_labels_name_the_pixels_of_the_picture():
    palette = {name: np.array(rgb) for name, rgb in (BACKGROUNDS | COLOURS).items()}
    for index in range(20):
        scene = make_scene(5, index)
        colours, shapes = colour_and_shape(scene, grid=16)
        pixels = render(scene, 64)[2::4, 2::4].astype(int)
        nearest = [[min(palette, key=lambda name: abs(palette[name] - p).sum()) for p in row] for row in pixels]
        same = np.array(
            [[COLOUR_NAMES[n] == near for n, near in zip(*rows, strict=True)] for rows in zip(colours, nearest, strict=True)]
        )
        assert same.mean() > 0.9  # the rest lies on anti-aliased edges
        present = {SHAPE_NAMES[n] for n in np.unique(shapes)} - {"background"}
        assert present == {thing.shape for thing in scene.objects}
