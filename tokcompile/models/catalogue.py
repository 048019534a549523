"""The catalogue of families: small models with random weights, from the classes of transformers and timm, as data.

    family("qwen3_moe").build()

A family is one line of `data/*.yaml`. What a line leaves out comes from the `defaults` of its file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from fnmatch import fnmatch
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from tokcompile.errors import TokredError, known
from tokcompile.models.dit import DiT
from tokcompile.models.families import scaled_init
from tokcompile.models.inputs import images as image_inputs
from tokcompile.models.inputs import pixels, sequences, text
from tokcompile.models.inputs import videos as video_inputs
from tokcompile.models.inputs.prompt import Pair

DATA = Path(__file__).parent / "data"
INPUTS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "text": text.text,
    "pixels": pixels.pixels,
    "latents": pixels.latents,
    "encoder_text": sequences.encoder_text,
    "text_to_text": sequences.text_to_text,
    "speech_to_text": sequences.speech_to_text,
    "whole": image_inputs.whole,
    "crops": image_inputs.crops,
    "sized": image_inputs.sized,
    "patches": image_inputs.patches,
    "tiles": image_inputs.tiles,
    "aspects": image_inputs.aspects,
    "pooled": image_inputs.pooled,
}
"""Makers of example inputs, by the name that a family gives as `inputs`."""
VIDEOS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "frames": video_inputs.frames,
    "patches": video_inputs.patches,
    "pooled": video_inputs.pooled,
}
"""Makers of example inputs with videos, by the name that a family gives as `inputs` of its `videos`."""
LOCAL: dict[str, Callable[..., nn.Module]] = {"DiT": DiT}
"""Classes of this package, by the name that a family of `source: local` gives as `auto`."""


class Videos(BaseModel):
    """How a family takes videos.

    Attributes:
        inputs: which of `VIDEOS` makes its example inputs.
        options: further arguments of that maker.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: str
    options: dict[str, Any] = {}


