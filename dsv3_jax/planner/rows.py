"""What a plan consists of: sections of labelled figures, as plain data.

Values are in base units (bytes, FLOP, seconds, dollars); `table.py` scales them for people.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Number = int | float
Value = Number | str | None
Origin = Literal["input", "derived"]


class Row(NamedTuple):
    """One figure, or one for each of its section's columns, in one unit or one for each.

    `key` is stable: other programs look figures up by it, and may set a column of their own beside ours.
    """

    key: str
    label: str
    values: tuple[Value, ...]
    units: tuple[str, ...]
    origin: Origin = "derived"
    note: str = ""

    def unit(self, column: int) -> str:
        return self.units[column if len(self.units) > 1 else 0]


class Section(NamedTuple):
    key: str
    title: str
    rows: tuple[Row, ...]
    columns: tuple[str, ...] = ("value",)


@dataclass(frozen=True)
class Plan:
    sections: tuple[Section, ...]
    assumptions: tuple[str, ...]

    def section(self, key: str) -> Section:
        """Raises KeyError if there is none."""
        return {section.key: section for section in self.sections}[key]

    def value(self, section: str, key: str, column: str = "value") -> Any:
        """One figure. Raises KeyError if there is none."""
        found = self.section(section)
        rows = {row.key: row for row in found.rows}
        return rows[key].values[found.columns.index(column)]

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for JSON."""
        return {
            "sections": {
                section.key: {
                    "title": section.title,
                    "rows": {
                        row.key: {
                            "label": row.label,
                            **dict(zip(section.columns, row.values, strict=True)),
                            "unit": row.units[0] if len(row.units) == 1 else list(row.units),
                            "origin": row.origin,
                            "note": row.note,
                        }
                        for row in section.rows
                    },
                }
                for section in self.sections
            },
            "assumptions": list(self.assumptions),
        }


def figure(key: str, label: str, value: Value, unit: str = "", origin: Origin = "derived", note: str = "") -> Row:
    """A row of a section with one column."""
    return Row(key, label, (value,), (unit,), origin, note)
