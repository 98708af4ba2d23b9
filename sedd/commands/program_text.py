"""Read figures from the text of a compiled program: what travels between devices, and sizes.

XLA reports memory and FLOPs, but not its collectives. They are counted in the text of the program
(HLO): a list of computations, each with one instruction a line, such as::

    %all-gather.3 = f32[8,1024]{1,0} all-gather(%param.7), replica_groups={{0,1}}, ...
"""

import math
import re
from collections.abc import Sequence

GIB = 2**30
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# StableHLO's names of element types that HLO calls otherwise, and the bytes of an element.
KINDS = {"i1": "pred", "i8": "s8", "i32": "s32", "ui32": "u32", "i64": "s64"}
WIDTH = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}


def collectives_of(text: str) -> dict[str, tuple[int, int]]:
    """Count the collectives of each kind in a compiled program, and the bytes of their results.

    From the entry computation the function follows every call, body of a loop and branch. A
    collective in a loop counts once for each iteration, or once if the trip count is not known.

    Args:
        text: the compiled program (HLO).

    Returns:
        For each kind that occurs, the number of collectives in one run and their bytes.
    """
    found: dict[str, tuple[int, int]] = dict.fromkeys(COLLECTIVES, (0, 0))
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = lines
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = computations.setdefault(head[2], [])
            entry = lines if head[1] else entry
        lines.append(line)

    chains = set()

    def visit(lines: Sequence[str], times: int) -> None:
        for line in lines:
            if moved := re.search(rf"= (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(", line):
                if re.search(r"replica_groups=(\{\{\d+\}|\[\d+,1\])", line):
                    continue  # groups of one device: nothing travels
                # The start, update and end of one asynchronous collective have one chain_id.
                if chain := re.search(r'chain_id="(\d+)"', line):
                    if chain[1] in chains:
                        continue
                    chains.add(chain[1])
                result, kind, starts = moved.groups()
                arrays = [size for size in sizes(result) if size]
                if (
                    starts and kind != "all-reduce"
                ):  # its type lists the operands before the results
                    arrays = arrays[len(arrays) // 2 :]
                count, total = found[kind]
                found[kind] = (count + times, total + times * sum(arrays))
            loops = trips(line, computations) if " while(" in line else 1
            for name in called(line):
                visit(computations.get(name, ()), times * loops)

    visit(entry, 1)
    return {kind: figures for kind, figures in found.items() if figures[0]}


def trips(loop: str, computations: dict[str, list[str]]) -> int:
    """Find the trip count of a loop in its annotation, or as the one constant of its condition.

    Args:
        loop: the line of the ``while`` instruction.
        computations: the lines of every computation, by name.

    Returns:
        The trip count; 1 if it is not known.
    """
    if said := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop):
        return int(said[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop)
    lines = computations.get(condition[1], []) if condition else []
    bounds = re.findall(r"= s32\[\]\S* constant\((\d+)\)", "\n".join(lines))
    # A loop that asks whether anything is left compares with 0.
    return int(bounds[0]) if len(bounds) == 1 and bounds != ["0"] else 1


def called(line: str) -> list[str]:
    """The names of the computations that an instruction calls: bodies, branches, plain calls.

    The scalar functions with which reductions combine two elements are left out.
    """
    names = re.findall(r"(?:body|calls|(?:true|false)_computation)=%?([\w.-]+)", line)
    if branches := re.search(r"branch_computations=\{(.*?)\}", line):
        names += [name.strip().lstrip("%") for name in branches[1].split(",")]
    if " call(" in line:
        names += re.findall(r"to_apply=%?([\w.-]+)", line)
    return names


def sizes(result: str) -> list[int]:
    """Bytes of every array in the type of a result, such as ``(f32[8,16]{1,0}, u32[])``."""
    found = []
    for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
        count = 1
        for size in filter(None, shape.split(",")):
            count *= int(size)
        found.append(count * WIDTH.get(kind, 4))
    return found


def exhausted(message: str, program: str) -> str:
    """The compiler's out-of-memory message on one line, with the four largest arrays.

    Args:
        message: the compiler's error.
        program: the program before compilation (StableHLO), which names the shapes.
    """
    first = " ".join(message.splitlines()[0].split()).removeprefix("RESOURCE_EXHAUSTED: ")
    shapes = set(re.findall(r"tensor<((?:\d+x)+[a-z]+\d+)>", program))
    largest = sorted(shapes, key=tensor_bytes, reverse=True)[:4]
    named = ", ".join(f"{shape} ({gib(tensor_bytes(shape))})" for shape in largest)
    return f"{first.rstrip('.')}; the largest arrays are {named}"


def tensor_bytes(shape: str) -> int:
    """Bytes of an array written as ``8x1024xbf16``."""
    *dimensions, kind = shape.split("x")
    return math.prod(map(int, dimensions)) * WIDTH.get(KINDS.get(kind, kind), 4)


def gib(size: float) -> str:
    """A number of bytes as text in MiB or GiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
