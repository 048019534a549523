"""Train `zoo:llama-retrieval`: python -m tokcompile.models.recipe_retrieval

One command, seeded and resumable. The model begins with the circuit that recall is made of (heads that look at the
tokens just before, and a head that looks for what followed a word earlier; Olsson et al. 2022, "In-context Learning and
Induction Heads"), which small models otherwise find late. All weights are then trained on texts of growing length, on
the words of the language and on the answers to questions. Nothing is evicted in training.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from . import retrieval
from .wordtokenizer import save_tokenizer

CONFIG = {
    "vocab_size": len(retrieval.VOCABULARY),
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
    "bos_token_id": retrieval.BOS,
    "eos_token_id": retrieval.EOS,
    "pad_token_id": retrieval.PAD,
}
IGNORED, LANGUAGE, ANSWER = range(3)
"""What a token is to the loss: nothing, a word that follows from those before it, a word of an answer."""
CONSTANT = 4
"""Features that are the same for every token to begin with: heads that look back by place alone read them."""
BACK = (1, 2, 3, 1)
"""How many tokens the heads of the first block look back to begin with."""
SAVE_EVERY_S = 60.0
LOG_EVERY = 25


@dataclass(frozen=True)
class Stage:
    """Steps on texts of one length: `fewest` to `most` needles in each, of which up to `asked` are asked about."""

    length: int
    batch: int
    steps: int
    peak: float
    fewest: int = 4
    most: int = 12
    asked: int = 8


STAGES = (
    Stage(96, 24, 600, 2e-3, 3, 8),
    Stage(256, 12, 160, 1.5e-3),
    Stage(512, 8, 180, 1.5e-3),
    Stage(1024, 4, 40, 6e-4),
)


@dataclass(frozen=True)
class Settings:
    """What one run of the recipe does."""

    out: Path
    work: Path
    seed: int = 0
    stages: tuple[Stage, ...] = STAGES
    test_texts: int = 250
    test_lengths: tuple[int, ...] = (128, 256, 512, 1024)


@torch.no_grad()
def build_model(seed: int) -> LlamaForCausalLM:
    """The model of the recipe, untrained."""
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim < 2:
            continue
        std = 0.1 if "embed" in name else 0.5 / parameter.shape[1] ** 0.5
        parameter.normal_(0, std * (0.4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1), generator=rng)
    words = model.model.embed_tokens.weight
    words[:, :CONSTANT] = 0
    # Rows of one norm, or the constant features would differ after the norm.
    words.mul_(0.1 * (words.shape[1] - CONSTANT) ** 0.5 / words.norm(dim=1, keepdim=True))
    words[:, :CONSTANT] = 0.2
    look_back(model, rng)
    find_earlier(model, rng)
    return model


def look_back(model: LlamaForCausalLM, rng: torch.Generator) -> None:
    """Let head h of the first block look `BACK[h]` tokens back: its queries are its keys, turned back by as much."""
    attention = model.model.layers[0].self_attn
    rates = model.model.rotary_emb.inv_freq
    fast = rates > 0.01
    turned = torch.cat([(rates * 0).cos() * fast, (rates * 0).sin()])
    attention.k_proj.weight.mul_(0.1)[:, :CONSTANT] = turned.repeat(CONFIG["num_key_value_heads"])[:, None]
    queries = [torch.cat([(rates * far).cos() * fast, -(rates * far).sin() * fast]) for far in BACK]
    attention.q_proj.weight.mul_(0.1)[:, :CONSTANT] = torch.cat(queries)[:, None]
    attention.v_proj.weight.normal_(0, CONFIG["hidden_size"] ** -0.5, generator=rng)[:, :CONSTANT] = 0
    attention.o_proj.weight.normal_(0, 0.1 / CONFIG["head_dim"] ** 0.5, generator=rng)


def find_earlier(model: LlamaForCausalLM, rng: torch.Generator) -> None:
    """Let the first head of the second block look for tokens whose predecessor is the present one, and copy them.

    It compares words where rotation is slow, so that they are alike at any distance.
    """
    before, attention = (layer.self_attn for layer in model.model.layers[:2])
    size, rates = CONFIG["head_dim"], model.model.rotary_emb.inv_freq
    slow = (rates < 0.003).repeat(2)
    compare = torch.randn(int(slow.sum()), size, generator=rng) * 3 / size**0.5
    read, written = before.v_proj.weight[:size], before.o_proj.weight[:, :size]
    attention.q_proj.weight[:size][slow] = compare @ read
    attention.k_proj.weight[:size][slow] = 0.1 * compare @ torch.linalg.pinv(written)
    copied = attention.v_proj.weight[:size].normal_(0, CONFIG["hidden_size"] ** -0.5, generator=rng)
    copied[:, :CONSTANT] = 0
    attention.o_proj.weight[:, :size] = 0.5 * copied.T


def lessons(stage: Stage, seed: int) -> tuple[Tensor, Tensor]:
    """Texts with questions and answers behind them, int64 [n, T], and what each token is to the loss, int64 [n, T].

    The words of needles are random and are not learned.
    """
    rng = torch.Generator().manual_seed(seed)
    needles = int(torch.randint(stage.fewest, stage.most + 1, (), generator=rng))
    texts = retrieval.texts("train", stage.batch, stage.length, needles, seed)
    which = torch.rand(stage.batch, needles, generator=rng).argsort(1)[:, : stage.asked]
    turns = torch.cat([texts.questions(which), texts.answers(which)], dim=-1)
    kinds = torch.where(texts.in_needle, IGNORED, LANGUAGE)
    asked = torch.tensor([IGNORED] * (retrieval.NEEDLE - retrieval.VALUES) + [ANSWER] * retrieval.VALUES)
    ids = torch.cat([texts.input_ids, turns.flatten(1)], dim=1)
    return ids, torch.cat([kinds, asked.repeat(stage.batch, which.shape[1])], dim=1)


def losses(logits: Tensor, ids: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean loss on the language and on answers, and the share of right words in answers, of logits [n, T, V]."""
    wanted, kinds = ids[:, 1:], kinds[:, 1:]
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), wanted, reduction="none")
    right = (logits[:, :-1].argmax(-1) == wanted)[kinds == ANSWER].float().mean()
    return each[kinds == LANGUAGE].mean(), each[kinds == ANSWER].mean(), right.item()


