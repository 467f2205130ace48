"""What Slurm says, submission, the box without Slurm, status, preflight. Knows no model, no torch.
Public: submit.submit, status.status, doctor.check; `python -m jobs.cluster` is their command line."""
