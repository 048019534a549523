"""Sites: attention, blocks and stacks, rotary, cache, projector, splice; found in the graph by structure."""

from tokcompile.sites.address import Place, addresses, resolve_address, resolve_blocks, resolve_caches
from tokcompile.sites.attention import Attention
from tokcompile.sites.block import Block, Stack
from tokcompile.sites.find import Sites, find_sites
from tokcompile.sites.sight import window_of

__all__ = [
    "Attention",
    "Block",
    "Place",
    "Sites",
    "Stack",
    "addresses",
    "find_sites",
    "resolve_address",
    "resolve_blocks",
    "resolve_caches",
    "window_of",
]
