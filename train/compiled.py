"""A module -> the same module whose repeated blocks are compiled: once for all blocks of a kind, in place."""

from __future__ import annotations

from torch import nn


def compile_blocks(module: nn.Module) -> int:
    """Compiles every block of the outermost stacks (ModuleLists of two or more modules of one class) and says how many.

    Names, parameters and hooks stay; compiling happens when a block is first called. Blocks of a kind share their code, so
    the wait does not grow with depth."""
    count = 0
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(block) for block in child}) == 1:
            for block in child:
                block.compile()
            count += len(child)
        else:
            count += compile_blocks(child)
    return count
