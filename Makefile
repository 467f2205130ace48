# The front door. `make help` lists everything; CONFIG chooses the experiment, SET="key=value ..." overrides it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
CONFIG ?= $(if $(filter %-attributions,$(MAKECMDGOALS)),configs/sparc3_llama3_8b.yaml,configs/lls_72b.yaml)
ARRAY ?=
TASK ?=
SET ?=
python := .venv/bin/python
cluster = $(python) -m lib.cluster
flags = --config $(CONFIG) $(if $(DRY),--dry) $(SET)

.PHONY: help
help: ## this page
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z0-9-]+:.*## / {printf "  %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nVariables: CONFIG=%s  ARRAY=0-14  TASK=7  SET="key=value ..."  DRY=1  WATCH=1  JSON=1  DEEP=1\n' '$(CONFIG)'

##@ Start here
.PHONY: setup demo test
setup: ## make .venv with pinned packages (GPU or CPU builds, by itself; SUITE_BUILD=gpu on a login node)
	@env/setup.sh

demo: setup ## a small teacher: LLS of 15 animals, attribution of its neurons, by the cluster's code; minutes on 2 cores
	@$(python) -m jobs.demo

test: setup ## all tests, on a real throwaway Slurm (installs it on Debian/Ubuntu as root)
	@env/install-slurm.sh --tests || [ "$(CI)" != true ]
	@$(python) tests/halves.py $(ARGS)

##@ Before the first job
.PHONY: fetch doctor
fetch: setup ## bring models and datasets of CONFIG to the cache (login node); UPDATE=1 looks again what `main` is
	@$(python) -m jobs.fetch --config $(CONFIG) $(if $(UPDATE),--update) $(SET)

doctor: setup ## check account, partition, scratch, Python, driver, GPU, cache, token; each failure with its fix [DEEP=1]
	@$(cluster) doctor --config $(CONFIG) $(if $(DEEP),--deep) $(SET)

##@ Jobs (DRY=1 shows the script and the plan)
.PHONY: submit-lls submit-attributions resume cancel
submit-lls: setup ## submit LLS cells as an array: ARRAY=0-14 [CONFIG=...] [DRY=1]
	@$(cluster) submit $(flags) $(if $(ARRAY),--array $(ARRAY))

submit-attributions: setup ## submit attribution cells: ARRAY=0-3 (general seeds 0-2, toxic) [CONFIG=...] [DRY=1]
	@$(cluster) submit $(flags) $(if $(ARRAY),--array $(ARRAY))

resume: setup ## submit just the cells that nobody has finished, works on or waits for
	@$(cluster) resume $(flags)

cancel: setup ## end the experiment's queued and running tasks; finished shards stay
	@$(cluster) cancel --config $(CONFIG) $(SET)

##@ Watching
.PHONY: status logs
status: setup ## done, running, pending, failed, stale; rows/s, ETA, GPU-hours, what to type next [WATCH=1] [JSON=1]
	@$(cluster) status --config $(CONFIG) $(if $(JSON),--json) $(if $(WATCH),--watch) $(SET)

logs: setup ## the end of cell TASK's log; without TASK, of each cell that failed
	@$(cluster) logs --config $(CONFIG) $(if $(TASK),--task $(TASK)) $(SET)

##@ Results
.PHONY: verify export-lls export-attributions
verify: setup ## read every byte of every shard and say what does not hold
	@$(cluster) verify --config $(CONFIG) $(SET)

export-lls: setup ## merge the shards exactly; write JSONL, table and plots to the output root
	@$(python) -m jobs.export_lls --config $(CONFIG) $(SET)

export-attributions: setup ## merge attribution's shards; means a neuron, table, stability and plots to the output root
	@$(python) -m jobs.export_attributions --config $(CONFIG) $(SET)

.PHONY: lls-report
lls-report: setup ## LLS as a static page with tables and PNGs: MEASURE="sum+end@20" SELECT="top:0.2 clean:0.2" (training rows)
	@$(python) -m jobs.lls_report --config $(CONFIG) --measure "$(or $(MEASURE),mean)" --select "$(SELECT)" $(SET)

##@ Speed
.PHONY: bench
bench: setup ## measure on this machine's GPUs: floors, ours, the plain loop [MODELS="0.5b 7b"] [RUNGS="ours vllm"]
	@$(python) -m jobs.bench $(if $(MODELS),--models $(MODELS)) $(if $(RUNGS),--rungs $(RUNGS))

##@ A box of your own
.PHONY: slurm-up slurm-down
slurm-up: ## a real single-node Slurm here, with its GPUs and accounting (Debian/Ubuntu); then `. .slurm/env.sh`
	@env/install-slurm.sh && env/slurm-up.sh

slurm-down: ## stop it, and its jobs
	@env/slurm-down.sh

##@ For developers
.PHONY: lint format
lint: setup ## ruff (format and lint) and shellcheck
	@$(python) -m ruff format --check . && $(python) -m ruff check . && $(MAKE) -s shellcheck

.PHONY: shellcheck
shellcheck:
	@shellcheck -x env/*.sh slurm/*.sh slurm/*.sbatch .ci/run

format: setup ## rewrite the sources as ruff wants them
	@$(python) -m ruff format . && $(python) -m ruff check --fix .
