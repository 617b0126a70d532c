"""gpu.sh's raw output as JSON: each section's status, seconds, tables and the end of its output.

    python benchmarks/gpu_summary.py RAW JSON
"""
import json
import re
import sys
from pathlib import Path


def tables(lines):
    """The Markdown tables in `lines`, each a list of rows {column: cell}."""
    found, rows = [], []
    for line in [*lines, ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip()[1:-1].split("|")])
        elif rows:
            found.append([dict(zip(rows[0], row, strict=False)) for row in rows[2:]])  # rows[1] is of dashes
            rows = []
    return found


def sections(text):
    """[{name, status, seconds, said, output, tables}] from gpu.sh's output; an unfinished section is "CUT"."""
    found = []
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        end = re.search(r"^(PASS|FAIL|SKIP) " + re.escape(name) + r" \((\d+) s\)(?:: (.*))?\s*\Z", body, re.MULTILINE)
        output = body[:end.start()] if end else body
        status, seconds, said = end.groups() if end else ("CUT", None, None)
        command = re.search(r"^\$ (.*)$", output, re.MULTILINE)
        found.append({"name": name, "status": status, "seconds": seconds and int(seconds), "said": said,
                      "command": command and command[1], "tables": tables(output.splitlines()),
                      "output": output[-4000:]})
    return found


def main():
    raw, summary = map(Path, sys.argv[1:])
    found = sections(raw.read_text(errors="replace"))
    failed = [section["name"] for section in found if section["status"] not in ("PASS", "SKIP")]
    result = "FAIL" if failed or not found else "PASS"
    said = {"raw": raw.name, "result": result, "failed": failed, "sections": found}
    summary.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