def learning_rate(step: int, steps: int, floor: float = 0.1, warmup: int = 40) -> float:
    """Share of the full rate: a linear start, then a cosine down to `floor`."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * cosine)


class Recipe:
    """The model in training, with its stages, its work folder and its progress."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.console = Console(force_terminal=None if sys.stdout.isatty() else False, highlight=False)
        torch.manual_seed(settings.seed)
        self.model = build_model(settings.seed).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
        self.seconds = [0.0] * len(settings.stages)
        self.state_file = settings.work / "state.pt"

    def run(self, resume: bool) -> None:
        """Train all stages, from the saved state if `resume` and there is one."""
        first, start = 0, 0
        if resume and self.state_file.exists():
            state = torch.load(self.state_file, weights_only=False)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            first, start, self.seconds = state["stage"], state["step"], state["seconds"]
            self.console.print(f"resumed at stage {first + 1} step {start}")
        for number in range(first, len(self.settings.stages)):
            self._train(number, start)
            start = 0

    def _train(self, number: int, start: int) -> None:
        stage = self.settings.stages[number]
        saved = begun = time.monotonic()
        before, recent = self.seconds[number], []
        with self._progress() as progress:
            task = progress.add_task("", total=stage.steps, completed=start)
            for step in range(start, stage.steps):
                recent = [*recent[-(LOG_EVERY - 1) :], self._step(number, step)]
                now = time.monotonic()
                self.seconds[number] = before + now - begun
                language, answer, right = (sum(column) / len(recent) for column in zip(*recent, strict=True))
                text = f"{stage.length} tokens: language {language:.3f} answers {answer:.3f} right {right:.3f}"
                progress.update(task, completed=step + 1, description=text)
                if not self.console.is_terminal and ((step + 1) % LOG_EVERY == 0 or step + 1 == stage.steps):
                    self.console.print(f"step {step + 1}/{stage.steps} {text} {self.seconds[number]:.0f} s")
                if now - saved > SAVE_EVERY_S or step + 1 == stage.steps:
                    self._save(number, step + 1)
                    saved = now

    def _step(self, number: int, step: int) -> tuple[float, float, float]:
        stage = self.settings.stages[number]
        for group in self.optimizer.param_groups:
            group["lr"] = stage.peak * learning_rate(step, stage.steps)
        ids, kinds = lessons(stage, (self.settings.seed * 8 + number) * 1_000_000 + step)
        language, answer, right = losses(self.model(input_ids=ids, use_cache=False).logits, ids, kinds)
        self.optimizer.zero_grad(set_to_none=True)
        (language + answer).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return language.item(), answer.item(), right

    def _save(self, stage: int, step: int) -> None:
        self.settings.work.mkdir(parents=True, exist_ok=True)
        state = {"stage": stage, "step": step, "seconds": self.seconds}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        part = self.state_file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.state_file)

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        return Progress(*columns, console=self.console, disable=not self.console.is_terminal)


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, n: int, length: int, *, needles: int = 8, seed: int = 1, batch: int = 25
) -> float:
    """Share of n test texts where a question about one of the needles, each in turn, is answered right, both words."""
    model.eval()
    right = 0
    for start in range(0, n, batch):
        texts = retrieval.texts("test", min(batch, n - start), length, needles, seed + start)
        which = (torch.arange(len(texts)) + start)[:, None] % needles
        answer = texts.answers(which)[:, 0]
        ids = torch.cat([texts.input_ids, texts.questions(which)[:, 0], answer[:, :-1]], dim=1)
        said = model(input_ids=ids, use_cache=False, logits_to_keep=retrieval.VALUES).logits.argmax(-1)
        right += int((said == answer).all(1).sum())
    return right / n


