"""A runtime that knows nothing of PyTorch: answers questions by two ONNX files, with onnxruntime and NumPy alone.

Arguments: the prompt's file, the step's file, and an .npz with `input_ids` and `pixel_values`. Writes generated tokens
as JSON.
"""

import json
import sys

import numpy as np
import onnxruntime

prefill, decode = (onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in sys.argv[1:3])
given = np.load(sys.argv[3])


def call(session, values):
    names = [value.name for value in session.get_outputs()]
    feed = {value.name: values[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, feed), strict=True))


ids = given["input_ids"]
mask = np.ones_like(ids)
places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
out = call(
    prefill,
    {"input_ids": ids, "attention_mask": mask, "position_ids": places, "pixel_values": given["pixel_values"]},
)
tokens = [out["logits"][:, -1].argmax(-1)]
for step in range(2):
    mask = np.concatenate([mask, mask[:, :1]], 1)
    past = {name.replace("present", "past"): value for name, value in out.items()}
    place = np.full((len(ids), 1), ids.shape[1] + step)
    step_inputs = {"input_ids": tokens[-1][:, None], "attention_mask": mask, "position_ids": place}
    out = call(decode, {**past, **step_inputs})
    tokens.append(out["logits"][:, -1].argmax(-1))

assert not {"torch", "transformers", "tokcompile"} & set(sys.modules)
json.dump(np.stack(tokens, 1).tolist(), sys.stdout)
