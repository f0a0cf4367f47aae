"""How long captions are for a model's text encoders, before anything is loaded or downloaded. Loads without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flux_ft.families.base import Variant
from flux_ft.types import CaptionCounter, TokenCount

CLIP_TOKENS = 77
"""What CLIP's text encoder reads at most, its start and end marks included."""


def caption_counter(variant: Variant, source: str) -> CaptionCounter | None:
    """Counts each caption's tokens for CLIP and T5; None where the tokenizers aren't on this machine.

    `source` is a model folder, or a Hub id whose files may lie in the Hub's cache: nothing is downloaded.
    """
    folder = _model_folder(source)
    if folder is None:
        return None
    encoders = (("clip", "tokenizer", CLIP_TOKENS), ("t5", "tokenizer_2", variant.max_text_tokens))
    loaded = []
    for name, part, limit in encoders:
        tokenizer = _tokenizer(folder / part, name)
        if tokenizer is None:
            return None
        loaded.append((name, tokenizer, limit))

    def count(captions: Sequence[str]) -> list[tuple[TokenCount, ...]]:
        lengths = [tokenizer(list(captions)) for _, tokenizer, _ in loaded]
        return [
            tuple(TokenCount(name, each[row], limit) for (name, _, limit), each in zip(loaded, lengths, strict=True))
            for row in range(len(captions))
        ]

    return count


def _model_folder(source: str) -> Path | None:
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") != 1 or source.endswith(".safetensors"):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "tokenizer/tokenizer_config.json")
    return Path(found).parents[1] if isinstance(found, str) else None


def _tokenizer(folder: Path, encoder: str) -> Callable[[list[str]], list[int]] | None:
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer  # a thirtieth of a second, where transformers takes one

        fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
        fast.no_truncation()
        fast.no_padding()
        return lambda captions: [len(one.ids) for one in fast.encode_batch(captions)]
    if encoder == "clip" and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        from transformers import CLIPTokenizer

        slow: Any = CLIPTokenizer.from_pretrained(str(folder))
        return lambda captions: [len(ids) for ids in slow(captions, verbose=False).input_ids]
    return None
