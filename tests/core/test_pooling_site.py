"""Where models pool the projected patches of each image."""

from __future__ import annotations

import families
import pytest

from tokcompile import AddressError
from tokcompile.models.catalogue import family
from tokcompile.sites import addresses, resolve_address


@pytest.mark.parametrize(
    ("name", "kind", "patches", "pooled"),
    [
        ("llava_onevision", {"images": 0, "videos": 1}, (10, 25, 64), (10, 9, 64)),
        ("llava_onevision", {"images": 1}, (6, 25, 64), (6, 25, 64)),
        ("paligemma", {"images": 1}, (2, 25, 64), (2, 25, 64)),
    ],
)
def test_patches_are_found_before_the_model_pools_them(name: str, kind: dict, patches: tuple, pooled: tuple) -> None:
    found = families.subject(family(name), **kind).sites.pooling
    assert found is not None
    assert [tuple(node.meta["val"].shape) for node in (found.patches, found.pooled)] == [patches, pooled]
    assert bool(found.between) == (patches != pooled)


def test_packed_images_have_no_patches_of_their_own() -> None:
    sites = families.subject(family("qwen2_vl")).sites
    assert sites.pooling is None and "projector.patches" not in addresses(sites)
    with pytest.raises(AddressError, match="all images are in one sequence"):
        resolve_address(sites, "projector.patches")
