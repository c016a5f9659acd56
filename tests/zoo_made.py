"""Members of a zoo, made once for all tests that look at them, and the bytes of its shards."""

from dataclasses import replace
from functools import cache
from pathlib import Path

from embedder.zoo.growing import make
from embedder.zoo.member import Member
from embedder.zoo.plan import SIZES, Job, jobs_of


def job_named(name: str, size: str = "sample") -> Job:
    """Return a job of a zoo of seed 0."""
    (found,) = [job for job in jobs_of(SIZES[size], 0) if job.name == name]
    return found


@cache
def members_of(name: str) -> tuple[Member, ...]:
    """Make a job, its trainings cut to a twelfth; tests must not change what they get."""
    job = job_named(name)
    short = replace(job.population, steps=job.population.steps // 12)
    return tuple(make(replace(job, population=short)))


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the shards of a zoo, byte by byte."""
    return {file.name: file.read_bytes() for file in sorted((folder / "shards").iterdir())}
