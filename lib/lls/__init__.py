"""Log-likelihood shift: what a system prompt does to the likelihood of responses.
Public: experiment (LLS, LLSCross), numbers (LLSNumbers), kernel.compute, export.export, report.report."""
