"""What a run survives: `make chaos`, about an hour on two cores.

Writes docs/results/chaos.md, --folder for another place; parts that are named replace their own sections of it.
"""

import argparse
from pathlib import Path

from benchmarks.chaos import cluster, conversions, saves

HEAD = """# Chaos

Made by `make chaos`; a section alone by `make chaos ARGS=` and its name: saves, conversions, cluster, partition.

"""
PARTS = ("saves", "conversions", "cluster", "partition")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, default=Path(__file__).parents[2] / "docs" / "results")
    options.add_argument("parts", nargs="*", default=PARTS, metavar="PART", help=", ".join(PARTS))
    args = options.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    run = {
        "saves": saves.chaos,
        "conversions": conversions.chaos,
        "cluster": lambda: cluster.chaos(args.folder),
        "partition": cluster.partition,
    }
    for part in args.parts:
        section = run[part]()
        print(section, flush=True)
        _write(args.folder / "chaos.md", section)


def _write(report: Path, section: str) -> None:
    """Put a section, which begins with its heading, in the place of the one that has this heading, or at the end."""
    _, *sections = report.read_text().split("\n## ") if report.exists() else [""]
    found = {one.partition("\n")[0]: one.strip() for one in (*sections, section.removeprefix("## "))}
    report.write_text(HEAD + "\n\n".join(f"## {one}" for one in found.values()) + "\n")


if __name__ == "__main__":
    main()
