"""Log-likelihood shift: what a system prompt does to the likelihood of responses.
Public: experiment (LLS, LLSCross), kernel.compute, export.export, report.report."""
