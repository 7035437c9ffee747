"""`mirage sweep CONFIG --slurm`: the missing points as the commands of one job array (slurm/sweep.sh).

A file in `out`/slurm has a line for each element of the array, of fields that tabs part: the point's name, its run
directory, and the words of each command, quoted for a shell. The file is named by its content and never changes: an
array that waits in the queue keeps its points whatever is added to the sweep.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from mirage_dist import disk
from mirage_dist.schema import ConfigError
from mirage_dist.sweep import directory, pool
from mirage_dist.sweep.points import Plan


def commands(plan: Plan) -> tuple[Path, int] | None:
    """Write the file; returns it and the number of its lines, None when nothing is missing.

    Raises ConfigError where a worker of an evaluation needs several GPUs, and as `claim`.
    """
    if plan.gpus > 1:
        raise ConfigError(
            f"generation.tensor_parallel={plan.gpus}: the tasks of a sweep's job have one GPU each, as its trainings "
            "need; leave `evaluate` out and evaluate by slurm/eval_attacks.sh, or run the sweep on one machine"
        )
    out = directory.claim(plan)
    lines = []
    for point in plan.everything:
        fields = [shlex.join([step.verb, *step.words]) for step in pool.steps(plan, point)]
        if fields:
            lines.append("\t".join([point.name, str(point.run), *fields]))
    if not lines:
        return None
    text = "".join(f"{line}\n" for line in lines)
    file = out / "slurm" / f"points-{disk.sha256_text(text)[:8]}.tsv"
    disk.write(file, text)
    return file, len(lines)


def text(plan: Plan) -> str:
    """What to type next."""
    if (written := commands(plan)) is None:
        return f"{plan.sweep.out}: nothing is missing; mirage report --sweep {plan.sweep.out} makes the report"
    file, count = written
    array = f"--array=0-{count - 1}%8 --job-name={plan.sweep.name}"
    return "\n".join(
        [
            f"{count} of {len(plan.everything)} points are missing. Submit them, eight at a time, with your options:",
            f"  sbatch {array} --ntasks-per-node={plan.sweep.ranks} --gres=gpu:{plan.sweep.ranks} "
            f"slurm/sweep.sh {shlex.quote(str(file))}",
            "and when the array has ended:",
            f"  sbatch slurm/mirage.sh report --sweep {shlex.quote(plan.sweep.out)}",
        ]
    )
