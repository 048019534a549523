"""Train `zoo:llava-digits`: python -m tokcompile.models.recipe_llava_digits

One command, seeded and resumable. Stage 1 teaches the vision tower and the projector to name the colour and the
digit of each patch under a linear head that is thrown away. Stage 2 teaches the decoder to answer questions, four
per canvas in one sequence, first with the vision tower frozen and then with all weights. Stages 3 and 4 are the
same again, with nine digits a canvas for the tower, and milder distortions. Nothing is pruned in training: every
image token is there in every step.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import GenerationConfig, LlavaForConditionalGeneration

from . import digits
from .families import llava
from .wordtokenizer import save_tokenizer

VISION = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": digits.IMAGE_SIZE,
    "patch_size": digits.PATCH_SIZE,
    "projection_dim": 128,
}
TEXT = {
    "vocab_size": len(digits.VOCABULARY),
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": digits.BOS,
    "eos_token_id": digits.EOS,
    "pad_token_id": digits.PAD,
}
TURN = 6
"""Tokens of one turn: which digit is COLOUR DIGIT <eos>."""
SAVE_EVERY_S = 100.0
LOG_EVERY = 50


@dataclass(frozen=True)
class Settings:
    """What one run of the recipe does."""

    out: Path
    work: Path
    seed: int = 0
    steps1: int = 1500
    steps2: int = 1600
    steps3: int = 1200
    steps4: int = 700
    batch1: int = 16
    batch2: int = 16
    frozen: float = 0.5
    test_canvases: int = 1000


@dataclass(frozen=True)
class Stage:
    """One stage: its loss takes (step, batch) and returns the loss and a short accuracy to show."""

    name: str
    steps: int
    batch: int
    groups: list[dict]
    loss: Callable[[int, int], tuple[Tensor, float]]
    floor: float


@torch.no_grad()
def build_model(seed: int) -> LlavaForConditionalGeneration:
    """The model of the recipe with fresh weights.

    Its tower starts with patch filters that mostly see shape rather than mean brightness, with places on the grid
    that are near each other having similar embeddings, and with small steps of the residual stream.
    """
    model = llava(VISION, TEXT, seed=seed, image_token_index=digits.IMAGE, vision_feature_layer=-1)
    tower = model.model.vision_tower
    filters = tower.get_input_embeddings().weight
    shape = filters[VISION["hidden_size"] // 4 :]
    shape.sub_(shape.mean((2, 3), keepdim=True)).mul_(2.5)
    for name, parameter in tower.named_parameters():
        if name.endswith("position_embedding.weight"):
            parameter[1:] = 0.7 * grid_waves(VISION["hidden_size"])
        elif name.endswith(("out_proj.weight", "fc2.weight")):
            parameter.mul_(0.35)
    return model


def grid_waves(width: int) -> Tensor:
    """Sines and cosines of the row and the column of each patch: float32 [196, width]."""
    rates = torch.linspace(math.log(0.9 * math.pi), math.log(math.pi / 16), width // 4).exp()
    phase = torch.arange(digits.GRID)[:, None] * rates
    wave = torch.cat([phase.sin(), phase.cos()], dim=1)
    shape = (digits.GRID, digits.GRID, width // 2)
    return torch.cat([wave[:, None].expand(shape), wave.expand(shape)], dim=-1).flatten(0, 1)


def image_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Projected image tokens [n, 196, 128] of pixel_values [n, 3, 112, 112]."""
    return torch.stack(list(model.get_image_features(pixel_values).pooler_output))


def digit_scores(scores: Tensor, owners: Tensor, count: int) -> Tensor:
    """Scores of each digit [n, count, 10]: the mean of its patches' `scores` [n, 196, 10] by `owners` [n, 196]."""
    mine = F.one_hot(owners, count + 1)[..., :-1].float()
    total = torch.einsum("npc,npd->ncd", mine, scores)
    return total / mine.sum(1).clamp(min=1)[..., None]


