"""The table of results/reliability.md, from the logs of analysis/faults.py and analysis/mutations.py beside it."""

import json
import os
from collections import Counter
from statistics import median

HEAD = ("promise", "how it was tried", "how often", "broken", "with")
MOMENTS = {"any": "at a random time", "writing": "within a write"}


def _records(folder, name):
    with open(os.path.join(folder, f"{name}.jsonl"), encoding="utf-8") as file:
        head, *records = map(json.loads, file)
    script, *flags = head["command"]
    return f"`analysis/{script} {' '.join(flags[:flags.index('--out')])}`", records


def _fault_row(folder, name, promise, tried):
    command, records = _records(folder, name)
    faults = [record for record in records if "fault" in record]
    stages = ", ".join(f"{stage} {n}" for stage, n in Counter(record["stage"] for record in faults).items())
    kinds = ", ".join(f"{MOMENTS.get(kind, kind)} {n}" for kind, n in sorted(Counter(
        record.get("moment", record["fault"]) for record in faults).items()))
    ends = sum("ended_after" in record for record in records)
    broken = sum(record.get("verdict", "good") != "good" for record in records)
    return promise, tried, f"{len(faults)} ({stages}; {kinds}), then {ends} ends compared", broken, command


def _memory_row(folder):
    command, records = _records(folder, "long_run")
    often, broken = [], 0
    for stage in ("original", "deposit"):
        resident = [record["resident_kib"] / 1024 for record in records
                    if record["stage"] == stage and "epoch" in record]
        early, late = median(resident[10:20]), median(resident[-10:])
        often.append(f"{stage}: {len(resident)} epochs, {early:.1f} MiB in the 11th to 20th, "
                     f"{late:.1f} in the last ten")
        broken += late > 1.02 * early
    broken += sum(record.get("verdict", "good") != "good" for record in records)
    return ("memory stays flat, and the logs hold every epoch once",
            "resident memory after each epoch, medians; 2 % more are allowed", "; ".join(often), broken, command)


def _mutation_rows(folder):
    command, records = _records(folder, "mutations")
    for forged, promise, tried in (
            (False, "a damaged file is refused in one line, or gives what was written into it",
             "bytes flipped, cut, deleted, inserted, repeated, swapped, blanked; entries edited; sizes in headers, "
             "compressed members and code in pickles put in"),
            (True, "a forged file, its checksums made right again, is refused in one line or taken at its word, runs "
             "no code and takes no memory", "entries and tensors edited")):
        rows = [record for record in records if "cases" in record and (record["mutation"] == "forge") == forged]
        total = Counter()
        for row in rows:
            total.update({key: row.get(key, 0) for key in ("cases", "same", "refused", "accepted", "wrong")})
        yield (promise, tried, f"{total['cases']:,} on {len({row['file'] for row in rows})} kinds of file: "
               f"{total['refused']:,} refused, {total['same']:,} read as written, {total['accepted']:,} taken at their "
               f"word", total["wrong"], command)


def table(folder):
    """Markdown; a promise a row."""
    rows = [
        _fault_row(folder, "kills", "killed at any moment, the same command ends with the same files, bit for bit; no "
                   "file is half-written; no epoch is lost but the running one",
                   "SIGKILL at a random time or within a write, up to three in a row"),
        _fault_row(folder, "stops", "Ctrl-C and SIGTERM stop with one line that says how to go on, and lose no more "
                   "than a kill", "at a random time of the stage's work"),
        _fault_row(folder, "full_disk", "a full disk stops with one line, the last good files stay",
                   "writes fail beyond a random size of a file"),
        _memory_row(folder), *_mutation_rows(folder),
    ]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (HEAD, ("---",) * len(HEAD), *rows)) + "\n"
