"""The tokenizer of a small model whose vocabulary is a list of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def save_tokenizer(folder: Path, ids: Mapping[str, int], special: Sequence[str] = ()) -> None:
    """Write a word-level tokenizer, which puts `<bos>` in front and pads on the left.

    Args:
        folder: of the checkpoint.
        ids: the number of each word, `<pad>`, `<bos>`, `<eos>` and `<unk>` among them.
        special: further tokens that are no words of the text.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(dict(ids), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, padding_side="left", additional_special_tokens=list(special), **names
    )
    tokenizer.save_pretrained(folder)
