"""A module -> the same module whose repeated blocks are compiled: once for all blocks of a kind, in place."""

from __future__ import annotations

from diffusers.models.resnet import ResnetBlock2D
from torch import _dynamo, nn

GRAPHS = 64
"""Of one block's code, for as many shapes; torch gives up after 8, and an autoencoder has as many."""


def compile_all(module: nn.Module) -> None:
    """Compiles the blocks of a module, or its parts where it has none: an engine's hooks, on the whole, cut a graph."""
    if not compile_blocks(module):
        for part in module.children():
            compile_whole(part)


def compile_blocks(module: nn.Module) -> int:
    """Compiles every block of the outermost stacks (ModuleLists of two or more modules of one class) and says how many; of
    diffusers' convolutional networks, whose blocks are of many shapes, every ResnetBlock2D for its own shape.

    Names, parameters and hooks stay; compiling happens when a block is first called. Blocks of a kind share their code, so
    the wait does not grow with depth."""
    count = 0
    for child in module.children():
        if isinstance(child, ResnetBlock2D):
            compile_whole(child)
            count += 1
        elif _repeats(child):
            for block in child.children():
                block.compile()
            count += len(list(child.children()))
        else:
            count += compile_blocks(child)
    return count


def compile_whole(module: nn.Module) -> None:
    """Compiles a module without repeated blocks, in place, for each shape that it meets."""
    _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, GRAPHS)
    module.compile(dynamic=False)


def _repeats(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) < 2 or len({type(block) for block in module}) > 1:
        return False
    return not any(isinstance(part, ResnetBlock2D) for part in module.modules())
