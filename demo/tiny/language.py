"""Tiny language models trained on the captions of a corpus, by default of the generated scenes.

Each is trained to write a caption after its shuffled words: large language models use context anyway, and a bridge
needs just that. No picture is involved.
"""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from isthmus.demo.tiny.scenes import KINDS, make_scene
from isthmus.model.frozen.vision import silent_transformers
from isthmus.model.tiny import TinyLanguage, write_tiny_language, write_tiny_tokenizer

BATCH = 64
CONTEXT_WORDS, CONTEXT_TOKENS = 16, 64


def write_trained_language(
    folder: Path,
    kind: TinyLanguage,
    *,
    steps: int,
    width: int = 96,
    num_layers: int = 3,
) -> float:
    """Train a language model on captions of generated scenes, write its folder and return the last loss."""
    captions = [make_scene(1, "text", number, KINDS)[0].caption for number in range(4000)]
    write_tiny_language(folder, kind, width=width, num_layers=num_layers)
    write_tiny_tokenizer(folder, kind, captions)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    factory: Any = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    with silent_transformers():
        model = factory.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    rng = random.Random(0)  # noqa: S311 - no secret
    loss = torch.zeros(())
    for _ in range(steps):
        chosen = rng.choices(captions, k=BATCH)
        examples = [example(tokenizer, kind, caption, rng) for caption in chosen]
        loss = model(**collate(examples, tokenizer.pad_token_id, kind)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with silent_transformers():
        model.eval().save_pretrained(folder)
    return float(loss.detach())


def example(tokenizer: Any, kind: TinyLanguage, caption: str, rng: random.Random) -> tuple[list[int], list[int]]:
    """Return context and target tokens: the caption's words, shuffled or not; then the caption as training shows it."""
    words = caption.split()
    if rng.random() < 0.5:
        rng.shuffle(words)
    repeats = rng.randint(1, max(1, CONTEXT_WORDS // len(words)))
    context = tokenizer(" ".join(words * repeats), add_special_tokens=False).input_ids[:CONTEXT_TOKENS]
    if kind == "t5":
        context.append(tokenizer.eos_token_id)
        return context, [*tokenizer(caption, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    target = tokenizer(caption + "\n", add_special_tokens=False).input_ids
    return context, [tokenizer.bos_token_id, *target]


def collate(examples: list[tuple[list[int], list[int]]], pad: int, kind: TinyLanguage) -> dict[str, torch.Tensor]:
    """Return a padded batch; decoder-only models learn context and target alike."""
    if kind == "t5":
        contexts, targets = zip(*examples, strict=True)
        input_ids, mask = padded(list(contexts), pad)
        labels, label_mask = padded(list(targets), pad)
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels.masked_fill(label_mask == 0, -100)}
    input_ids, mask = padded([context + target for context, target in examples], pad)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}


def padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, padded at the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask
