"""What a run survives: `make chaos`, about forty minutes on two cores.

Writes docs/results/chaos.md; --folder for another place, and parts by name: saves cluster partition.
"""

import argparse
from pathlib import Path

from benchmarks.chaos import cluster, saves

HEAD = """# Chaos

Made by `make chaos`.

"""
PARTS = ("saves", "cluster", "partition")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, default=Path(__file__).parents[2] / "docs" / "results")
    options.add_argument("parts", nargs="*", help="saves, cluster, partition; all, and written down, if none is named")
    args = options.parse_args()
    run = {"saves": saves.chaos, "cluster": lambda: cluster.chaos(args.folder), "partition": cluster.partition}
    sections = []
    for part in args.parts or PARTS:
        sections.append(run[part]())
        print(sections[-1], flush=True)
    if not args.parts:
        (args.folder / "chaos.md").write_text(HEAD + "\n".join(sections))


if __name__ == "__main__":
    main()
