"""File formats, one a module. A new one is a function that opens a file, and one line here and in `SourceConfig`."""

from __future__ import annotations

from collections.abc import Callable

from mirage_dist.data.formats import figstep, llava, mm_safetybench, samples, scienceqa, spa_vl, vlguard, vqa
from mirage_dist.data.formats.base import BadRecord, Opened, listed
from mirage_dist.schema import SourceConfig

__all__ = ["REGISTRY", "BadRecord", "Opened"]

REGISTRY: dict[str, Callable[[SourceConfig], Opened]] = {
    "vlguard": listed(vlguard.parse),
    "llava": listed(llava.parse),
    "spa_vl": listed(spa_vl.parse),
    "samples": listed(samples.parse),
    "figstep": figstep.opened,
    "mm_safetybench": mm_safetybench.opened,
    "vqav2": vqa.vqav2,
    "textvqa": vqa.textvqa,
    "vizwiz": vqa.vizwiz,
    "scienceqa": scienceqa.opened,
}
