"""Text encoders for a device that may not hold them: T5's blocks then wait in host memory and visit it in turn.

They compute there what they would as a whole, with the same kernels on the same shapes, so what is cached is the same.
"""

from __future__ import annotations

from typing import Any

import torch

from flux_ft import log
from flux_ft.families.base import Family
from flux_ft.infer import fit
from flux_ft.train.stream import BlockStream

IN_TURN = 0.132
"""Of FLUX.1's text encoders, what is on the device while T5's blocks visit it: CLIP, T5's embeddings and two of its 24
blocks, 123 + 132 + 2 · 193 of 4,885 million weights."""


def text_bytes(sizes: fit.ModelSizes, dtype: torch.dtype, in_turn: bool) -> float:
    """Of a device, at the most, while a caption is encoded: by whole encoders, or by blocks that visit it in turn."""
    return sizes.encoders * dtype.itemsize * ((IN_TURN if in_turn else 1) + fit.ENCODER_WORK - 1)


def load_encoders(family: Family, device: torch.device, dtype: torch.dtype) -> Any:
    """The family's tokenizers and encoders, as a whole where a GPU has room for them by the estimate."""
    if device.type == "cuda":
        free = fit.machine_of(device).free_bytes
        whole = text_bytes(fit.model_sizes(family), dtype, in_turn=False) * fit.FRAGMENTATION + fit.WORKSPACE_BYTES
        if free is not None and whole > free:
            log.say(
                f"text encoders as a whole need {whole / 1e9:.1f} GB and {free / 1e9:.1f} GB are free, so their blocks "
                "wait in host memory and come one by one: some seconds a caption, the same result"
            )
            return stream_encoders(family, device, dtype)
    return family.load_text(device, dtype)


def stream_encoders(family: Family, device: torch.device, dtype: torch.dtype) -> Any:
    """The same with blocks that wait in host memory; what they are part of is on the device."""
    stack = family.load_text(torch.device("cpu"), dtype)
    for encoder, blocks in family.text_encoders(stack):
        stream = BlockStream(blocks, range(len(blocks)), device)
        for tensor in (*encoder.parameters(), *encoder.buffers()):
            if not stream.holds(tensor):
                tensor.data = tensor.data.to(device)
    return stack
