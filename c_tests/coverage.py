#!/usr/bin/env python3
"""Compares what the C programs saw with what the header promises.

coverage.py HEADER COVERAGE UNPROVOKED: prints, for each exported function, success and every error its comment documents
as covered, MISSING, or not provokable (with the reason that UNPROVOKED gives). Exit status 1 when something is MISSING, or
when a function gave an errno that is not documented.
"""
import re
import sys

NAMED = re.compile(r"-(E[A-Z0-9]+)\b")
MANUAL = re.compile(r"those of ((?:open|io_uring_enter)\(2\))")
REFERENCE = re.compile(r"\b(?:as|those of) (ringest_\w+)")


def parse(header):
    """Functions with their comments and parameter text, and what the comments of handle types add."""
    functions, types, comment = {}, {}, []
    lines = iter(open(header).read().splitlines())
    for line in lines:
        if line.startswith("//"):
            comment.append(line[2:].strip())
            continue
        declared = re.match(r"(?:const )?\w+ \*?(ringest_\w+)\(", line)
        if declared and not line.startswith("typedef"):
            while not line.rstrip().endswith(";"):
                line += " " + next(lines).strip()
            functions[declared[1]] = ("\n".join(comment), line)
        handle = re.match(r"struct (ringest_\w+);$", line)
        if handle:
            types[handle[1]] = set(NAMED.findall("\n".join(comment)))
        comment = []
    return functions, types


def errors(name, functions, seen=()):
    """What the comment of a function documents: errnos and manual pages, references resolved."""
    text = " ".join(functions[name][0].split())
    if "Errors:" not in text:
        return set()
    text = text.split("Errors:", 1)[1]
    found = {"-" + errno for errno in NAMED.findall(text)} | set(MANUAL.findall(text))
    for other in REFERENCE.findall(text):
        if other not in seen and other in functions:
            found |= errors(other, functions, (*seen, name))
    return found


def main(header, coverage, unprovoked):
    functions, types = parse(header)
    try:
        covered = {tuple(line.split()) for line in open(coverage)}
    except FileNotFoundError:
        print("nothing was recorded: run the programs first")
        return 1
    reasons = {}
    for line in open(unprovoked):
        if line.strip() and not line.startswith("#"):
            function, outcome, reason = line.rstrip("\n").split(" ", 2)
            reasons[function, outcome] = reason
    bad, counts = [], {"covered": 0, "not provokable": 0, "MISSING": 0}
    for name, (comment, declaration) in functions.items():
        cells = []
        documented = errors(name, functions)
        for outcome in ["ok", *sorted(documented)]:
            if (name, outcome) in covered:
                state = "covered"
                if (name, outcome) in reasons:
                    bad.append(f"{name} {outcome} is covered, yet listed as not provokable")
            elif (name, outcome) in reasons:
                state = "not provokable"
                outcome += f" ({reasons[name, outcome]})"
            else:
                state = "MISSING"
                bad.append(f"{name} {outcome} is MISSING")
            counts[state] += 1
            cells.append(outcome if state == "covered" else f"{state}: {outcome}")
        print(f"{name:44} {', '.join(cells)}")
        parameter = re.search(r"\((?:const )?struct (ringest_\w+) \*\w", declaration)
        allowed = documented | {"-" + errno for errno in types.get(parameter[1] if parameter else "", ())}
        # What a manual page documents is its own matter, and so is what a driver says.
        if not any("(2)" in outcome for outcome in documented) and "the CUDA driver" not in comment.replace("\n", " "):
            for function, outcome in covered:
                if function == name and outcome.startswith("-") and outcome not in allowed:
                    bad.append(f"{name} gave {outcome}, which its comment does not document")
    for function, outcome in reasons:
        if function not in functions:
            bad.append(f"{function} {outcome} is listed as not provokable, but there is no such function")
    print(f"{len(functions)} functions, {', '.join(f'{count} {state}' for state, count in counts.items())}")
    for line in sorted(bad):
        print(line)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
