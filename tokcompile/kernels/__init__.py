"""The `tokred::` operators. Importing this package registers them as `torch.ops.tokred.NAME`; one file each."""

from __future__ import annotations

if __name__ == "tokcompile.kernels":
    # Under the link at the top level of the repository the name is `kernels`, which transformers looks for when the
    # repository is on the path: nothing is registered then.
    from ._library import define, names, reference_of
    from .attention import attention
    from .attention_received import attention_received
    from .attention_row import attention_row
    from .dilate import dilate
    from .dilate_by_width import dilate_by_width
    from .fill_mask import fill_mask
    from .gather_tokens import gather_tokens
    from .inverse_map import inverse_map
    from .kept_indices import kept_indices
    from .last_valid import last_valid
    from .match_pairs import match_pairs
    from .merge_pairs import merge_pairs
    from .phase_scan import phase_scan
    from .random_scores import random_scores
    from .slot_positions import slot_positions
    from .splice_values import splice_values
    from .token_cosine import token_cosine
    from .token_norm import token_norm
    from .token_source import token_source
    from .topk_mask import topk_mask
    from .variable_positions import variable_positions

__all__ = [
    "attention",
    "attention_received",
    "attention_row",
    "define",
    "dilate",
    "dilate_by_width",
    "fill_mask",
    "gather_tokens",
    "inverse_map",
    "kept_indices",
    "last_valid",
    "match_pairs",
    "merge_pairs",
    "names",
    "phase_scan",
    "random_scores",
    "reference_of",
    "slot_positions",
    "splice_values",
    "token_cosine",
    "token_norm",
    "token_source",
    "topk_mask",
    "variable_positions",
]
