"""Where torch can compile for this CPU."""

from __future__ import annotations

import shutil

import pytest
import torch

if shutil.which("g++") is None and shutil.which("clang++") is None:
    _WHY_NOT = "needs a C++ compiler"
else:
    _WHY_NOT = "torch's compiler cannot link where its own path has a space" if " " in torch.__file__ else ""

needs_compiler = pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)
