"""Resolve an address of a rule, such as `decoder.2.input`, to a value of this graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from tokcompile.address import Address, parse_address
from tokcompile.errors import AddressError
from tokcompile.sites.attention import Attention
from tokcompile.sites.block import Block, Stack
from tokcompile.sites.cache import Cache
from tokcompile.sites.find import Sites


@dataclass(frozen=True, eq=False)
class Place:
    """What an address stands for here: a value, and for an attention address the site.

    `owner` is the stack whose sequence the value belongs to: `vision` for the projector's input. `block` is the
    number of the block that it is of.
    """

    address: str
    node: Node
    attention: Attention | None = None
    owner: str = ""
    block: int | None = None


def resolve_address(sites: Sites, text: str) -> Place:
    """Find the value that an address names.

    Raises:
        AddressError: it matches nothing; the error lists the addresses that this graph has.
    """
    address = parse_address(text)
    if address.stack in ("projector", "splice", "embedding", "head"):
        return _single(sites, address, text)
    stack = sites.stacks.get(address.stack)
    if stack is None:
        raise _missing(sites, text, f"this graph has no {address.stack} stack", whole=False)
    if address.index is None:
        node = stack.blocks[0].input if address.part == "input" else stack.blocks[-1].output
        return Place(text, node, owner=stack.name)
    block = _block(sites, stack, address, text)
    if address.part == "cache":
        return Place(text, _cache(sites, block, text).key, owner=stack.name, block=stack.blocks.index(block))
    if address.part == "attention":
        return Place(text, block.attention.node, block.attention, stack.name, stack.blocks.index(block))
    node = {"input": block.input, "middle": block.middle, "output": block.output}[address.part]
    return Place(text, node, owner=stack.name, block=stack.blocks.index(block))


def resolve_every(sites: Sites, text: str) -> list[Place]:
    """Find the places that an address names: those of every block whose output the model uses, for `*`.

    Raises:
        AddressError: as `resolve_address`.
    """
    address = parse_address(text)
    if address.is_single:
        return [resolve_address(sites, text)]
    stack = sites.stacks.get(address.stack)
    if stack is None:
        raise _missing(sites, text, f"this graph has no {address.stack} stack", whole=False)
    live = [i for i, block in enumerate(stack.blocks) if block.live]
    return [resolve_address(sites, str(Address(address.stack, index, address.part))) for index in live]


def resolve_caches(sites: Sites, text: str) -> list[tuple[int, Block, Cache]]:
    """Find the caches that an address names, each with its block and the block's number; none in a call without any.

    Blocks whose keys are another sequence's, as those that read images beside the text, are none of them.

    Raises:
        AddressError: as `resolve_address`.
    """
    found = [(i, block) for i, block in resolve_blocks(sites, text) if block in sites.caches]
    return [(i, b, sites.caches[b]) for i, b in found if sites.reach.above(b.input, b.attention.key)]


def resolve_blocks(sites: Sites, text: str) -> list[tuple[int, Block]]:
    """Find the blocks whose caches an address names, with their numbers, whether they have one or not.

    Raises:
        AddressError: as `resolve_address`.
    """
    address = parse_address(text)
    stack = sites.stacks.get(address.stack)
    if stack is None:
        raise _missing(sites, text, f"this graph has no {address.stack} stack", whole=False)
    blocks = [_block(sites, stack, address, text)] if address.is_single else stack.blocks
    return [(stack.blocks.index(block), block) for block in blocks]


def _cache(sites: Sites, block: Block, text: str) -> Cache:
    if block not in sites.caches:
        raise AddressError(
            f"address '{text}' matches nothing: this graph hands back no keys and values",
            remedy="call the model with use_cache=True and a DynamicCache",
        )
    return sites.caches[block]


def _block(sites: Sites, stack: Stack, address: Address, text: str) -> Block:
    index = stack.features if address.index == "features" else address.index
    if not isinstance(index, int) or not -len(stack.blocks) <= index < len(stack.blocks):
        raise _missing(sites, text, f"{stack.name} has {len(stack.blocks)} blocks, 0 to {len(stack.blocks) - 1}")
    if address.part not in ("attention", "input", "middle", "output", "cache"):
        raise _missing(sites, text, f"'{address.part}' is not a value that this step can read")
    return stack.blocks[index]


def _single(sites: Sites, address: Address, text: str) -> Place:
    if text == "projector.patches" and sites.pooling is not None:
        return Place(text, sites.pooling.patches, owner="vision")
    if address.stack == "projector" and address.part != "patches" and sites.projector is not None:
        node = sites.projector.input if address.part == "input" else sites.projector.output
        return Place(text, node, owner="vision")
    if address.stack == "splice" and sites.splice is not None:
        node = sites.splice.offered if address.part == "input" else sites.splice.node
        return Place(text, node, owner="vision" if address.part == "input" else "decoder")
    if address.stack == "embedding" and sites.embedding is not None:
        return Place(text, sites.embedding, owner="decoder")
    if address.stack == "head" and sites.head is not None:
        return Place(text, sites.head.args[0], owner="decoder")
    if text == "projector.patches" and sites.projector is not None:
        why = "the features of all images are in one sequence where the projector reads them"
        raise _missing(sites, text, why)
    raise _missing(sites, text, f"this graph has no {address.stack}", whole=False)


def addresses(sites: Sites) -> list[str]:
    """The addresses that a rule may use on this graph, block numbers as ranges."""
    found = []
    for name, stack in sites.stacks.items():
        last = len(stack.blocks) - 1
        span = f"{name}.0..{last}" if last else f"{name}.0"
        found += [f"{span}.{part}" for part in ("input", "attention", "middle", "output")]
    for name, site in (("projector", sites.projector), ("splice", sites.splice)):
        if site is not None:
            patches = [f"{name}.patches"] if site is sites.projector and sites.pooling is not None else []
            found += [f"{name}.input", *patches, f"{name}.output"]
    if sites.embedding is not None:
        found.append("embedding.output")
    if sites.head is not None:
        found.append("head.input")
    return found


def _missing(sites: Sites, text: str, why: str, *, whole: bool = True) -> AddressError:
    have = ", ".join(addresses(sites)) or "no attention sites at all"
    return AddressError(
        f"address '{text}' matches nothing: {why}", found=f"this graph has {have}", remedy=_hint(sites, whole)
    )


def _hint(sites: Sites, whole: bool) -> str:
    if sites.loose and not sites.stacks:
        return f"{len(sites.loose)} attention sites stand on no residual stream and cannot be addressed"
    if not whole or not sites.stacks:
        return (
            "use a rule for what this graph has; if the model has more, this graph is one piece of a model that "
            "Dynamo split: see docs/capture.md"
        )
    return "list them with `tokred sites MODEL`"
