"""The demo: build shards, train with tensor parallelism, stop half-way, resume with pipeline parallelism, evaluate.

Every step is a command that a user would type, shown as it runs. `--json` prints the summary as one JSON line.
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

from rich.console import Console

from armillary.errors import ArmillaryError, JobError

HERE = Path(__file__).parent
JOB = HERE / "easy_vqa.toml"
ARMILLARY = str(Path(sys.executable).with_name("armillary"))
QUESTIONS = (0, 2500, 4200, 6300, 8800)  # spread over the test split; chosen before any model was trained


def main() -> int:
    warnings.filterwarnings("ignore")  # of Megatron-core about packages that are not needed here
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", action="store_true", help="print the summary as one JSON line")
    options.add_argument("override", nargs="*", help="job keys, for example training.steps=100")
    args = options.parse_args()
    console = Console(stderr=args.json, highlight=False)
    started = time.monotonic()

    from armillary.launcher.job import load_job

    job = load_job(JOB, args.override)
    if job.training.steps < 2:
        raise JobError("the demo stops half-way, so it needs at least 2 steps", "training.steps", "give it more")
    half = job.training.steps // 2
    run_dir = f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}"

    if not Path(job.data.path).exists():
        armillary(console, "data", "build", JOB, *args.override)
    console.rule("train: two tensor-parallel ranks, to half-way", align="left")
    first = armillary(console, "train", JOB, *args.override, "--run-dir", run_dir, "--stop-at", half)
    console.rule("resume: two pipeline stages, to the end", align="left")
    layout = ("parallel.tensor=1", "parallel.pipeline=2", "parallel.micro_batch=2")
    summary = armillary(console, "resume", run_dir, *layout)
    console.rule("five questions about images that the model has not seen", align="left")
    answers = ask(console, run_dir)
    seconds = time.monotonic() - started

    console.rule("summary", align="left")
    result = {
        "seconds": round(seconds, 1),
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "tokens_per_second": {"tensor=2": first["tokens_per_second"], "pipeline=2": summary["tokens_per_second"]},
        "first_loss": summary["first_loss"],
        "last_loss": summary["last_loss"],
        "accuracy": summary["accuracy"],
        "blind_accuracy": summary["blind_accuracy"],
        "questions": summary["questions"],
        "answers": answers,
        "run": summary["run"],
        "metrics": summary["metrics"],
        "plot": summary["plot"],
    }
    if args.json:
        print(json.dumps(result))
    else:
        rates = ", ".join(f"{rate:,.0f} with {name}" for name, rate in result["tokens_per_second"].items())
        rows = {
            "steps": f"{result['steps']} in {seconds / 60:.1f} minutes, everything included",
            "tokens/s": rates,
            "loss": f"{result['first_loss']:.3f} at the first step, {result['last_loss']:.3f} at the last",
            "accuracy": f"{result['accuracy']:.3f} on the {result['questions']:,} questions of the test split",
            "blind": f"{result['blind_accuracy']:.3f} is the best score without looking at the images",
            "run": result["run"],
            "metrics": result["metrics"],
            "plot": result["plot"],
        }
        for name, value in rows.items():
            console.print(f"{name:>10}  {value}", soft_wrap=True)
    return 0


def armillary(console: Console, *words) -> dict:
    """Run one command, shown as a user would type it; its JSON summary. A failure ends the demo with its code."""
    command = [*map(str, words)]
    console.print(f"[bold]$ armillary {' '.join(command)}[/bold]", soft_wrap=True)
    done = subprocess.run([ARMILLARY, *command, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def ask(console: Console, run_dir: str) -> list[dict]:
    """Five questions of the test split, answered by the trained model with its key-value cache."""
    from armillary.data_pipeline.sources.easy_vqa import easy_vqa_questions
    from armillary.launcher.answer import Answerer

    test, answerer, answers = easy_vqa_questions("test"), Answerer(Path(run_dir)), []
    for number in QUESTIONS:
        question = test[number]
        answer = answerer.answer(question.text, question.image.read_bytes(), max_tokens=8)
        mark = "[green]right[/green]" if answer == question.answer else f"[red]it is {question.answer}[/red]"
        console.print(f"  {question.image.name:>8}  {question.text:42} {answer:10} {mark}")
        answers.append({"image": question.image.name, "question": question.text, "answer": answer,
                        "expected": question.answer})  # fmt: skip
    return answers


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ArmillaryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
