"""How fast we are beside the plain way of doing the same, measured side by side in one run.

python -m train.benchmark metaquery --prefix-tokens 256 --json speed.json
"""

import sys

import tyro

from sample.cli import run
from train.benchmark_drawing import Drawn, drawn
from train.benchmark_loader import Loading, loading
from train.benchmark_metaquery import Metaquery, metaquery
from train.benchmark_order import Ordering, ordering
from train.benchmark_reading import Reading, reading
from train.benchmark_repae import Repae, repae
from train.benchmark_saves import Saves, saves
from train.benchmark_serving import Serving, serving
from train.benchmark_talking import Talking, talking

COMMANDS = {
    "metaquery": (Metaquery, metaquery),
    "reading": (Reading, reading),
    "repae": (Repae, repae),
    "drawing": (Drawn, drawn),
    "order": (Ordering, ordering),
    "loader": (Loading, loading),
    "saves": (Saves, saves),
    "talking": (Talking, talking),
    "serving": (Serving, serving),
}


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark that the command line names."""
    args = tyro.extras.subcommand_cli_from_dict({name: asked for name, (asked, _) in COMMANDS.items()}, args=argv)
    work = {asked: measure for asked, measure in COMMANDS.values()}
    work[type(args)](args)


if __name__ == "__main__":
    sys.exit(run(main))
