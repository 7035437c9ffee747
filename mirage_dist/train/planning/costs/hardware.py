"""GPUs, nodes, links and file system that a plan computes with; every number has a source, and can be replaced.

Rates are one direction's: data sheets add up both directions of NVLink and PCIe. FLOP/s are dense: data sheets double
them for structured sparsity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from mirage_dist.config import suggestion
from mirage_dist.schema import ConfigError
from mirage_dist.schema.names import shown

GIB, GB, TERA = 1 << 30, 1e9, 1e12


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU in nodes of one kind.

    memory_gib: what CUDA reports as the GPU's total. reserved_gib: of it, what no tensor can use: the CUDA context,
    NCCL's buffers, fragments of the allocator. tflops: bf16. utilization: the share of `tflops` that the operations of
    a step reach, recomputation counted among them. link_efficiency: the share of a link's rate that collectives reach.
    nvlink_gb_s: between GPUs of a node; network_gb_s: of each GPU to other nodes; pcie_gb_s: to the host's memory.
    nvlink_us, network_us: latency of one hop of a ring. host_gb_s: of a node's memory. node_write_gb_s, write_gb_s:
    writing to the file system, of one node and of all together.
    """

    name: str
    memory_gib: float
    tflops: float
    memory_gb_s: float
    nvlink_gb_s: float
    network_gb_s: float = 50.0
    pcie_gb_s: float = 64.0
    gpus_per_node: int = 8
    reserved_gib: float = 3.0
    utilization: float = 0.40
    link_efficiency: float = 0.80
    nvlink_us: float = 3.4
    network_us: float = 14.0
    host_memory_gib: float = 2048.0
    host_gb_s: float = 614.0
    node_write_gb_s: float = 2.0
    write_gb_s: float = 20.0

    @property
    def usable(self) -> int:
        """Bytes of a GPU's memory that tensors can use."""
        return int((self.memory_gib - self.reserved_gib) * GIB)

    @property
    def rate(self) -> float:
        """Operations a second that a step reaches on one GPU."""
        return self.tflops * TERA * self.utilization

    def written_gb_s(self, nodes: int) -> float:
        """What so many nodes write to the file system together."""
        return min(nodes * self.node_write_gb_s, self.write_gb_s)

    def link(self, ranks: int, gpus: int) -> float:
        """Bytes a second that each rank of a collective moves: over NVLink, or all of a node's network links together.

        It is NCCL's bus bandwidth, a ring crossing each link of a node once.
        """
        slowest = self.nvlink_gb_s if ranks <= gpus else min(self.nvlink_gb_s, gpus * self.network_gb_s)
        return slowest * self.link_efficiency * GB

    def latency(self, ranks: int, gpus: int) -> float:
        """Seconds of the hops of one all-gather or reduce-scatter in a ring (an all-reduce has twice as many)."""
        between = -(-ranks // gpus) - 1 if ranks > gpus else 0
        return (max(0, ranks - 1 - between) * self.nvlink_us + between * self.network_us) * 1e-6


# memory_gib: `torch.cuda.mem_get_info`, as in PyTorch's out-of-memory messages ("a total capacity of 79.18 GiB").
GPUS: Mapping[str, Hardware] = {
    gpu.name: gpu
    for gpu in (
        Hardware("h100", 79.1, 989.5, 3350, 450),
        Hardware("h100_pcie", 79.1, 756.5, 2000, 64),
        Hardware("h200", 139.7, 989.5, 4800, 450),
        Hardware("b200", 178.3, 2250, 8000, 900, host_memory_gib=2048),
        Hardware("a100", 79.1, 312, 2039, 300, network_gb_s=25, pcie_gb_s=32, host_gb_s=410),
        Hardware("a100_40gb", 39.4, 312, 1555, 300, network_gb_s=25, pcie_gb_s=32, host_memory_gib=1024, host_gb_s=410),
        Hardware("l40s", 44.3, 362, 864, 32, network_gb_s=25, pcie_gb_s=32, host_memory_gib=1024),
    )
}
SHEETS: Mapping[str, str] = {
    "h100": "NVIDIA H100 Tensor Core GPU data sheet (SXM): 1,979 TFLOPS bf16 with sparsity, 3.35 TB/s, NVLink 900 GB/s",
    "h100_pcie": "NVIDIA H100 Tensor Core GPU data sheet (PCIe): 1,513 TFLOPS bf16 with sparsity, 2 TB/s, PCIe Gen5",
    "h200": "NVIDIA H200 Tensor Core GPU data sheet (SXM): 1,979 TFLOPS bf16 with sparsity, 4.8 TB/s, NVLink 900 GB/s",
    "b200": "NVIDIA DGX B200 data sheet, an eighth: 4.5 PFLOPS bf16 with sparsity, 8 TB/s, NVLink 1.8 TB/s",
    "a100": "NVIDIA A100 data sheet (80GB SXM): 312 TFLOPS bf16, 2,039 GB/s, NVLink 600 GB/s",
    "a100_40gb": "NVIDIA A100 data sheet (40GB SXM): 312 TFLOPS bf16, 1,555 GB/s, NVLink 600 GB/s",
    "l40s": "NVIDIA L40S data sheet: 362 TFLOPS bf16, 864 GB/s, PCIe Gen4 and no NVLink",
}
# Fields that do not depend on the GPU's data sheet -> where their default is from.
SOURCES: Mapping[str, str] = {
    "memory_gib": "what CUDA reports, as PyTorch's out-of-memory messages print it",
    "network_gb_s": "DGX H100/H200/B200: eight ConnectX-7 of 400 Gb/s; DGX A100: eight ConnectX-6 of 200 Gb/s",
    "pcie_gb_s": "16 lanes of PCIe Gen5 (Gen4 for A100 and L40S), one direction",
    "gpus_per_node": "DGX and HGX systems",
    "host_memory_gib": "DGX systems' data sheets",
    "host_gb_s": "two sockets of eight channels: DDR5-4800 (DGX H100), DDR4-3200 (DGX A100)",
    "utilization": "assumed; MosaicML's llm-foundry benchmarks (scripts/train/benchmarking) have 0.40 to 0.46 "
    "(13B and 7B, 8 to 64 H100, FSDP full shard, bf16, 2048 tokens, nothing recomputed)",
    "link_efficiency": "assumed; nccl-tests reach 230 to 250 of 300 GB/s on eight A100",
    "nvlink_us": "NCCL's own model of a ring, src/graph/tuning.cc: hwLat, NVLink, ring, Simple",
    "network_us": "NCCL's own model of a ring, src/graph/tuning.cc: hwLat, network, ring, Simple",
    "reserved_gib": "assumed: CUDA context, NCCL's buffers, the allocator's fragments",
    "node_write_gb_s": "assumed; measure yours",
    "write_gb_s": "assumed; measure yours",
}
ZERO_ALLOWED = {"reserved_gib", "nvlink_us", "network_us"}


def hardware(gpu: str, changes: Iterable[str] = ()) -> Hardware:
    """The hardware of this GPU's name with changes: each is `field=value`, or a YAML or JSON file of fields.

    Later changes win. Raises ConfigError for an unknown GPU or field, and for a value that is no positive number.
    """
    if gpu not in GPUS:
        raise ConfigError(f"--gpu {shown(gpu)}: not in the table; known: {', '.join(GPUS)}. {_another(gpu)}")
    made = GPUS[gpu]
    for change in changes:
        key, equals, value = change.partition("=")
        made = _changed(made, {key: value} if equals else _read(change), change)
    return made


def sources(used: Hardware) -> dict[str, str]:
    """Field -> where its number is from; for fields that were changed, that the caller gave it."""
    table = GPUS.get(used.name)
    own = {name: value for name, value in asdict(used).items() if table is None or value != getattr(table, name)}
    sheet = SHEETS.get(used.name, "")
    known = {f.name: SOURCES.get(f.name, sheet) for f in fields(Hardware) if f.name != "name"}
    return {name: "given" if name in own else source for name, source in known.items()}


def _another(gpu: str) -> str:
    hint = suggestion(gpu, list(GPUS))
    other = "Another GPU: take the nearest and give its numbers, such as --hardware memory_gib=47.4"
    return f"{hint}. {other}" if hint else other


def _read(file: str) -> Mapping[str, Any]:
    try:
        text = Path(file).read_text()
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--hardware {file}: expected FIELD=VALUE, or a YAML or JSON file that has them: {error}"
        ) from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"--hardware {file}: expected a mapping of fields to numbers")
    return values


def _changed(made: Hardware, values: Mapping[str, Any], place: str) -> Hardware:
    known = {f.name: f.type for f in fields(Hardware) if f.name != "name"}
    numbers: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            hint = suggestion(str(key), list(known)) or f"known: {', '.join(known)}"
            raise ConfigError(f"--hardware {place}: no field {shown(str(key))}; {hint}")
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        shares = key in ("utilization", "link_efficiency")
        least = 0.0 if key in ZERO_ALLOWED else 1e-9
        most = 1.0 if shares else 1e9
        if not least <= number <= most or (key == "gpus_per_node" and number != int(number)):
            expected = "a share above 0 and up to 1" if shares else "a positive number"
            raise ConfigError(f"--hardware {place}: {key}={shown(str(value))}; expected {expected}")
        numbers[key] = int(number) if key == "gpus_per_node" else number
    changed = replace(made, **numbers)
    if changed.usable <= 0:
        raise ConfigError(f"--hardware {place}: memory_gib={changed.memory_gib} leaves nothing above reserved_gib")
    return changed
