"""Measures -> a page."""

import pytest

from sample.measures import Measure, share, write_json
from sample.report import main
from train import ablation


def test_the_page_shows_every_measure_and_its_command(tmp_path):
    write_json(
        tmp_path / "draw.json", {"generation.colour": share(19, 20), "speed.step_ratio": Measure(1.5, 1.4, 1.6, 7, "x")}
    )
    (tmp_path / "draw.picture.txt").write_text("pictures/draw.png\n")
    (tmp_path / "draw.machine.txt").write_text("one CPU\n")
    (tmp_path / "draw.note.txt").write_text("Colours come first.\n")
    (tmp_path / "draw.command.txt").write_text("python -m sample.evaluate world\n")
    main([str(tmp_path / "page.md"), "Results", str(tmp_path / "draw.json")])
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# Results\n")
    assert "`python -m sample.evaluate world`\n\none CPU\n\nColours come first.\n\n![draw](pictures/draw.png)\n\n" in page
    assert "| generation.colour | 95.0 % |" in page
    assert "| speed.step_ratio | 1.5 x | 1.4 to 1.6 | 7 |" in page


def test_a_missing_file_leaves_no_page(tmp_path):
    with pytest.raises((ValueError, OSError)):
        main([str(tmp_path / "page.md"), "Results", str(tmp_path / "absent.json")])
    assert not (tmp_path / "page.md").exists()


def test_a_folder_becomes_a_line_for_each_file_without_controls(tmp_path):
    folder = tmp_path / "ablation"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"holds no \.json"):
        main([str(tmp_path / "page.md"), "Results", str(folder)])
    for name, right in (("queries_1", 2), ("queries_4", 15)):
        measures = {"generation.colour": share(right, 20), "generation.chance.colour": share(1, 20)}
        write_json(folder / f"{name}.json", measures | ({"training.loss": Measure(0.2)} if right > 2 else {}))
    main([str(tmp_path / "page.md"), "Results", str(folder)])
    page = (tmp_path / "page.md").read_text()
    assert "| queries_1 | 10.0 % (2.8 to 30.1 %) |  |\n| queries_4 | 75.0 % (53.1 to 88.8 %) | 0.2 |\n" in page
    assert "chance" not in page


def test_an_unknown_run_of_the_ablation_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(ValueError, match=r"'queries_3' is unknown; choose from .*queries_4"):
        ablation.main(["--runs", "queries_3", "--json", str(tmp_path / "json")])
    assert not (tmp_path / "json").exists()
