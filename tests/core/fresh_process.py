"""Run by test_scale.py in a process of its own: a LLaVA of real proportions, pruned without importing tokcompile.

CLIP-L/14-336 (576 image tokens) with random weights and a small Llama. Compared with a run by hand on the reduced
sequence: scores from eager attention weights, features gathered, text and features put together, then `generate`.
"""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE, KEEP, NEW = 5, 192, 4
torch.set_grad_enabled(False)


def build() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=256,
        max_position_embeddings=1024,
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE))
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5 if "embed" not in name else 1.0)
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    words = torch.randint(10, 256, (1, 12), generator=random)
    ids = torch.cat([torch.tensor([[1]]), torch.full((1, 576), IMAGE), words], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 336, 336, generator=random),
    }


def kept_by_hand(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """The method's released procedure, and the features it chooses from."""
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    out = tower(pixels, output_attentions=True, output_hidden_states=True)
    tower.set_attn_implementation("sdpa")
    middle, deep = (out.attentions[i].mean(1).mean(1)[0, 1:] for i in (8, -2))
    anchors = torch.sort(middle, descending=True, stable=True).indices[: round(KEEP * 0.1 / 5)].tolist()
    chosen = {min(max(a + d, 0), 575) for a in anchors for d in (0, -1, 1, -24, 24)}
    deep = deep.clone()
    deep[list(chosen)] -= 1
    rest = torch.sort(deep, descending=True, stable=True).indices[: KEEP - len(chosen)].tolist()
    return sorted(chosen | set(rest)), out.hidden_states[-2][:, 1:]


def generate_by_hand(model: LlavaForConditionalGeneration, given: dict[str, torch.Tensor]) -> torch.Tensor:
    kept, features = kept_by_hand(model, given["pixel_values"])
    rows = model.model.multi_modal_projector(features[:, kept])
    words = model.get_input_embeddings()(given["input_ids"])
    reduced = torch.cat([words[:, :1], rows, words[:, 577:]], 1)
    mask = torch.ones(reduced.shape[:2], dtype=torch.long)
    return model.generate(
        inputs_embeds=reduced,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )


def main() -> None:
    model, given = build(), inputs()
    expected = generate_by_hand(model, given)

    pruned = torch.compile(model, backend="tokred", options={"rule": "hiprune", "keep": KEEP})
    logits = pruned(**given).logits
    assert logits.shape[1] == 1 + KEEP + 12, logits.shape
    assert logits[:, -1].argmax(-1).item() == expected[0, 0].item()
    print("compile")

    torch._dynamo.reset()
    model.compile(backend="tokred", options={"rule": "hiprune", "keep": KEEP})
    asked = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(**given, **asked)[:, -NEW:], expected)
    print("generate")

    import tokcompile

    torch._dynamo.reset()
    tokcompile.restore(model)
    tokcompile.compile(model, rule="hiprune", keep=KEEP)
    assert torch.equal(model.generate(**given, **asked)[:, -NEW:], expected)
    print("api")


if __name__ == "__main__":
    main()