def patch_loss(logits: Tensor, canvases: digits.Canvases) -> tuple[Tensor, float]:
    """Loss and digit accuracy of logits [n, 196, 5 + 10] on canvases.

    The first five logits are the colour or none, the other ten the digit. The digit is asked of each inked patch
    alone and of the mean over the patches of a digit; the accuracy is the latter's.
    """
    colours, labels, shown = len(digits.COLOURS), canvases.patch_labels, canvases.labels
    inked = labels < digits.BACKGROUND
    weight = torch.ones(colours + 1)
    weight[colours] = 0.3
    colour = F.cross_entropy(logits[..., : colours + 1].flatten(0, 1), (labels // 10).flatten(), weight)
    alone = F.cross_entropy(logits[inked][:, colours + 1 :], labels[inked] % 10)
    together = digit_scores(logits[..., colours + 1 :], canvases.owners, shown.shape[1]).flatten(0, 1)
    right = (together.argmax(-1) == shown.flatten()).float().mean()
    return colour + alone + F.cross_entropy(together, shown.flatten()), right.item()


def conversations(labels: Tensor, order: Tensor) -> Tensor:
    """int64 [n, 221]: the image and four turns, asking for the colours `order` [n, 4] of digits `labels` [n, 4]."""
    n, turns = order.shape
    first = digits.prompts(order[:, 0])
    turn = first[:, None, -(TURN - 2) :].repeat(1, turns, 1)
    turn[..., -1] = order + digits.TOKEN[digits.COLOURS[0]]
    answer = labels.gather(1, order) + digits.TOKEN["0"]
    turn = torch.cat([turn, answer[..., None], torch.full_like(answer, digits.EOS)[..., None]], dim=-1)
    return torch.cat([first[:, : 1 + digits.IMAGE_TOKENS], turn.flatten(1)], dim=1)


def answer_loss(logits: Tensor, ids: Tensor) -> tuple[Tensor, float]:
    """Loss on answers (and, lightly, on <eos>) and accuracy, of the last 4 * TURN logits of conversations `ids`."""
    length = logits.shape[1]
    turns = logits.unflatten(1, (-1, TURN))
    words = ids[:, -length:].unflatten(1, (-1, TURN))
    answer, end = turns[:, :, -3].flatten(0, 1), turns[:, :, -2].flatten(0, 1)
    target = words[:, :, -2].flatten()
    loss = F.cross_entropy(answer, target) + 0.05 * F.cross_entropy(end, words[:, :, -1].flatten())
    return loss, (answer.argmax(-1) == target).float().mean().item()


def learning_rate(step: int, steps: int, floor: float, warmup: int = 60) -> float:
    """Share of the full rate: a linear start, then a cosine down to `floor`."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * cosine)


class Recipe:
    """The model in training, with its stages, its work folder and its progress."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.console = Console(force_terminal=None if sys.stdout.isatty() else False, highlight=False)
        torch.manual_seed(settings.seed)
        self.model = build_model(settings.seed)
        self.head = nn.Linear(TEXT["hidden_size"], len(digits.COLOURS) + 1 + len(digits.DIGITS))
        self.seconds = dict.fromkeys(("patches", "answers", "crowds", "refined"), 0.0)
        self.state_file = settings.work / "state.pt"

    @property
    def tower(self) -> nn.Module:
        return self.model.model.vision_tower

    @property
    def projector(self) -> nn.Module:
        return self.model.model.multi_modal_projector

    def patches(self, step: int, batch: int) -> tuple[Tensor, float]:
        """Stage 1: name the colour and the digit of each patch."""
        canvases = digits.canvases("train", batch, self._seed(1, step))
        logits = self.head(image_features(self.model, canvases.pixel_values))
        return patch_loss(logits, canvases)

    def crowds(self, step: int, batch: int) -> tuple[Tensor, float]:
        """Stage 3: stage 1 again on canvases of nine digits, distorted half as much."""
        self.tower.requires_grad_(True)
        canvases = digits.crowded(batch, self._seed(3, step), distort=0.5)
        logits = self.head(image_features(self.model, canvases.pixel_values))
        return patch_loss(logits, canvases)

    def refined(self, step: int, batch: int) -> tuple[Tensor, float]:
        """Stage 4: stage 2 again with all weights, on canvases distorted half as much."""
        return self._converse(digits.canvases("train", batch, self._seed(4, step), distort=0.5), self._seed(4, step))

    def answers(self, step: int, batch: int) -> tuple[Tensor, float]:
        """Stage 2: answer a question about each colour, in random order."""
        self.tower.requires_grad_(step >= self.settings.frozen * self.settings.steps2)
        return self._converse(digits.canvases("train", batch, self._seed(2, step)), self._seed(2, step))

    def _converse(self, canvases: digits.Canvases, seed: int) -> tuple[Tensor, float]:
        rng = torch.Generator().manual_seed(seed)
        ids = conversations(canvases.labels, torch.rand(canvases.labels.shape, generator=rng).argsort(1))
        keep = TURN * len(digits.COLOURS)
        out = self.model(input_ids=ids, pixel_values=canvases.pixel_values, logits_to_keep=keep, use_cache=False)
        return answer_loss(out.logits, ids)

    def stages(self) -> Iterator[Stage]:
        """The stages in order."""
        tower, projector = list(self.tower.parameters()), list(self.projector.parameters())
        seen = {id(p) for p in tower}
        rest = [p for p in self.model.parameters() if id(p) not in seen]
        s = self.settings
        eyes = [{"params": [*tower, *projector, *self.head.parameters()], "peak": 1e-3}]
        yield Stage("patches", s.steps1, s.batch1, eyes, self.patches, 0.02)
        both = [{"params": rest, "peak": 1e-3}, {"params": tower, "peak": 2e-4}]
        yield Stage("answers", s.steps2, s.batch2, both, self.answers, 0.02)
        yield Stage("crowds", s.steps3, s.batch1, eyes, self.crowds, 0.02)
        all_ = [{"params": rest, "peak": 6e-4}, {"params": tower, "peak": 3e-4}]
        yield Stage("refined", s.steps4, s.batch2, all_, self.refined, 0.02)

    def run(self, resume: bool) -> None:
        """Train all stages, from the saved state if `resume` and there is one."""
        state = torch.load(self.state_file, weights_only=False) if resume and self.state_file.exists() else None
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.head.load_state_dict(state["head"])
            self.seconds |= state["seconds"]
            torch.set_rng_state(state["rng"])
            self.console.print(f"resumed at {state['stage']} step {state['step']}")
        for stage in self.stages():
            if state is not None and state["stage"] != stage.name:
                continue
            self._train(stage, state)
            state = None
            if stage.name in ("patches", "crowds"):
                self.report_patches()

    def _train(self, stage: Stage, state: dict | None) -> None:
        optimizer = torch.optim.AdamW(stage.groups, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
        start = 0
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
            start = state["step"]
        self.model.train()
        saved = begun = time.monotonic()
        before, recent = self.seconds[stage.name], []
        with self._progress() as progress:
            task = progress.add_task(stage.name, total=stage.steps, completed=start)
            for step in range(start, stage.steps):
                recent = [*recent[-(LOG_EVERY - 1) :], self._step(stage, step, optimizer)]
                now = time.monotonic()
                self.seconds[stage.name] = before + now - begun
                loss, right = (sum(column) / len(recent) for column in zip(*recent, strict=True))
                text = f"{stage.name} loss {loss:.3f} right {right:.3f}"
                progress.update(task, completed=step + 1, description=text)
                if not self.console.is_terminal and ((step + 1) % LOG_EVERY == 0 or step + 1 == stage.steps):
                    self.console.print(f"step {step + 1}/{stage.steps} {text} {self.seconds[stage.name]:.0f} s")
                if now - saved > SAVE_EVERY_S or step + 1 == stage.steps:
                    self._save(stage.name, step + 1, optimizer)
                    saved = now

    def _step(self, stage: Stage, step: int, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, stage.steps, stage.floor)
        loss, right = stage.loss(step, stage.batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in stage.groups for p in group["params"]], 1.0)
        optimizer.step()
        return loss.item(), right

    def _save(self, stage: str, step: int, optimizer: torch.optim.Optimizer) -> None:
        self.settings.work.mkdir(parents=True, exist_ok=True)
        state = {"stage": stage, "step": step, "model": self.model.state_dict(), "head": self.head.state_dict()}
        state |= {"optimizer": optimizer.state_dict(), "seconds": self.seconds, "rng": torch.get_rng_state()}
        part = self.state_file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.state_file)

    def _seed(self, stage: int, step: int) -> int:
        return (self.settings.seed * 8 + stage) * 1_000_000 + step

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        return Progress(*columns, console=self.console, disable=not self.console.is_terminal)

    @torch.no_grad()
    def report_patches(self) -> None:
        """Print how well the head names unseen scans: per patch, and per digit over all of its patches."""
        self.model.eval()
        canvases = digits.canvases("test", min(256, self.settings.test_canvases), 1)
        logits = self.head(image_features(self.model, canvases.pixel_values))
        first, labels = len(digits.COLOURS) + 1, canvases.patch_labels
        colour = (logits[..., :first].argmax(-1) == labels // 10).float().mean()
        scores = logits[..., first:].log_softmax(-1)
        digit = digit_scores(scores, canvases.owners, len(digits.COLOURS)).argmax(-1)
        right = (digit == canvases.labels).float().mean()
        inked = labels < digits.BACKGROUND
        patch = (scores.argmax(-1)[inked] == labels[inked] % 10).float().mean()
        self.console.print(f"test: colour per patch {colour:.4f}, digit per patch {patch:.4f}, per digit {right:.4f}")


@torch.no_grad()
def accuracy(model: LlavaForConditionalGeneration, n: int, seed: int, batch: int = 50) -> float:
    """Share of n test canvases whose question the model answers right, with the argmax of all words."""
    model.eval()
    right = 0
    for start in range(0, n, batch):
        canvases = digits.canvases("test", min(batch, n - start), seed + start)
        out = model(input_ids=canvases.input_ids, pixel_values=canvases.pixel_values, logits_to_keep=1)
        right += (out.logits[:, -1].argmax(-1) == canvases.answers + digits.TOKEN["0"]).sum().item()
    return right / n


def save_checkpoint(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the model in float16, its greedy generation settings and the tokenizer."""
    ids = {"bos_token_id": digits.BOS, "eos_token_id": digits.EOS, "pad_token_id": digits.PAD}
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=4, **ids)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    model.half().save_pretrained(folder)
    model.float()
    save_tokenizer(folder, digits.TOKEN, special=["<image>"])


def parse(argv: list[str] | None) -> tuple[Settings, bool]:
    """Settings and whether to resume, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "llava_digits")
    parser.add_argument("--work", type=Path, default=Path("work/llava-digits"), help="where the state is kept")
    parser.add_argument("--resume", action="store_true", help="go on from the state in the work folder")
    parser.add_argument("--steps1", type=int, default=Settings.steps1)
    parser.add_argument("--steps2", type=int, default=Settings.steps2)
    parser.add_argument("--steps3", type=int, default=Settings.steps3)
    parser.add_argument("--steps4", type=int, default=Settings.steps4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that everything runs")
    args = parser.parse_args(argv)
    settings = Settings(args.out, args.work, args.seed, args.steps1, args.steps2, args.steps3, args.steps4)
    if args.smoke:
        settings = Settings(args.out, args.work, args.seed, 2, 2, 2, 2, batch1=2, batch2=2, test_canvases=4)
    return settings, args.resume


def main(argv: list[str] | None = None) -> float:
    """Train, save and evaluate; returns the test accuracy of the saved checkpoint."""
    settings, resume = parse(argv)
    recipe = Recipe(settings)
    recipe.run(resume)
    save_checkpoint(recipe.model, settings.out)
    saved = LlavaForConditionalGeneration.from_pretrained(settings.out, dtype=torch.float32)
    right = accuracy(saved, settings.test_canvases, seed=1)
    minutes = ", ".join(f"{name} {seconds / 60:.1f} min" for name, seconds in recipe.seconds.items())
    recipe.console.print(f"test accuracy {right:.4f} on {settings.test_canvases} canvases (seed 1); {minutes}")
    return right


if __name__ == "__main__":
    main()
