"""One short script a job: config in, kernel and store wired together. python -m jobs.NAME --config F [key=value ...]"""
