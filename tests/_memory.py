"""The most memory that a process has held."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def peak_bytes() -> int:
    """Of this process since it was started; 0 where the system does not say.

    On Linux `ru_maxrss` begins with what the parent held when it forked, which `VmHWM` does not.
    """
    if sys.platform == "linux":
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        return int(found[1]) * 1024 if found else 0
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
