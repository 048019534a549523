"""The `tokred::` operators. Importing this package registers them as `torch.ops.tokred.NAME`; one file each."""

from __future__ import annotations

if __name__ == "tokcompile.kernels":
    # Under the link at the top level of the repository the name is `kernels`, which transformers looks for when the
    # repository is on the path: nothing is registered then.
    from . import attend_chosen, attend_with_sums, gather_many, mark_pack, received_by_sums, turned_votes  # noqa: F401
    from ._library import define, joint_names, kernel_fault, kernel_names, kernel_op, names, reference_of
    from .add_tokens import add_tokens
    from .alike import alike
    from .assign_keys import assign_keys
    from .attend import attend
    from .attend_after import attend_after
    from .attend_owned import attend_owned
    from .attention import attention
    from .attention_received import attention_received
    from .attention_row import attention_row
    from .clear_slots import clear_slots
    from .clip_source import clip_source
    from .clip_stays import clip_stays
    from .close_gaps import close_gaps
    from .cluster_labels import cluster_labels
    from .cluster_slots import cluster_slots
    from .density_peaks import density_peaks
    from .dilate import dilate
    from .dilate_by_width import dilate_by_width
    from .elbow import elbow
    from .end_places import end_places
    from .farthest_mask import farthest_mask
    from .fill_mask import fill_mask
    from .first_members import first_members
    from .flagged_tokens import flagged_tokens
    from .gather_keys import gather_keys
    from .gather_mask import gather_mask
    from .gather_pairs import gather_pairs
    from .gather_tokens import gather_tokens
    from .held_slots import held_slots
    from .image_starts import image_starts
    from .insert_tokens import insert_tokens
    from .inserted_source import inserted_source
    from .inverse_map import inverse_map
    from .join_key_scores import join_key_scores
    from .keep_keys import keep_keys
    from .keep_pairs import keep_pairs
    from .kept_indices import kept_indices
    from .key_attention import key_attention
    from .key_cosine import key_cosine
    from .key_positions import key_positions
    from .key_viewers import key_viewers
    from .key_votes import key_votes
    from .kmeans_assign import kmeans_assign
    from .last_valid import last_valid
    from .listed_tokens import listed_tokens
    from .long_runs import long_runs
    from .mark_slots import mark_slots
    from .mark_tokens import mark_tokens
    from .masked_mean import masked_mean
    from .match_pairs import match_pairs
    from .matching_tokens import matching_tokens
    from .mean_query import mean_query
    from .merge_clips import merge_clips
    from .merge_keys import merge_keys
    from .merge_pairs import merge_pairs
    from .merge_weights import merge_weights
    from .mix_tokens import mix_tokens
    from .nearest_distance import nearest_distance
    from .nearest_tokens import nearest_tokens
    from .original_places import original_places
    from .pair_owners import pair_owners
    from .pair_scores import pair_scores
    from .pairwise_keys import pairwise_keys
    from .phase_scan import phase_scan
    from .pool_matrix import pool_matrix
    from .random_keys import random_keys
    from .random_scores import random_scores
    from .real_keys import real_keys
    from .reuse_keys import reuse_keys
    from .seen_keys import seen_keys
    from .slot_means import slot_means
    from .slot_positions import slot_positions
    from .slot_source import slot_source
    from .smooth_keys import smooth_keys
    from .splice_values import splice_values
    from .strided_tokens import strided_tokens
    from .super_token_affinity import super_token_affinity
    from .super_token_pool import super_token_pool
    from .super_token_spread import super_token_spread
    from .token_cosine import token_cosine
    from .token_distances import token_distances
    from .token_norm import token_norm
    from .token_source import token_source
    from .topk_mask import topk_mask
    from .transport_cost import transport_cost
    from .transport_cost_over_time import transport_cost_over_time
    from .transport_plan import transport_plan
    from .transport_weights import transport_weights
    from .turn_pairs import turn_pairs
    from .unturn_keys import unturn_keys
    from .variable_positions import variable_positions
    from .window_topk_mask import window_topk_mask

__all__ = [
    "add_tokens",
    "alike",
    "assign_keys",
    "attend",
    "attend_after",
    "attend_owned",
    "attention",
    "attention_received",
    "attention_row",
    "clear_slots",
    "clip_source",
    "clip_stays",
    "close_gaps",
    "cluster_labels",
    "cluster_slots",
    "define",
    "density_peaks",
    "dilate",
    "dilate_by_width",
    "elbow",
    "end_places",
    "farthest_mask",
    "fill_mask",
    "first_members",
    "flagged_tokens",
    "gather_keys",
    "gather_mask",
    "gather_pairs",
    "gather_tokens",
    "held_slots",
    "image_starts",
    "insert_tokens",
    "inserted_source",
    "inverse_map",
    "join_key_scores",
    "joint_names",
    "keep_keys",
    "keep_pairs",
    "kept_indices",
    "kernel_fault",
    "kernel_names",
    "kernel_op",
    "key_attention",
    "key_viewers",
    "key_cosine",
    "key_positions",
    "key_votes",
    "kmeans_assign",
    "last_valid",
    "listed_tokens",
    "long_runs",
    "mark_slots",
    "mark_tokens",
    "masked_mean",
    "match_pairs",
    "mean_query",
    "matching_tokens",
    "merge_clips",
    "merge_keys",
    "merge_pairs",
    "merge_weights",
    "mix_tokens",
    "names",
    "nearest_distance",
    "nearest_tokens",
    "original_places",
    "pair_owners",
    "pair_scores",
    "pairwise_keys",
    "phase_scan",
    "pool_matrix",
    "random_keys",
    "random_scores",
    "real_keys",
    "reference_of",
    "reuse_keys",
    "seen_keys",
    "slot_means",
    "slot_positions",
    "slot_source",
    "smooth_keys",
    "splice_values",
    "strided_tokens",
    "super_token_affinity",
    "super_token_pool",
    "super_token_spread",
    "token_cosine",
    "token_distances",
    "token_norm",
    "token_source",
    "topk_mask",
    "transport_cost",
    "transport_cost_over_time",
    "transport_plan",
    "transport_weights",
    "turn_pairs",
    "unturn_keys",
    "variable_positions",
    "window_topk_mask",
]
