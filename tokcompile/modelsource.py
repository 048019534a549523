"""Models that the command line names: `zoo:NAME`, or a Hugging Face folder or id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch._subclasses import FakeTensorMode

from tokcompile.binding import RuleInstance
from tokcompile.capturing.buffers import fixed_length
from tokcompile.capturing.capture import capture
from tokcompile.errors import CaptureError, RuleError, TokredError, known
from tokcompile.exampleinputs import Size, example_inputs, needs_no_size, text_inputs
from tokcompile.program import Program
from tokcompile.report import Explanation, explain

ZOO = "zoo:"
Result = TypeVar("Result")
SMALL = 500_000_000
"""Parameters up to which a model that is not one graph may be built with random weights, to be run piece by piece."""


@dataclass(frozen=True)
class Source:
    """A model and example inputs of its forward.

    Attributes:
        name: as the user wrote it.
        weights: `zoo`, as the zoo has them; `own`, as a folder or the hub has them; `random`; `none` where a model was
            built as shapes alone.
        image: height and width in pixels of its image, where someone chose them.
    """

    name: str
    model: torch.nn.Module
    inputs: dict[str, Any]
    weights: str
    image: Size | None = None


def load_source(name: str, batch: int = 1, image: Size | None = None) -> Source:
    """Build the model that a user names, with example inputs of one image or one short text.

    A Hugging Face model is built from its configuration as shapes alone: sites and costs need no weights, so none are
    downloaded.

    Args:
        name: zoo:NAME, a folder or an id.
        batch: rows of the inputs.
        image: height and width in pixels of the image, for a model that takes images of any size.

    Raises:
        TokredError: there is no such model, no inputs are known for its kind, or it takes no image of that size.
    """
    if name.startswith(ZOO):
        return _zoo(name, batch, image)
    return from_config(_config(name), name, batch, image=image)


def with_weights(name: str, batch: int = 1) -> Source:
    """Load the model that a user names with its weights, and example inputs as `load_source` makes them.

    Raises:
        TokredError: there is no such model, it cannot be read, or no inputs are known for its kind.
    """
    if name.startswith(ZOO):
        return load_source(name, batch)
    kind = _class(_config(name))
    try:
        model = kind.from_pretrained(name).eval()
    except Exception as error:  # whatever the hub, a proxy or a broken file raises
        raise RuleError(
            f"the weights of '{name}' cannot be loaded",
            found=f"{type(error).__name__}: {error}"[:300],
            remedy="zoo:NAME, or a folder or an id with weights",
        ) from error
    return Source(name, model, example_inputs(model, batch), "own")


def _zoo(name: str, batch: int, image: Size | None) -> Source:
    from tokcompile.models import catalogue, listing, zoo

    short = name.removeprefix(ZOO)
    if short in catalogue.families():
        family = catalogue.family(short)
        model = family.build()
        return Source(name, model, family.example(model, batch=batch, image=image), "random", image)
    if short not in zoo.ZOO:
        remedy = known(short, [line.name for line in listing.lines()], listing="`tokred models` lists them all")
        raise TokredError(f"the zoo has no model '{short}'", remedy=remedy)
    try:
        loaded = zoo.load(short)
    except OSError as error:
        raise RuleError(
            f"the weights of '{name}' are not here",
            found=str(error).splitlines()[0][:300],
            remedy="make train, for the model of the demo",
        ) from error
    if loaded.entry.on_meta:
        return from_config(loaded.model.config, name, batch, image=image or loaded.entry.image)
    needs_no_size(loaded.model, image)
    return Source(name, loaded.model, loaded.example(batch=batch), "zoo")


def _config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # whatever the hub, a proxy or a broken file raises: the user needs one sentence
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        why = "this folder holds no readable config.json" if Path(name).is_dir() else "no folder or model of that name"
        raise RuleError(
            f"model '{name}' cannot be loaded: {why}",
            found=reason[:300],
            remedy="zoo:NAME, a folder with a config.json, or a Hugging Face id (with network or in the local cache)",
        ) from error


def from_config(
    config: Any,
    name: str,
    batch: int = 1,
    *,
    weights: bool = False,
    image: Size | None = None,
    device: str = "cpu",
) -> Source:
    """Build a model from a transformers configuration, as shapes alone or with random weights, and inputs for it.

    Args:
        config, name: of the model.
        batch, image: as for `load_source`.
        weights: draw random ones, on `device`.

    Raises:
        TokredError: transformers has no model for it, or no inputs are known for its kind.
    """
    from transformers.initialization import no_init_weights

    # Fake values rather than the meta device: a cache that starts empty does not trace there. Nothing is drawn for
    # them: some models look at what they draw.
    how = (torch.device(device),) if weights else (FakeTensorMode(), no_init_weights())
    with torch.no_grad(), ExitStack() as stack:
        for each in how:
            stack.enter_context(each)
        try:
            model = _class(config)._from_config(config).eval()
        except TokredError:
            raise
        except Exception as error:
            raise RuleError(
                f"transformers cannot build the model '{name}'",
                found=f"{type(error).__name__}: {error}"[:300],
                remedy="check its configuration with transformers.AutoModel.from_config",
            ) from error
    return Source(name, model, example_inputs(model, batch, image), "random" if weights else "none", image)


def _class(config: Any) -> Any:
    import transformers

    for named in getattr(config, "architectures", None) or ():
        found = getattr(transformers, named, None)
        if found is not None:
            return found
    autos = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForImageClassification", "AutoModel")
    for auto in autos:
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, (tuple, list)) else found
    raise RuleError(f"transformers has no model for '{config.model_type}'", remedy="use a model that transformers has")


def capture_source(source: Source) -> tuple[Source, list[Program]]:
    """Capture a source.

    One without weights that is not one graph is built with some if it is small, and run; a family that cannot be traced
    on one row is tried on two, for a size of 1 is special to the tracer.

    Raises:
        TokredError: it cannot be captured.
    """
    return _tried(source, lambda s: (s, capture(s.model, s.inputs)))


def capture_at(source: Source, length: int) -> tuple[Source, list[Program], dict[str, torch.Tensor]]:
    """Capture a source as `capture_source` does, with the rotary frequencies that it has for one length.

    Returns:
        What was captured, its programs, and buffers by path that are computed anew for that length.
    """

    def use(tried: Source) -> tuple[Source, list[Program], dict[str, torch.Tensor]]:
        with fixed_length(tried.model, length) as fixed:
            return tried, capture(tried.model, tried.inputs), fixed

    return _tried(source, use)


def explain_source(source: Source, rules: Sequence[RuleInstance]) -> Explanation:
    """Explain rules on a source, which is captured as by `capture_source`."""
    return _tried(source, lambda s: explain(s.model, s.inputs, rules, name=s.name))


def _tried(source: Source, use: Callable[[Source], Result]) -> Result:
    try:
        return use(source)
    except CaptureError:
        if source.weights == "none":
            return use(runnable(source))
        if source.weights == "random" and _rows(source) == 1:
            return use(load_source(source.name, batch=2, image=source.image))
        raise


def _rows(source: Source) -> int:
    return next(iter(source.inputs.values())).shape[0]


def runnable(source: Source) -> Source:
    """The same model with random weights, where it is small enough to run piece by piece.

    Raises:
        CaptureError: it is too large.
    """
    count = sum(p.numel() for p in source.model.parameters())
    if count > SMALL:
        raise CaptureError(
            f"'{source.name}' does not capture as one graph",
            found=f"{count:,} parameters",
            remedy="run it with weights: tokcompile.report.explain(model, inputs, rules)",
        )
    return from_config(source.model.config, source.name, _rows(source), weights=True, image=source.image)


def samples(name: str, text: Path | None, count: int, length: int) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """Build a model with its weights, and batches of one row each of what it is to read.

    Args:
        name: a Hugging Face folder or id, which needs a text; or zoo:NAME, which has no tokenizer and reads random
            tokens.
        text: a file; its tokens are cut into pieces, evenly spread.
        count, length: how many pieces of how many tokens.

    Raises:
        RuleError: there is no such model, no text, one of fewer tokens, or one where there is no tokenizer.
    """
    if name.startswith(ZOO):
        if text is not None:
            raise RuleError(f"'{name}' has no tokenizer for a text", remedy="leave --text out")
        model = load_source(name).model
        config = model.config.get_text_config()
        rng = torch.Generator().manual_seed(0)
        rows = torch.randint(0, config.vocab_size, (count, 1, length), generator=rng)
        return model, [text_inputs(row) for row in rows]
    if text is None:
        raise RuleError(f"'{name}' needs a text to read", remedy="--text FILE, of the kind that the model is used on")
    return _reader(name, text, count, length)


def _reader(name: str, text: Path, count: int, length: int) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        words = text.read_text(encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name).eval()
    except Exception as error:  # whatever the hub, a proxy or a broken file raises
        raise RuleError(
            f"model '{name}' cannot be loaded to read '{text}'",
            found=f"{type(error).__name__}: {error}"[:300],
            remedy="a folder or an id with weights and a tokenizer, and a file of UTF-8 text",
        ) from error
    ids = tokenizer(words, return_tensors="pt")["input_ids"][0]
    if len(ids) < length:
        raise RuleError(f"'{text}' is too short", found=f"{len(ids)} tokens", remedy=f"--length {len(ids)} or less")
    last = len(ids) - length
    starts = [last * i // max(count - 1, 1) for i in range(count)]
    return model, [text_inputs(ids[None, start : start + length]) for start in dict.fromkeys(starts)]