class Family(BaseModel):
    """One family.

    Attributes:
        name: its line's name, which is transformers' model type unless `type` says otherwise.
        kind: which stacks it has.
        source: where its class is from.
        auto: the class of transformers that makes the model from a configuration, or the local class; none for timm.
        inputs: which of `INPUTS` makes its example inputs.
        config: of the configuration; a mapping inside is a configuration inside.
        options: further arguments of the maker of inputs.
        videos: how it takes videos; none if it does not, or as images alone.
        fill: values of parameters, by a pattern of their names, such as of gates that are closed at the start.
        attributes: values of attributes, for every module that has one of that name.
        needs: the module that it needs beside transformers, or one of transformers that not every version has.
        about: what is special about it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["decoder", "vlm", "vision", "encoder", "encoder-decoder", "diffusion"]
    source: Literal["transformers", "timm", "local"] = "transformers"
    auto: str = ""
    inputs: str
    type: str = ""
    config: dict[str, Any] = {}
    options: dict[str, Any] = {}
    videos: Videos | None = None
    fill: dict[str, float] = {}
    attributes: dict[str, Any] = {}
    needs: str = ""
    about: str = ""

    def build(self, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The model with random weights, in eval mode.

        Raises:
            TokredError: the module that it needs cannot be imported.
        """
        needs = self.needs or "transformers"
        try:
            # RuntimeError: what a torchvision that was built for another torch raises.
            import_module(needs)
        except (ImportError, RuntimeError) as error:
            raise TokredError(
                f"the family '{self.name}' needs {needs}, which cannot be imported",
                found=str(error),
                remedy=_remedy(needs),
            ) from error
        # A bias that a library leaves as torch drew it is to be the same for the same seed, too.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self._model()
        scaled_init(model, seed)
        for name, parameter in model.named_parameters():
            for pattern, value in self.fill.items():
                if fnmatch(name, pattern):
                    nn.init.constant_(parameter, value)
        for module in model.modules():
            for name, value in self.attributes.items():
                if hasattr(module, name):
                    setattr(module, name, value)
        return model.eval().to(dtype)

    def _model(self) -> nn.Module:
        if self.source == "local":
            return LOCAL[self.auto](**self.config)
        if self.source == "timm":
            return import_module("timm").create_model(self.type, pretrained=False, **self.config)
        transformers = import_module("transformers")
        # Some configurations write what they work out into the mappings that they are given.
        config = transformers.AutoConfig.for_model(self.type or self.name, **deepcopy(self.config))
        maker = getattr(transformers, self.auto)
        return maker.from_config(config) if self.auto.startswith("Auto") else maker(config)

    def example(
        self,
        model: nn.Module,
        batch: int = 1,
        padded: bool = False,
        length: int = 17,
        seed: int = 0,
        images: int = 1,
        videos: int = 0,
        image: Pair | None = None,
    ) -> dict[str, Tensor]:
        """Arguments of the model's forward, the same for the same seed.

        Args:
            model: what `build` returned, or any other model of the family's class.
            batch: rows.
            padded: rows of a text have different lengths, padded on the left, or an encoder's on the right.
            length: tokens of text.
            seed: of the random tokens and pixels.
            images: in each row of a text, where there are any. With 0, a vision-language model is given text only:
                input_ids and attention_mask, int64 [batch, length].
            videos: in each row of a text, rather than images, which must then be 0.
            image: height and width in pixels of every image, where a family takes images of any size; small ones of
                several sizes by default.

        Raises:
            TokredError: the family takes no videos, or images are asked for beside them; or no image of that size.
        """
        given = {"batch": batch, "padded": padded, "length": length, "seed": seed}
        if videos:
            return self._with_videos(model, images, videos, given)
        if self.kind == "vlm" and images == 0:
            return text.text(model, **given)
        maker = INPUTS[self.inputs]
        more = {"images": images} if "images" in inspect.signature(maker).parameters else {}
        options = self.options if image is None else image_inputs.of_size(model, self.options, image)
        return maker(model, **given, **more, **options)

    def _with_videos(self, model: nn.Module, images: int, videos: int, given: dict[str, Any]) -> dict[str, Tensor]:
        if self.videos is None:
            taking = ", ".join(sorted(name for name, other in families().items() if other.videos))
            raise TokredError(f"the family '{self.name}' takes no videos", remedy=f"a family that does: {taking}")
        if images:
            raise TokredError(
                "an example has images or videos, not both",
                found=f"images={images}, videos={videos}",
                remedy="images=0",
            )
        return VIDEOS[self.videos.inputs](model, **given, videos=videos, **self.videos.options)


def _remedy(needs: str) -> str:
    """What to do about a module that cannot be imported."""
    package, _, part = needs.partition(".")
    if part and find_spec(package) is not None:
        return f"pip install --upgrade {package}; {version(package)} has no {part}"
    return f"pip install {package}; all that comes with it must be built for torch {torch.__version__}"


@cache
def families() -> dict[str, Family]:
    """Every family of the catalogue, by name."""
    found: dict[str, Family] = {}
    for path in sorted(DATA.glob("*.yaml")):
        data = yaml.safe_load(path.read_text())
        for name, line in data["families"].items():
            found[name] = Family(name=name, **_merged(data["defaults"], line or {}))
    return found


def _merged(defaults: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    out = {**defaults, **line}
    for key in defaults.keys() & line.keys():
        if isinstance(defaults[key], dict) and isinstance(line[key], dict):
            out[key] = _merged(defaults[key], line[key])
    return out


def family(name: str) -> Family:
    """One family.

    Raises:
        TokredError: there is none of that name; the error lists those there are.
    """
    if name not in families():
        raise TokredError(f"the catalogue has no family '{name}'", remedy=known(name, families()))
    return families()[name]


def of_type(model_type: str) -> Family | None:
    """The family of transformers' models of a type; None where the catalogue has none."""
    of = (line for line in families().values() if line.source == "transformers")
    return next((line for line in of if (line.type or line.name) == model_type), None)
