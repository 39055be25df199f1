"""How often the loops of an optimised HLO module run [§3.1]: as stated, or from what their conditions and bodies compute.

A loop's trip count is known where its condition compares an element of the loop's state with a constant and the body adds a
constant to that element. Constants may come from outside, through loops that hand them on and through fusions.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from dsv3_jax.planner.hlo_text import Computation, Instruction, Module

# What is known of an integer: (None, c) is the constant c, (j, c) is c more than element j of a loop's state.
Known = tuple[int | None, int] | None
# What is known of a parameter of a computation, or of an element of a parameter that is a tuple.
Argument = Callable[[int, int | None], Known]

_STATED = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_INDEX = re.compile(r"\bindex=(\d+)")
_DIRECTION = re.compile(r"\bdirection=(\w+)")
_MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier")


def nothing(parameter: int, element: int | None) -> Known:
    return None


def itself(parameter: int, element: int | None) -> Known:
    """The symbol for an element of a loop's state."""
    return None if element is None else (element, 0)


class Scope(NamedTuple):
    """A computation, with what is known of its parameters."""

    module: Module
    inside: Computation
    argument: Argument = nothing

    def enter(self, name: str, operands: list[str]) -> "Scope":
        """The scope of a computation that is called with these operands."""

        def argument(parameter: int, element: int | None) -> Known:
            return self.value(operands[parameter]) if element is None else self.element(operands[parameter], element)

        return Scope(self.module, self.module.computations[name], argument)

    def called(self, caller: Instruction) -> "Scope":
        """The scope within a fusion, a call or an asynchronous wrapper."""
        return self.enter(caller.called("calls", "to_apply")[0], caller.names)

    def value(self, name: str) -> Known:
        instruction = self.inside.instructions[name]
        opcode, names = instruction.opcode, instruction.names
        if opcode == "constant":
            number = re.fullmatch(r"[{ ]*(-?\d+)[ }]*", instruction.operands)
            return (None, int(number[1])) if number else None
        if opcode == "parameter":
            return self.argument(int(instruction.operands), None)
        if opcode == "get-tuple-element":
            return self.element(names[0], int(instruction.find(_INDEX)))
        if opcode in _SAME:
            return self.value(names[0])
        if opcode in ("fusion", "call"):
            inner = self.called(instruction)
            return inner.value(inner.inside.root)
        if opcode in ("add", "subtract"):
            left, right = map(self.value, names)
            if left and right and opcode == "add" and (left[0] is None or right[0] is None):
                return right[0] if left[0] is None else left[0], left[1] + right[1]
            if left and right and opcode == "subtract" and right[0] is None:
                return left[0], left[1] - right[1]
        return None

    def element(self, name: str, index: int) -> Known:
        """What is known of one element of a tuple."""
        instruction = self.inside.instructions[name]
        if instruction.opcode == "parameter":
            return self.argument(int(instruction.operands), index)
        if instruction.opcode == "tuple":
            return self.value(instruction.names[index])
        if instruction.opcode == "while" and not self._loop(instruction, "body", itself).hands_on(index):
            return None
        return self.element(instruction.names[0], index) if instruction.opcode in ("while", *_SAME) else None

    def comparison(self, name: str) -> tuple[str, Known, Known] | None:
        instruction = self.inside.instructions[name]
        if instruction.opcode in ("fusion", "call"):
            inner = self.called(instruction)
            return inner.comparison(inner.inside.root)
        if instruction.opcode in _SAME:
            return self.comparison(instruction.names[0])
        if instruction.opcode != "compare":
            return None
        left, right = map(self.value, instruction.names)
        return instruction.find(_DIRECTION), left, right

    def hands_on(self, index: int) -> bool:
        """Whether a loop's body, its state unknown, returns this element as it got it."""
        return self.element(self.inside.root, index) == (index, 0)

    def loop(self, loop: Instruction) -> tuple[int | None, "Scope", "Scope"]:
        """The trip count of a while instruction, if it can be known, and the scopes of its body and condition."""
        body = self._loop(loop, "body", itself)

        def constants(parameter: int, element: int | None) -> Known:
            return self.element(loop.names[0], element) if element is not None and body.hands_on(element) else None

        def state(parameter: int, element: int | None) -> Known:
            return constants(parameter, element) or itself(parameter, element)

        stated = loop.find(_STATED)
        trips = int(stated) if stated else self._trips(loop, *(self._loop(loop, part, state) for part in ("body", "condition")))
        return trips, self._loop(loop, "body", constants), self._loop(loop, "condition", constants)

    def _loop(self, loop: Instruction, part: str, argument: Argument) -> "Scope":
        return Scope(self.module, self.module.computations[loop.called(part)[0]], argument)

    def _trips(self, loop: Instruction, body: "Scope", condition: "Scope") -> int | None:
        direction, left, right = condition.comparison(condition.inside.root) or ("", None, None)
        if left and right and left[0] is None:  # the constant stands on the left
            direction, left, right = _MIRRORED.get(direction, ""), right, left
        if not left or not right or left[0] is None or right[0] is not None or direction not in _MIRRORED:
            return None
        start, following = self.element(loop.names[0], left[0]), body.element(body.inside.root, left[0])
        if not start or start[0] is not None or not following or following[0] != left[0]:
            return None
        step = following[1]
        if step == 0 or (step > 0) != (direction in ("LT", "LE")):
            return None  # it never ends
        return len(range(start[1] + left[1], right[1] + {"LE": 1, "GE": -1}.get(direction, 0), step))
