import json
import math

import pytest
from PIL import Image
from rich.console import Console

from sample.grid import RIGHT, WRONG, Cell, Row, sheet, table
from sample.measures import Measure, read_json, read_protocol, share, show, spans, spread, write_json


def test_wilson_solves_the_equation_it_stands_for():
    """The bounds are where the observed share lies 1.96 standard errors away (Wilson 1927)."""
    for successes, n in [(1, 10), (37, 50), (499, 500)]:
        measure = share(successes, n)
        for bound in (measure.low, measure.high):
            assert bound is not None
            assert abs(measure.value - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), rel=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (20, 20), (0, 0)])
def test_at_the_ends_the_interval_stays_inside(successes, n):
    measure = share(successes, n)
    assert measure.low is not None
    assert measure.high is not None
    assert 0 <= measure.low <= measure.value <= measure.high <= 1
    assert measure.low < measure.high


def test_json_round_trip_has_the_five_fields(tmp_path):
    measures = {"generation.colour": share(19, 20), "speed.step_ratio": Measure(0.6, unit="ratio")}
    write_json(tmp_path / "new" / "m.json", measures)
    assert read_json(tmp_path / "new" / "m.json") == measures
    raw = json.loads((tmp_path / "new" / "m.json").read_text())
    assert list(raw["generation.colour"]) == ["value", "low", "high", "n", "unit"]


def test_how_it_was_measured_stands_beside_and_old_files_are_read(tmp_path):
    measures, told = {"generation.colour": share(19, 20)}, {"evaluation": "world", "sha256": {"release": "0c"}}
    write_json(tmp_path / "new.json", measures, told)
    write_json(tmp_path / "old.json", measures)
    assert read_json(tmp_path / "new.json") == read_json(tmp_path / "old.json") == measures
    assert (read_protocol(tmp_path / "new.json"), read_protocol(tmp_path / "old.json")) == (told, {})


@pytest.mark.parametrize(
    "measures",
    [
        {"Colour": Measure(1)},
        {"colour": Measure(1)},
        {"a.b": Measure(math.nan)},
        {"a.b": Measure(1, math.inf)},
    ],
)
def test_bad_measures_write_nothing(tmp_path, measures):
    with pytest.raises(ValueError, match="measure"):
        write_json(tmp_path / "m.json", measures)
    assert list(tmp_path.iterdir()) == []


def test_reading_something_else_is_refused(tmp_path):
    for text in ("[1]", "{", '{"a.b": {"worth": 1}}'):
        (tmp_path / "m.json").write_text(text)
        with pytest.raises(ValueError, match="does not hold measures"):
            read_json(tmp_path / "m.json")


def test_show_prints_what_is_written():
    console = Console(record=True, width=90)
    show("drawing", {"generation.colour": share(19, 20), "speed.step": Measure(0.25, unit="s")}, console)
    text = console.export_text()
    for part in ("generation.colour", "95.0 %", "76.4 to 99.1", "20", "speed.step", "0.25 s"):
        assert part in text


def test_few_repeats_have_a_range_and_no_interval():
    console = Console(record=True, width=90)
    show("speed", {"speed.step": spread([1.0, 2.0, 3.0], "s")}, console)
    assert "range" in console.export_text()
    assert spans([spread([1.0] * 6, "s"), share(1, 2)]) == "95 % interval"


def test_sheet_holds_every_picture_at_its_place():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    rows = [
        Row(f"a caption that is number {i} and long", (Cell(Image.new("RGB", (8, 8), c)),)) for i, c in enumerate(colours)
    ]
    picture = sheet(rows, columns=2, cell_pixels=40)
    assert picture.width == 2 * 48 + 8
    assert [picture.getpixel((8 + 48 * i + 20, 28)) for i in range(2)] == colours[:2]
    assert colours[2] in {picture.getpixel((28, y)) for y in range(48, picture.height)}


def test_table_sets_every_picture_beside_its_caption_with_its_verdict():
    red, blue = Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGBA", (8, 16), (0, 0, 200, 255))
    rows = [Row("one", (Cell(red, False), Cell(blue, True))), Row("two", (Cell(blue), Cell(red)))]
    picture = table(("before", "after"), rows, cell_pixels=40, caption_pixels=100)
    assert picture.width == 116 + 2 * 48
    columns = [[picture.getpixel((116 + 48 * i + 20, y)) for y in range(picture.height)] for i in range(2)]
    for column, (upper, lower) in zip(columns, [((200, 0, 0), (0, 0, 200)), ((0, 0, 200), (200, 0, 0))], strict=True):
        assert column.index(upper) < column.index(lower)
    verdicts = {RIGHT, WRONG}
    assert [verdicts & set(column) for column in columns] == [{WRONG}, {RIGHT}]


def test_a_grid_of_nothing_or_of_gaps_is_refused():
    with pytest.raises(ValueError, match="no picture"):
        sheet([])
    with pytest.raises(ValueError, match="no row"):
        table(("a",), [])
    with pytest.raises(ValueError, match="1 pictures for 2 headings"):
        table(("a", "b"), [Row("x", (Cell(Image.new("RGB", (8, 8))),))])
