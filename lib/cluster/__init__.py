"""What Slurm says, submission, the box without Slurm, status, preflight. Knows no model, no torch.
Public: submit.submit, status.status, doctor.check; `python -m jobs.cluster` is their command line."""

from lib.base.later import later

later("h5py", "numpy")  # most commands read no array, and an import of them is a third of their time