def save_checkpoint(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the model in float16, its greedy generation settings and the tokenizer."""
    ids = {"bos_token_id": retrieval.BOS, "eos_token_id": retrieval.EOS, "pad_token_id": retrieval.PAD}
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=retrieval.VALUES, **ids)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    model.half().save_pretrained(folder)
    model.float()
    save_tokenizer(folder, retrieval.TOKEN, special=["<key>", "<ask>"])


def parse(argv: list[str] | None) -> tuple[Settings, bool]:
    """Settings and whether to resume, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "llama_retrieval")
    parser.add_argument("--work", type=Path, default=Path("work/llama-retrieval"), help="where the state is kept")
    parser.add_argument("--resume", action="store_true", help="go on from the state in the work folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that everything runs")
    args = parser.parse_args(argv)
    settings = Settings(args.out, args.work, args.seed)
    if args.smoke:
        short = tuple(replace(stage, length=80, batch=2, steps=2) for stage in STAGES)
        settings = replace(settings, stages=short, test_texts=4, test_lengths=(40,))
    return settings, args.resume


def main(argv: list[str] | None = None) -> dict[int, float]:
    """Train, save and evaluate; returns the accuracy of the saved checkpoint by the length of texts."""
    settings, resume = parse(argv)
    recipe = Recipe(settings)
    recipe.run(resume)
    save_checkpoint(recipe.model, settings.out)
    saved = LlamaForCausalLM.from_pretrained(settings.out, dtype=torch.float32)
    right = {length: accuracy(saved, settings.test_texts, length) for length in settings.test_lengths}
    minutes = ", ".join(f"{each / 60:.1f}" for each in recipe.seconds)
    shown = ", ".join(f"{100 * share:.1f} % at {length}" for length, share in right.items())
    recipe.console.print(f"right of {settings.test_texts} test texts: {shown} tokens; minutes of the stages: {minutes}")
    return right


if __name__ == "__main__":
    main()
