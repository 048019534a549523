"""A runtime that knows nothing of PyTorch: answers questions by two ONNX files, with onnxruntime and NumPy alone.

Arguments: the prompt's file, the step's file, an .npz to read with `input_ids` and `pixel_values`, an .npz to write,
and how many rows are asked at once. Writes `tokens`, int64 [B, 3], that were generated, and `logits`, float32
[B, T, V], of the prompts.
"""

import sys

import numpy as np
import onnxruntime

prefill, decode = (onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in sys.argv[1:3])
given, rows = np.load(sys.argv[3]), int(sys.argv[5])


def call(session, values):
    names = [value.name for value in session.get_outputs()]
    feed = {value.name: values[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, feed), strict=True))


def answers(ids, pixels):
    mask = np.ones_like(ids)
    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    out = call(prefill, {"input_ids": ids, "attention_mask": mask, "position_ids": places, "pixel_values": pixels})
    logits, tokens = out["logits"], [out["logits"][:, -1].argmax(-1)]
    for step in range(2):
        mask = np.concatenate([mask, mask[:, :1]], 1)
        past = {name.replace("present", "past"): value for name, value in out.items()}
        place = np.full((len(ids), 1), ids.shape[1] + step)
        step_inputs = {"input_ids": tokens[-1][:, None], "attention_mask": mask, "position_ids": place}
        out = call(decode, {**past, **step_inputs})
        tokens.append(out["logits"][:, -1].argmax(-1))
    return np.stack(tokens, 1), logits


ids, pixels = given["input_ids"], given["pixel_values"]
found = [answers(ids[start : start + rows], pixels[start : start + rows]) for start in range(0, len(ids), rows)]
np.savez(sys.argv[4], tokens=np.concatenate([t for t, _ in found]), logits=np.concatenate([x for _, x in found]))
assert not {"torch", "transformers", "tokcompile"} & set(sys.modules)
