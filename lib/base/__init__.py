"""What everything stands on: errors, exit codes, whole files, who a process is, progress. Knows nothing else of lib."""
