"""What an experiment is, where it lies, and the one lifecycle of every task. Knows not which experiment it is."""
