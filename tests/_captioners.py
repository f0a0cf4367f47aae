"""Captioners of the real classes with a few thousand random weights each, saved as real ones are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content -%}
{%- if part.type == "image" -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def byte_level_bpe(special: Sequence[str], **options: Any) -> Any:
    """A real tokenizer that knows the bytes, a few words, and `special`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [pair for word in ("picture", "sentence", "trigger") for pair in pairwise_merges(word)]
    words = [*special, *letters, *dict.fromkeys(a + b for a, b in merges)]
    bpe = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, list(dict.fromkeys(merges))))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(special))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **options)


def pairwise_merges(word: str) -> Iterator[tuple[str, str]]:
    """Merges that build `word` from the left."""
    for end in range(1, len(word)):
        yield word[:end], word[end]


def save_florence(folder: Path) -> None:
    tokenizer = byte_level_bpe(
        ["<s>", "<pad>", "</s>", "<unk>", "<image>"],
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    text = {
        "model_type": "bart", "vocab_size": len(tokenizer), "d_model": 32, "init_std": 0.3,
        "max_position_embeddings": 256, **special,
        **{f"{side}_{name}": value for side in ("encoder", "decoder")
           for name, value in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))},
    }  # fmt: skip
    vision = {
        "embed_dim": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "num_groups": [1, 2, 2, 4],
        "window_size": 2, "projection_dim": 32, "max_position_embeddings": 8, "initializer_range": 0.3,
    }  # fmt: skip
    config = transformers.Florence2Config(text_config=text, vision_config=vision, image_token_id=4)
    model = transformers.Florence2ForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(
        num_beams=3, early_stopping=True, no_repeat_ngram_size=3, forced_bos_token_id=0, **special
    )
    pictures = transformers.CLIPImageProcessorPil(
        size={"height": 64, "width": 64}, do_center_crop=False, image_seq_length=5
    )
    for part in (model, tokenizer, pictures):
        part.save_pretrained(folder)


def save_qwen(folder: Path, model_type: str) -> None:
    names = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    tokenizer = byte_level_bpe(
        [f"<|{name}|>" for name in names],
        eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.4,
        "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 8,
        "out_hidden_size": 32, "initializer_range": 0.4,
    }  # fmt: skip
    tokens = {f"{name}_token_id": index for index, name in enumerate(names) if name.startswith("vision")}
    tokens |= {"image_token_id": 5, "video_token_id": 6}
    if model_type == "qwen3_vl":
        text["head_dim"] = 8
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        # The real 4B model ties them too.
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
        model = transformers.Qwen3VLForConditionalGeneration(config)
    else:
        vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20, eos_token_id=[2, 0], pad_token_id=0
    )
    pictures = transformers.Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 256, "longest_edge": 4096}
    )
    for part in (model, tokenizer, pictures):
        part.save_pretrained(folder)
