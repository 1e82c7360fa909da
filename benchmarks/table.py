"""Print a result of `benchmarks.rollout` as the Markdown table of the README.

python -m benchmarks.table benchmarks/results/rollout_cpu.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    cells = json.loads(Path(sys.argv[1]).read_text())["cells"]
    print(
        "| policy | entropy | batch | TRL tokens/s | off tokens/s | on tokens/s | off / TRL | on / off | accepted length |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for policy in ("warm", "raw"):
        for batch in sorted({cell["batch"] for cell in cells if cell["policy"] == policy}):
            arm = {c["arm"]: c for c in cells if (c["policy"], c["batch"]) == (policy, batch)}
            speeds = " | ".join(
                f"{arm[name]['tokens_per_s']['median']:.0f}" for name in ("trl_transformers", "atlas_off", "atlas_on")
            )
            print(
                f"| {policy} | {arm['atlas_on']['entropy']:.2f} | {batch} | {speeds} "
                f"| {arm['atlas_off']['ratio_to_trl']['median']:.2f} | {arm['atlas_on']['ratio_to_off']['median']:.2f} "
                f"| {arm['atlas_on']['accepted_length']:.2f} |"
            )


if __name__ == "__main__":
    main()
