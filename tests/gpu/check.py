"""Is the GPU path right, and how fast is it? `make gpu`, or by itself:

    python -m tests.gpu.check gpu.json              on a CUDA device
    python -m tests.gpu.check gpu.json --rehearse   the same on a CPU with a tiny network, to test this script

Run it where this repository lies. It needs torch>=2.11, transformers>=5.17, numpy and Pillow; no Hydra, no Lightning,
no network, no data and no weights: all are made in place, InternVL 2.5 1B in its shapes. It writes JSON after each
part, so that a run that is cut short has what it found. Exit status 1: a kernel computes something else, or a part
failed. What does not fit the card's memory says so and is no failure.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.gpu.equality import LAYOUTS, attention_of, compare, control, network_of
from tests.gpu.scale import ONE_BILLION, REHEARSAL, Scale
from tests.gpu.speed import Case, cases, join_group, measure, measure_head, profile

PEAKS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}
"""FLOP/s in bfloat16, dense, of the cards that `planning/hardware.py` knows. That module needs pydantic."""


class Report:
    """Findings, written to a file as they come.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        self.failed: list[str] = []

    def add(self, part: str, name: str, find: Callable[[], Any]) -> None:
        """Run a part. One that fails is noted with its traceback, and the others go on."""
        entry: Any
        try:
            entry = find()
        except torch.OutOfMemoryError as error:
            entry = {"out of memory": str(error).splitlines()[0]}
        except Exception:
            entry = {"failed": traceback.format_exc().splitlines()[-12:]}
            self.failed.append(f"{part}: {name}")
        if isinstance(entry, dict) and entry.get("equal") is False:
            self.failed.append(f"{part}: {name}")
        self.note(part, name, entry)
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def note(self, part: str, name: str, entry: Any) -> None:
        """Keep and show a finding."""
        self.found.setdefault(part, {})[name] = entry
        self.path.write_text(json.dumps({**self.found, "failed": self.failed}, indent=2) + "\n")
        print(f"{part} | {name} | {json.dumps(entry)}", flush=True)


def available_kernels(device: torch.device) -> list[str]:
    """What this machine has, the default first."""
    if device.type != "cuda":
        return ["sdpa"]
    flash = ["flash"] if importlib.util.find_spec("flash_attn") is not None else []
    return ["torch", *flash, "sdpa"]


def describe(device: torch.device) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    versions["transformers"] = transformers.__version__
    if device.type != "cuda":
        return {"device": platform.processor() or "cpu", **versions}
    properties = torch.cuda.get_device_properties(device)
    return {"device": properties.name, "GB": properties.total_memory / 1e9, **versions}


def peak_of(device: torch.device) -> float | None:
    """FLOP/s of a known card in bfloat16."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for card, peak in PEAKS.items() if card in name), None)


def check_numbers(report: Report, scale: Scale, device: torch.device, kernels: list[str]) -> None:
    report.add("equality", "a wrong diagonal is seen", partial(control, device))
    for kernel in kernels:
        for name, layout in LAYOUTS.items():
            compute = attention_of(layout, device)
            report.add("equality", f"{kernel}: {name}", partial(compare, compute, kernel))
        for name, preference in (("network, next-token loss", False), ("network, pairs", True)):
            run = network_of(scale, device, preference=preference)
            report.add("equality", f"{kernel}: {name}", partial(compare, run, kernel))


def check_speed(report: Report, scale: Scale, device: torch.device, kernels: list[str]) -> None:
    peak = peak_of(device)
    report.add("machine", "process group", partial(join_group, device))
    report.add("head", "alone", partial(measure_head, scale, device))
    # On a CPU compiling takes longer than all the rest.
    for case in cases(kernels, compiled=device.type == "cuda"):
        report.add("step", case.name, partial(measure, scale, case, device, peak))
    report.add("profile", "of the first case", partial(profile, scale, Case(kernels[0]), device))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, help="file to write; gpu.json in $OUT, or here")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with a tiny network")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --rehearse runs on a CPU")
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", 0)
    scale = REHEARSAL if options.rehearse else ONE_BILLION
    report = Report(options.output or Path(os.environ.get("OUT", ".")) / "gpu.json")
    report.note("machine", "what it is", describe(device))
    kernels = available_kernels(device)
    check_numbers(report, scale, device, kernels)
    check_speed(report, scale, device, kernels)
    if report.failed:
        sys.exit(f"failed: {', '.join(report.failed)}")


if __name__ == "__main__":
    main()
