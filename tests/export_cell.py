"""One cell of `make bench-export`: write a model as ONNX files, or run one of them, and print what was found as JSON.

Of a rule two files are written: the model under it, and its ideal, which is the same rewritten graph with the tokens
that stay given as constants. It runs what is left of the model, and chooses nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import unloaded
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

import tokcompile
from tokcompile.capturing.capture import from_export
from tokcompile.models.catalogue import Family
from tokcompile.onnx_export.export import Exported, write
from tokcompile.recording import Recording, replay

WORDS = 40
"""Tokens of text in a prompt, beside those of the image."""
SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
QWEN2_05B = {
    "model_type": "qwen2",
    "vocab_size": 152000,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
SIGLIP_BASE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 512,
    "patch_size": 16,
}
SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49280,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
MODELS = {
    "LLaVA-OneVision-0.5B": Family(
        name="llava",
        kind="vlm",
        auto="AutoModelForImageTextToText",
        inputs="whole",
        options={"count": "image_seq_length"},
        config={
            "image_token_id": 151646,
            "image_seq_length": 729,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "tie_word_embeddings": True,
            "vision_config": SIGLIP_SO400M,
            "text_config": QWEN2_05B,
        },
    ),
    "SmolVLM-256M": Family(
        name="smolvlm",
        kind="vlm",
        auto="AutoModelForImageTextToText",
        inputs="tiles",
        options={"tiles": 17},
        config={
            "image_token_id": 49190,
            "scale_factor": 4,
            "tie_word_embeddings": True,
            "vision_config": SIGLIP_BASE,
            "text_config": SMOLLM2_135M,
        },
    ),
}
"""Models of the proportions of real ones, with random weights: an image of 729 tokens, and one of 17 tiles of 64."""


class Recorder(Interpreter):
    """Runs an exported program in eager mode and keeps the tokens that it chooses."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.graph_module)
        self.recording = Recording()
        self.arguments = list(arguments(program))

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if "token_map" in n.meta:
            self.recording.maps[n.meta["token_map"]] = value
        return value


def arguments(program: ExportedProgram) -> Iterator[Any]:
    """What the graph of a program takes when it is called with its example, in order."""
    given = iter(pytree.tree_leaves(program.example_inputs))
    held = {**program.state_dict, **program.constants}
    for spec in program.graph_signature.input_specs:
        yield next(given) if spec.kind == InputKind.USER_INPUT else held[spec.target]


def with_choices_given(program: ExportedProgram, recording: Recording) -> ExportedProgram:
    """A rewritten program with its token maps as constants, which an exported program takes as buffers."""
    held = from_export(program)
    replay(held, recording)
    first = next(iter(held.graph.nodes))
    specs, values = [], {}
    for node in [n for n in held.graph.nodes if n.op == "get_attr"]:
        target = str(node.target)
        values[target] = held.gm.get_buffer(target)
        with held.graph.inserting_before(first):
            lifted = held.graph.placeholder(f"b{target}")
        lifted.meta.update(node.meta)
        node.replace_all_uses_with(lifted)
        held.graph.erase_node(node)
        delattr(held.gm, target)
        specs.append(InputSpec(InputKind.BUFFER, TensorArgument(lifted.name), target, persistent=True))
    held.gm.recompile()
    signature = replace(program.graph_signature, input_specs=[*specs, *program.graph_signature.input_specs])
    return program._update(held.gm, signature, state_dict={**program.state_dict, **values})


@torch.no_grad()
def chosen(program: ExportedProgram, logits: int, path: Path) -> Recording:
    """The tokens that a program chooses for its example; writes the logits, its output of that number, beside."""
    runner = Recorder(program)
    np.save(path, runner.run(*runner.arguments)[logits].numpy())
    return runner.recording


def write_files(family: Family, rules: list[str], keep: str, folder: Path) -> dict[str, Any]:
    """Write a model as it is and under each rule; return how many tokens the last layer's cache holds in each file."""
    model = family.build()
    inputs = family.example(model, length=WORDS)
    np.savez(folder / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})
    exported = tokcompile.export(model, {**inputs, "logits_to_keep": 1})
    del model
    files: dict[str, Exported] = {}
    programs = {"full": exported, **{f"{rule}.pruned": tokcompile.rewrite(exported, rule, keep=keep) for rule in rules}}
    for name, program in programs.items():
        files[name] = write(program, folder / f"{name}.onnx", external_data=True)
    # Last, for constants fix sizes that a model finds in its images, and all programs share these.
    for rule in rules:
        program, expected = programs[f"{rule}.pruned"], folder / f"{rule}.npy"
        ideal = with_choices_given(program, chosen(program, list(files["full"].outputs).index("logits"), expected))
        files[f"{rule}.ideal"] = write(ideal, folder / f"{rule}.ideal.onnx", external_data=True)
    images = int((inputs["input_ids"] == family.config["image_token_id"]).sum())
    last = f"present.{family.config['text_config']['num_hidden_layers'] - 1}.key"
    return {"images": images, "tokens": {name: file.outputs[last][2] for name, file in files.items()}}


def run_file(path: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds of each round, by the clock and of processors, and how far logits are from PyTorch's where these are."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting would count as work
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    held = np.load(path.with_name("inputs.npz"))
    feed = {value.name: held[value.name] for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    spent = []
    for _ in range(rounds):
        start, worked = time.perf_counter(), time.process_time()
        out = session.run(names, feed)
        spent.append((time.perf_counter() - start, time.process_time() - worked))
    told = path.with_name(f"{path.name.partition('.')[0]}.npy")
    found = dict(zip(names, out, strict=True))["logits"]
    expected = np.load(told) if told.exists() else found
    return {"spent": spent, "apart": float(np.abs(found - expected).max() / np.abs(expected).max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    writes = commands.add_parser("write")
    writes.add_argument("model", choices=MODELS)
    writes.add_argument("folder", type=Path)
    writes.add_argument("--rules", nargs="+", required=True)
    writes.add_argument("--keep", required=True)
    writes.add_argument("--tiles", type=int, required=True)
    runs = commands.add_parser("run")
    runs.add_argument("file", type=Path)
    runs.add_argument("--rounds", type=int, required=True)
    runs.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    library = unloaded.declare_operators()
    if given.command == "write":
        family = MODELS[given.model]
        if "tiles" in family.options:
            family = family.model_copy(update={"options": {"tiles": given.tiles}})
        found = write_files(family, given.rules, given.keep, given.folder)
    else:
        found = run_file(given.file, given.rounds, given.threads)
    print(json.dumps(found))
    del library


if __name__ == "__main__":
    main()
