"""What a session has found, as one table and one JSON: ``python tests/gpu/summary.py FOLDER``, where its parts have written."""

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, str]:
    """Card and versions."""
    versions = {}
    for package in ("torch", "triton", "lightning", "transformers", "sae-lens", "eai-sparsify"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"no GPU ({platform.machine()})"
    return {"card": card, "python": platform.python_version(), **versions}


def main() -> None:
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {"machine": machine()}
    for name in ("kernels", "synth"):
        if (file := folder / f"{name}.json").is_file():
            found[name] = json.loads(file.read_text())
    steps = folder / "steps.jsonl"
    found["steps"] = [json.loads(line) for line in steps.read_text().splitlines()] if steps.is_file() else []
    (folder / "session.json").write_text(json.dumps(found, indent=1))
    lines = [", ".join(f"{name} {value}" for name, value in found["machine"].items()), ""]
    lines += ["| step | ms | tokens/s | ÷ floor | peak, GB | beside |", "|---|---|---|---|---|---|"]
    for row in found["steps"]:
        beside = f"{row['peer']} {row['peer_step_ms']:.2f} ms, × {row['ratio']:.2f}" if row.get("ratio") else "–"
        size = f"{row['peak_bytes'] / 1e9:.1f}"
        lines.append(
            f"| {row['sae']}, {row['shape']} | {row['step_ms']:.2f} | {row['tokens_per_s']:,.0f} | "
            f"{row['step_ms'] / row['floor_ms']:.2f} | {size} | {beside} |"
        )
    for name, row in found.get("synth", {}).items():
        if isinstance(row, dict):
            lines.append(f"| {name}, SynthSAEBench-16k | {row['step_ms']:.2f} | {row['samples_per_s']:,.0f} | | | |")
    for name, ms in found.get("kernels", {}).items():
        if name.startswith("decoder loss"):
            lines.append(f"| {name} | {ms:.2f} | | | | |")
    if failed := found.get("kernels", {}).get("failed checks"):
        lines.append(f"\n{failed:.0f} kernels are wrong")
    (folder / "session.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
