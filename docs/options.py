"""Write the table of a server's options into configuration.md: `python docs/options.py`."""

from __future__ import annotations

from pathlib import Path

from sharednorm_server.config.options import OPTIONS
from sharednorm_server.config.sources import PREFIX, default_text

PAGE = Path(__file__).with_name("configuration.md")
BEGIN, END = "<!-- options -->\n", "<!-- end -->"


def table() -> str:
    """Return the table."""
    lines = ["| option | variable | | expected | default |", "|---|---|---|---|---|"]
    for name, option in OPTIONS.items():
        value = f" {option.metavar}" if option.metavar else ""
        lines.append(
            f"| `--{name.replace('_', '-')}{value}` | `{PREFIX}{name.upper()}` | {option.help} | {option.expected} | "
            f"{default_text(name)} |"
        )
    return "\n".join(lines) + "\n"


def updated(page: str) -> str:
    """Return the page with the table as it is now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
