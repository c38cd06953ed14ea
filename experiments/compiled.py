"""What a compiled program does, read from its text: products, cycles and collectives, each loop's as often as it runs.

XLA's own cost analysis counts the body of a loop once, and a model's layers are a loop.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
OPERATION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z\d\-]*)\((.*)")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
CALLED = re.compile(r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


class Operation(NamedTuple):
    name: str
    type: str  # of what comes out: "bf16[8,128]{1,0}", or a tuple of such
    kind: str
    rest: str  # operands and attributes


class Work(NamedTuple):
    """Of one device, in one run of the program; a loop that may end early is taken to its end."""

    flops: float  # of matrix products
    cycles: float  # the compiler's estimates, which TPU's writes down, summed; collectives have none
    collectives: dict  # kind: (how many, bytes), by the larger of what goes in and what comes out
    largest: dict  # kind: bytes of the largest one


def read(text: str) -> dict[str, list[Operation]]:
    """The operations of each computation; those of the program itself under "ENTRY"."""
    found, name = {}, None
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            name = "ENTRY" if head[1] else head[2]
            found[name] = []
        elif name and (operation := OPERATION.match(line)):
            found[name].append(Operation(*operation.groups()))
    return found


def sizes(type_: str) -> list[tuple[tuple, float]]:
    """(shape, bytes) of each array of a type."""
    arrays = []
    for kind, bits, shape in ARRAY.findall(type_):
        shape = tuple(int(size) for size in shape.split(",") if size)
        arrays.append((shape, math.prod(shape) * (1 if kind == "pred" else int(bits) / 8)))
    return arrays


def named(operation: Operation) -> list[str]:
    """The names of its operands."""
    return re.findall(r"%([\w.\-]+)", operation.rest.partition(")")[0])


def numbers(operations) -> dict[str, int]:
    """The whole numbers among the constants, by name."""
    found = [(x.name, x.rest.partition(")")[0]) for x in operations if x.kind == "constant" and x.type[:5] in ("s32[]", "u32[]")]
    return {name: int(value) for name, value in found}


def trips(computations: dict, inside: str, loop: Operation) -> int:
    """How often a loop runs, of a computation `inside`: from where its counter begins to its bound, by the counter's step."""
    end, held = bound(computations, loop), {x.name: x for x in computations[inside]}
    body = {x.name: x for x in computations[_part(loop, "body")]}
    first, last, constants = held[named(loop)[0]], [*body.values()][-1], numbers(body.values())
    begins, steps = [bound(computations, first)] if first.kind == "while" else [], [1]
    for scalar in computations[_part(loop, "condition")]:
        if scalar.kind != "get-tuple-element" or scalar.type[1:5] != "32[]":
            continue
        at = int(re.search(r"index=(\d+)", scalar.rest)[1])
        if first.kind == "tuple":
            begins.append(_value(computations, held, held.get(named(first)[at])))
        if (counter := body[named(last)[at]]).kind == "add":
            steps += [constants.get(x, 0) for x in named(counter)]
    return math.ceil((end - max([0, *(x for x in begins if x < end)])) / max(steps))


def bound(computations: dict, loop: Operation) -> int:
    """The largest number in a loop's condition; 1 where there is none, so that the loop counts once."""
    condition = _part(loop, "condition")
    tests = [condition, *(x for operation in computations[condition] for x in CALLED.findall(operation.rest))]
    return max((number for name in tests for number in numbers(computations[name]).values()), default=1)


def _value(computations: dict, held: dict, operation: Operation | None) -> int:
    """A whole number that an operation gives: a constant, or what a loop has counted to; else 0."""
    while operation and operation.kind in ("copy", "bitcast", "get-tuple-element"):
        operation = held.get(named(operation)[0])
    if operation and operation.kind == "while":
        return bound(computations, operation)
    return numbers([operation]).get(operation.name, 0) if operation else 0


def _part(loop: Operation, part: str) -> str:
    """The name of the computation that is a loop's condition or body."""
    return re.search(rf"{part}=%?([\w.\-]+)", loop.rest)[1]


def work(text: str) -> Work:
    """Of a program's text, as `compiled.as_text()` gives it."""
    computations, flops, cycles = read(text), 0.0, 0.0
    seen = {}  # channel: (times, kind, bytes); what is asynchronous stands where it begins and ends, and in the loops between

    def visit(name, times, fused=False):
        nonlocal flops, cycles
        types = {operation.name: operation.type for operation in computations[name]}
        for operation in computations[name]:
            operands = [types[x] for x in named(operation) if x in types]
            if operation.kind in ("dot", "convolution"):
                flops += times * _product(operation, operands)
            if not fused and (told := re.search(r'"estimated_cycles":"(\d+)"', operation.rest)):
                cycles += times * int(told[1])
            kind = operation.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                size = max(sum(size for _, size in sizes(x)) for x in (operation.type, " ".join(operands)))
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
                channel = re.search(r"channel_id=(\d+)", operation.rest)
                key = channel[1] if channel else (name, operation.name)
                seen[key] = min(seen.get(key, (times, kind, size)), (times, kind, size))
            if operation.kind == "while":
                visit(_part(operation, "body"), times * trips(computations, name, operation))
                continue
            branches = re.search(r"branch_computations=\{(.*?)\}", operation.rest)
            for callee in [*CALLED.findall(operation.rest), *re.findall(r"[\w.\-]+", branches[1] if branches else "")]:
                if callee in computations:
                    visit(callee, times, fused or operation.kind != "conditional")

    visit("ENTRY", 1)
    count, size, largest = Counter(), Counter(), Counter()
    for times, kind, one in seen.values():
        count[kind] += times
        size[kind] += times * one
        largest[kind] = max(largest[kind], one)
    return Work(flops, cycles, {kind: (count[kind], size[kind]) for kind in count}, dict(largest))


def _product(operation: Operation, operands: list[str]) -> float:
    """2 BMKN of [B,M,K] x [B,K,N] = [B,M,N], in whatever axes: 2 sqrt(product of the three sizes / B), B being in all of them."""
    left, right, out = (sizes(x)[0][0] for x in (*operands, operation.type))
    shared = 1
    if labels := re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", operation.rest):
        axes = [dict(zip(named, shape, strict=True)) for named, shape in zip(labels.groups(), (left, right, out), strict=True)]
        for axis, size in axes[0].items():
            if axis.isdigit() and axes[1][axis] == axes[2][axis] == size:
                shared *= size
        groups = re.search(r"feature_group_count=(\d+)", operation.rest)
        shared *= int(groups[1]) if groups else 1
    elif batch := re.search(r"lhs_batch_dims=\{([\d,]+)\}", operation.rest):
        shared = math.prod(left[int(axis)] for axis in batch[1].split(","))
    return 2 * math.sqrt(math.prod(left) * math.prod(right) * math.prod(out) / shared)
