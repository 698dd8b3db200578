"""Which processes train which student: the section `multidistillation` of a base file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StudentPlan:
    """One student: its name, its configuration file and the ranks [first, last) that train it."""

    name: str
    config_path: str
    first: int
    last: int


@dataclass(frozen=True)
class DistillationPlan:
    """All students, and the images per iteration that each of them sees."""

    global_batch_size: int
    students: tuple[StudentPlan, ...]

    @classmethod
    def from_config(cls, config: Any) -> "DistillationPlan":
        """Read a base file (nested plain data).

        Raises:
            ValueError: multi-distillation isn't enabled there, or something is missing.
        """
        section = config.get("multidistillation") or {}
        if not section.get("enabled"):
            raise ValueError("--multi-distillation needs a --config-file with multidistillation.enabled: true")
        size, students = section.get("global_batch_size"), section.get("students")
        if not isinstance(size, int) or size <= 0:
            raise ValueError(f"multidistillation.global_batch_size must be a positive integer, got {size!r}")
        if not isinstance(students, list) or not students:
            raise ValueError(f"multidistillation.students must be a list of students, got {students!r}")
        return cls(size, tuple(_read_student(student) for student in students))

    @property
    def subgroup_ranks(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each student."""
        return tuple(tuple(range(student.first, student.last)) for student in self.students)

    def problems(self) -> list[str]:
        """What is wrong whatever the number of processes is."""
        problems = []
        names = [student.name for student in self.students]
        if len(set(names)) < len(names):
            problems.append(f"multidistillation.students must have different names, got {names}")
        ranks = [rank for subgroup in self.subgroup_ranks for rank in subgroup]
        if sorted(ranks) != list(range(len(ranks))):
            ranges = [[student.first, student.last] for student in self.students]
            problems.append(f"multidistillation: ranks_range must cover 0, 1, 2, … once, without gaps; got {ranges}")
        for student in self.students:
            if self.global_batch_size % (student.last - student.first):
                problems.append(
                    f"multidistillation.global_batch_size {self.global_batch_size} is not divisible by the "
                    f"{student.last - student.first} ranks of {student.name}"
                )
        return problems

    def check(self, world_size: int) -> None:
        """Compare with the number of processes.

        Raises:
            ValueError: the students need another number of processes, or contradict each other.
        """
        problems = self.problems()
        needed = sum(student.last - student.first for student in self.students)
        if needed != world_size:
            problems.append(f"the students need {needed} processes, but {world_size} were started")
        if problems:
            raise ValueError("; ".join(problems))

    def student_of(self, rank: int) -> StudentPlan:
        """The student that a process trains."""
        return next(student for student in self.students if student.first <= rank < student.last)


def _read_student(student: Any) -> StudentPlan:
    wanted = {"name", "config_path", "ranks_range"}
    if not isinstance(student, Mapping) or not wanted <= set(student):
        raise ValueError(
            f"an entry of multidistillation.students must have name, config_path, ranks_range; got {student!r}"
        )
    ranks = student["ranks_range"]
    if not (
        isinstance(ranks, list) and len(ranks) == 2 and all(isinstance(r, int) for r in ranks) and ranks[0] < ranks[1]
    ):
        raise ValueError(
            f"ranks_range of student {student['name']} must be [first, last) with first < last, got {ranks!r}"
        )
    return StudentPlan(str(student["name"]), str(student["config_path"]), ranks[0], ranks[1])
