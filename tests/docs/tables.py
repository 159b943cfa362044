"""The tables of README that are made from the code; `python -m tests.docs.tables` writes them anew."""

import re
from pathlib import Path

from app import errors
from app.broker import doctor
from app.oauth2 import causes
from app.oauth2.provider import Provider
from app.settings import table

README = Path(__file__).resolve().parents[2] / "README.md"


def settings_table() -> str:
    """Every setting with its default and help."""
    lines = ["| name | default | |", "|---|---|---|"]
    for row in table():
        default = "" if row.default is None else f"`{row.default}`"
        lines.append(f"| `{row.name}` | {default} | {row.help.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def errors_table() -> str:
    """Every error code a caller can meet."""
    lines = ["| code | status | again? | what to do |", "|---|---|---|---|"]
    seen: dict[str, type[errors.DrawbridgeError]] = {}
    statuses: dict[str, set[int]] = {}
    for name in errors.__all__:
        kind = getattr(errors, name)
        if issubclass(kind, errors.StartRefused) or kind is errors.DrawbridgeError:
            continue
        seen.setdefault(kind.code, kind)
        statuses.setdefault(kind.code, set()).add(kind.status)
    for code, kind in sorted(seen.items(), key=lambda item: (min(statuses[item[0]]), item[0])):
        shown = "/".join(str(status) for status in sorted(statuses[code]))
        lines.append(f"| `{code}` | {shown} | {'yes' if kind.retryable else 'no'} | {kind.hint} |")
    return "\n".join(lines)


def causes_table() -> str:
    """Every cause the doctor knows, whose fault it is and who mends it, in the words for a plain provider."""
    lines = ["| cause | fault | what it means | who mends it |", "|---|---|---|---|"]
    for cause, fault in causes.FAULTS.items():
        said = causes.REMEDIES[cause].named(title="the provider", admin=Provider.account_admin)
        lines.append(f"| `{cause}` | {fault} | {said.sentence} | {said.who} |")
    for condition, (fault, remedy) in doctor.CONDITIONS.items():
        said = remedy.named(title="the provider", admin=Provider.account_admin)
        lines.append(f"| `{condition}` | {fault} | {said.sentence} | {said.who} |")
    return "\n".join(lines)


TABLES = {"settings": settings_table, "errors": errors_table, "causes": causes_table}


def with_tables(text: str) -> str:
    """README with the tables as they should be."""
    for name, made in TABLES.items():
        pattern = re.compile(rf"(<!-- {name}: begin -->\n).*?(\n<!-- {name}: end -->)", re.DOTALL)
        text = pattern.sub(lambda match, made=made: match[1] + made() + match[2], text)
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
