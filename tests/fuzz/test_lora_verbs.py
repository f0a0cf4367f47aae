"""What inspects, compares, combines and verifies LoRA files, on files with everything that can be wrong with one."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _loras import random_lora
from lora_files import WIDTH, make_case

from flux_ft import log
from flux_ft.adapters.combine import combine_files
from flux_ft.adapters.compare import diff_files
from flux_ft.adapters.formats import write_adapter
from flux_ft.adapters.inspect import inspect_file
from flux_ft.adapters.verify import verify_file
from flux_ft.errors import FluxFTError
from flux_ft.types import AppliedAdapter

CASES = 150


@pytest.mark.parametrize("verb", ["inspect", "diff", "combine", "verify"])
def test_any_file_gives_a_result_or_one_message(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other exception; every result can be told to people and to programs."""
    monkeypatch.setattr(log.console, "quiet", True)
    path, good, output = (tmp_path / f"{name}.safetensors" for name in ("case", "good", "output"))
    write_adapter(good, random_lora(width=WIDTH), "kohya", torch.float32, {})

    def combine() -> object:
        output.unlink(missing_ok=True)
        return combine_files([AppliedAdapter(path), AppliedAdapter(path, 0.5)], output, 2)

    verbs: dict[str, Callable[[], object]] = {
        "inspect": lambda: inspect_file(path),
        "diff": lambda: diff_files(good, path),
        "combine": combine,
        "verify": lambda: verify_file(path),
    }
    seen: Counter[str] = Counter()
    for seed in range(CASES):
        path.write_bytes(make_case(random.Random(f"{verb}-{seed}")).data)
        try:
            result = verbs[verb]()
        except FluxFTError:
            seen["refused"] += 1
            continue
        json.dumps(result.as_json(), allow_nan=False)  # type: ignore[attr-defined]
        assert result.for_people().isprintable() or "\n" in result.for_people()  # type: ignore[attr-defined]
        seen["told"] += 1
    assert min(seen["refused"], seen["told"]) > CASES // 20
