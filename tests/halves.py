"""All tests in two processes at once: those on Slurm and local workers mostly wait, others compute.

python tests/halves.py ["pytest's arguments, parted and quoted as in a shell"]"""

import os
import shlex
import subprocess
import sys
import tempfile

NOTHING_COLLECTED = 5


def main(arguments: list[str]) -> int:
    pytest = [sys.executable, "-m", "pytest", *arguments]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads than cores wait by spinning
    with tempfile.TemporaryFile() as said:
        waiting = subprocess.Popen([*pytest, "-m", "waits"], stdout=said, stderr=subprocess.STDOUT)
        try:
            codes = {subprocess.call([*pytest, "-m", "not waits"])}
        finally:
            codes |= {waiting.wait()}
            said.seek(0)
            print(f"\nOn Slurm and local workers:\n{said.read().decode(errors='replace')}", flush=True)
    return max(map(abs, codes - {NOTHING_COLLECTED}), default=NOTHING_COLLECTED)  # below 0: ended by a signal


if __name__ == "__main__":
    sys.exit(main(shlex.split(" ".join(sys.argv[1:]))))
