"""A release -> measures: how well it draws and how well its MLLM understands.

    python -m sample.evaluate world --release assets/world/release

Each evaluation is a file; the JSON of each says by what it was measured (`sample/protocol.py`)."""

import sys

import tyro

from sample.cli import run
from sample.evaluate_decoder import Decoder, decoder
from sample.evaluate_edits import Edits, edits
from sample.evaluate_images import Images, images
from sample.evaluate_vae import VAE, vae
from sample.evaluate_world import World, world
from sample.parity import Parity, parity

COMMANDS = {
    "world": (World, world),
    "edits": (Edits, edits),
    "decoder": (Decoder, decoder),
    "vae": (VAE, vae),
    "images": (Images, images),
    "parity": (Parity, parity),
}


def main(argv: list[str] | None = None) -> None:
    """Runs the evaluation that the command line names."""
    args = tyro.extras.subcommand_cli_from_dict({name: asked for name, (asked, _) in COMMANDS.items()}, args=argv)
    work = {asked: measure for asked, measure in COMMANDS.values()}
    work[type(args)](args)


if __name__ == "__main__":
    sys.exit(run(main))
