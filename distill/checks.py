"""Warnings about a result that is easily misread, each with an anchor of the README that says what to do."""

from __future__ import annotations

from distill.contracts import Defense
from distill.records import Result

README = "README.md"


def flags(result: Result, defense: Defense, recovery: str) -> list[str]:
    """One line for each trap that this result is in."""
    found = []
    teacher, student = result.sizes["teacher"], result.sizes["student"]
    small, large = student["flops_per_query"], teacher["flops_per_query"]
    if small is not None and large is not None and small >= large:
        found.append(f"the student is not cheaper than its teacher ({README}#student-not-cheaper)")
    if recovery == "as_returned" and result.profile != "label" and not defense.deterministic:
        found.append(f"a random defense was attacked without averaging ({README}#random-defense)")
    moved = result.utility.get("l1_max", 0) > 0 and result.profile not in ("label", "top_1")
    if recovery == "as_returned" and moved and defense.keeps_argmax:
        found.append(f"a defense that keeps the arg-max was attacked without recovery=top1 ({README}#top1)")
    if result.config["access"]["profile"] == "weights":
        found.append(f"the student may copy its teacher's weights, which no attacker has ({README}#white-box)")
    accuracy = {who: row["accuracy"] for who, row in result.accuracy.items() if "accuracy" in row}
    if accuracy and accuracy["student"] > accuracy["defended_teacher"]:
        found.append(f"the student is more accurate than what honest users get ({README}#defended-below-student)")
    return found
