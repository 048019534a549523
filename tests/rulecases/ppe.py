"""Clusters with several positions each, on the models of the fleet."""

import math
from fractions import Fraction
from typing import Any

import fleet
import naive
import torch
from clustering_naive import decode, labels_by_loops, means, peaks_by_loops, slots_by_loops
from torch import Tensor, nn
from turned import turned

from rulecases import RuleCase

SLOTS = 4


def _run(model: nn.Module, inputs: dict[str, Tensor], keep: Any) -> naive.Ran:
    ids = inputs["input_ids"]
    with torch.no_grad():
        images = model.model.multi_modal_projector(naive.vision_features(model, inputs["pixel_values"]))
    streams, valids, members, middles, kept = [], [], [], [], []
    for b, x in enumerate(images):
        count = keep if isinstance(keep, int) else math.ceil(Fraction(keep) * len(x))
        centres = peaks_by_loops(x.float(), count, 5)[0]
        labels = labels_by_loops(x.float(), centres)
        places = [i for i, token in enumerate(ids[b].tolist()) if token == fleet.IMAGE]
        start, end = places[0], places[-1] + 1
        with torch.no_grad():
            text = model.get_input_embeddings()(ids[b])
        streams.append(torch.cat([text[:start], means(x, labels, count), text[end:]]))
        middles.append(centres)
        kept.append([*range(start), *sorted(places[c] for c in centres), *range(end, ids.shape[1])])
        valids.append(inputs["attention_mask"][b].bool()[kept[-1]])
        merged = [[places[m] for m in row] for row in slots_by_loops(x.float(), centres, labels, SLOTS)]
        alone = [[i] * SLOTS for i in range(ids.shape[1])]
        members.append(alone[:start] + merged + alone[end:])
    at = torch.tensor(members)  # [B, T', K], and the model counts places from 0 on

    def angles(x: Tensor, position_ids: Tensor, inverse: Tensor) -> Tensor:
        share = len(inverse) // SLOTS
        return torch.stack([at[..., j // share] * f for j, f in enumerate(inverse.float())], -1)[:, None]

    hidden = torch.stack(streams)
    with turned(model, angles):
        logits = decode(model, hidden, torch.stack(valids), torch.zeros(hidden.shape[:2], dtype=torch.long))
    return naive.Ran(logits, [middles, kept], [hidden.shape[1]] * model.config.get_text_config().num_hidden_layers)


CASE = RuleCase(
    models=fleet.VLMS,
    options=lambda model, keep: {"keep": keep, "slots": SLOTS},
    run=_run,
    tolerance=1e-5,
    coarse=0.1,
)
