"""
python benchmarks [QUESTION ...] [options] - answers the questions, or those named, each in a process of its own, and
prints the tables of the README. `python benchmarks/QUESTION.py --help` has the options. The exit status is the worst
of all: 0 done, 1 a bar was missed or results disagree, 2 this machine cannot answer one.
"""

import pathlib
import subprocess
import sys

QUESTIONS = (
    "forward",
    "short",
    "options",
    "host",
    "validate",
    "tuning",
    "portable",
    "cpu",
    "autograd",
    "models",
    "training",
)


def main(arguments: list[str]) -> int:
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"{__doc__.strip()}\nQuestions: {', '.join(QUESTIONS)}")
        return 0
    named = []
    while arguments and not arguments[0].startswith("-"):
        named.append(arguments.pop(0))
    unknown = [name for name in named if name not in QUESTIONS]
    if unknown:
        print(f"no such question: {', '.join(unknown)}; there are {', '.join(QUESTIONS)}", file=sys.stderr)
        return 2
    here = pathlib.Path(__file__).resolve().parent
    commands = [[sys.executable, str(here / f"{name}.py"), *arguments] for name in named or QUESTIONS]
    return max(abs(subprocess.run(command, check=False).returncode) for command in commands)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
