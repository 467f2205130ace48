"""All tests in three processes at once, which is right for two cores: one begins with those on a real Slurm, which
mostly wait, and each takes file after file of what is left (tests/conftest.py).

python tests/parts.py ["pytest's arguments, parted and quoted as in a shell"]"""

import os
import shlex
import subprocess
import sys
import tempfile
from contextlib import ExitStack

PROCESSES = 3
NOTHING_COLLECTED = 5


def main(arguments: list[str]) -> int:
    pytest = [sys.executable, "-m", "pytest", "-o", "console_output_style=classic", *arguments]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads than cores wait by spinning
    with ExitStack() as stack:
        os.environ["SUITE_TESTS_TAKEN"] = stack.enter_context(tempfile.TemporaryDirectory())
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(PROCESSES - 1)]
        others = [subprocess.Popen(pytest, stdout=out, stderr=subprocess.STDOUT) for out in said]
        try:
            codes = {subprocess.call(pytest)}
        finally:
            codes |= {other.wait() for other in others}
            for number, out in enumerate(said, 2):
                out.seek(0)
                print(f"\nProcess {number}:\n{out.read().decode(errors='replace')}", flush=True)
    return max(map(abs, codes - {NOTHING_COLLECTED}), default=NOTHING_COLLECTED)  # below 0: ended by a signal


if __name__ == "__main__":
    sys.exit(main(shlex.split(" ".join(sys.argv[1:]))))
