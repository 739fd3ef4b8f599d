#!/usr/bin/env python
"""What a history of versions takes on the disk: against its patches, and against what git-lfs would store.

    python scripts/bench/versions.py [--versions 10] [--patches 3] [--json]

A lineage of the starter model grows in a home of its own, by patches drawn at random: how many bytes a patch and a
version take does not depend on their values. "home" is everything in the home but its key: records, blobs, refs and the
index. git-lfs stores a tracked file whole for each commit that changes it: the checkpoint with each version folded in,
or, tracked apart, each version's values and all patches.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from p2pmodel.store.home import Home
from tests.support.lineages import begin, grow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=10)
    parser.add_argument("--patches", type=int, default=3, help="merged into each version")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lineage = begin(Path(folder) / "home")
        before = on_disk(lineage.home)
        grow(lineage, options.versions, options.patches)
        lineage.home.close()
        after = on_disk(lineage.home)
        blobs = {ref.digest: ref.size for patch in lineage.patches.values() for ref in (patch.adapter, patch.fisher)}
        headers = sum(lineage.home.objects.size(patch) or 0 for patch in lineage.patches)
        results = sum({v.candidate.result.digest: v.candidate.result.size for v in lineage.versions}.values())
        weights = sum(file.blob.size for file in lineage.manifest.files if file.name.endswith(".safetensors"))
    patches = sum(blobs.values()) + headers
    figures = {
        "versions": options.versions,
        "patches": len(lineage.patches),
        "patch_bytes": patches,
        "result_bytes": results,
        "home_bytes": after - before,
        "ratio_to_patches": (after - before) / patches,
        "git_lfs_checkpoints": weights * (options.versions + 1),
        "checkpoint_bytes": weights,
    }
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{options.versions} versions of {options.patches} patches each, kB:")
    rows = [
        ("all patches, headers and blobs", patches),
        ("all versions' values", results),
        ("the home grew by", after - before),
        ("git-lfs, the checkpoint once and for each version", weights * (options.versions + 1)),
    ]
    for name, size in rows:
        print(f"  {name:52s} {size / 1000:12.1f}")
    print(f"the home grew by {figures['ratio_to_patches']:.2f} times its patches (goal: at most 1.5)")


def on_disk(home: Home) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in home.path.rglob("*") if path.is_file() and path.name != "key")


if __name__ == "__main__":
    main()
