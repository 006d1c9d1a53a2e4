"""Counts the faults that runs were made to meet, and how many of those runs ended with the same bits."""

from collections import Counter


def pytest_terminal_summary(terminalreporter):
    faults, equal = Counter(), Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for kind, (moment, signal) in report.user_properties:
                if kind == "fault" and report.when == "call":
                    faults[moment, signal] += 1
                    equal[moment] += outcome == "passed"
    if not faults:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'':<45} SIGKILL  SIGTERM  same bits")
    for moment in dict.fromkeys(moment for moment, _ in faults):
        kills = [faults[moment, signal] for signal in ("SIGKILL", "SIGTERM")]
        terminalreporter.write_line(f"{moment:<45} {kills[0]:>7}  {kills[1]:>7}  {equal[moment]:>9}")
    kills = [sum(n for (_, kind), n in faults.items() if kind == signal) for signal in ("SIGKILL", "SIGTERM")]
    terminalreporter.write_line(f"{'all':<45} {kills[0]:>7}  {kills[1]:>7}  {sum(equal.values()):>9}")
