# The front door. `make help` lists everything; CONFIG chooses the experiment, SET="key=value ..." overrides it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
python := .venv/bin/python
cluster = $(python) -m jobs.cluster
unexport PYTHONDONTWRITEBYTECODE # images set it: each process would compile torch anew, 10 s of CPU

# Which variables mean something to which target. Others on make's command line are refused: a typo must not submit.
for_fetch := CONFIG SET UPDATE JOB
for_doctor := CONFIG SET DEEP GPU RUN_ID
for_submit := CONFIG SET ARRAY DRY CHAIN RUN_ID SIZES TRAITS PARTS
for_submit-lls := CONFIG SET ARRAY DRY
for_submit-attributions := CONFIG SET ARRAY DRY
for_submit-sparc3 := CONFIG SET DRY
for_submit-numbers := CONFIG SET RUN_ID SIZES TRAITS DRY
for_submit-finetune := CONFIG SET RUN_ID SIZES TRAITS PARTS DRY CHAIN
for_submit-preferences := CONFIG SET RUN_ID SIZES TRAITS PARTS DRY CHAIN
for_submit-subliminal := CONFIG SET RUN_ID SIZES TRAITS PARTS DRY
for_submit-publish := CONFIG SET RUN_ID SIZES TRAITS PARTS DRY
for_retire-epochs := CONFIG SET RUN_ID PUBLISH DRY
for_resume := CONFIG SET ARRAY DRY RUN_ID SIZES TRAITS PARTS
for_cancel := CONFIG SET RUN_ID
for_status := CONFIG SET WATCH JSON RUN_ID
for_logs := CONFIG SET TASK RUN_ID
for_verify := CONFIG SET RUN_ID
for_export-lls := CONFIG SET RUN_ID
for_export-attributions := CONFIG SET
for_export-numbers := CONFIG SET RUN_ID
for_export-finetune := CONFIG SET RUN_ID
for_export-preferences := CONFIG SET RUN_ID RUNS SURVEY
for_plots := $(for_export-preferences)
for_wandb-sync := CONFIG SET RUN_ID
for_report := CONFIG SET RUN_ID
for_import := CONFIG SET RUN_ID FROM STAGES
for_sparc3-report := CONFIG SET
for_sparsity-report := CONFIG SET
for_save-pruned := CONFIG SET RANKING NEURONS REMOVE
for_anchors := CONFIG SET
for_lls-report := CONFIG SET MEASURE SELECT RUN_ID
for_bench := MODELS RUNGS
for_test := ARGS
environment := SUITE_SITE SUITE_SCRATCH SUITE_CACHE SUITE_OUTPUT SUITE_THROTTLE SUITE_GPU SUITE_MODULES SUITE_SLURM \
  SUITE_BUILD SUITE_DRIVER SUITE_CPU_PARTITION SUITE_MAX_REQUEUES SUITE_FIGURES SUITE_MAIL FASRC_LAB FASRC_ACCOUNT FASRC_SCRATCH \
  PYTHON CI
others := PATH HOME TMPDIR USER %_proxy SBATCH_% SLURM_% HF_% PIP_% UV_% OMP_% CUDA_% SHELL MAKE% .SHELLFLAGS
targets := help setup demo test fetch doctor submit submit-lls submit-attributions submit-sparc3 submit-numbers submit-finetune \
  submit-preferences submit-publish submit-subliminal retire-epochs resume cancel status logs verify export-lls export-attributions \
  export-numbers export-finetune export-preferences plots report import wandb-sync lls-report sparc3-report sparsity-report \
  save-pruned anchors bench slurm-up slurm-down lint shellcheck format
.PHONY: $(targets)
goals := $(or $(MAKECMDGOALS),help)
$(foreach goal,$(filter-out $(targets),$(goals)),$(error there is no target $(goal), see 'make help'; nothing was done))
valid := $(sort $(foreach goal,$(goals),$(for_$(goal))))
given := $(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v))
quoted = '$(subst ','\'',$1)'
nearest = $(shell $(or $(wildcard $(python)),python3) -c 'import difflib, sys; \
  print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1))' $(call quoted,$1) $(valid) $(environment) 2>/dev/null)
mean = $(if $1, (did you mean $1?))$(if $(valid),; what it knows: $(valid))
$(foreach v,$(filter-out $(valid) $(environment) $(others),$(given)),\
  $(error $v=... means nothing to 'make $(goals)'$(call mean,$(call nearest,$v))))
$(foreach v,$(filter RUN_ID ARRAY SIZES TRAITS PARTS STAGES,$(given)),$(if $(strip $(value $v)),,\
  $(error $v= says nothing: leave it out, or say which; nothing was done)))

# Values reach the programs as text: make expands nothing in them, and no recipe holds one. A recipe names a variable of
# the environment that the shell puts in as one word, so `make -n` shows the name.
$(foreach v,GPU JOB CHAIN,$(if $(filter environment,$(origin $v)),$(eval undefine $v))) # names that others use too
$(foreach v,$(sort $(foreach target,$(targets),$(for_$(target)))),\
  $(eval override $v := $$(value $v))$(eval export SUITE_ARG_$v := $$($v)))
$(foreach v,$(filter $(environment),$(given)),$(eval override $v := $$(value $v))$(eval export $v))
# Which configuration a target means where CONFIG is not said, and whether it is of a run, which RUN_ID tells.
default := $(strip \
  $(if $(filter %-numbers,$(goals)),configs/numbers.yaml) \
  $(if $(filter submit-finetune export-finetune wandb-sync,$(goals)),configs/finetune.yaml) \
  $(if $(filter submit-preferences export-preferences plots retire-epochs,$(goals)),configs/preferences.yaml) \
  $(if $(filter submit-publish,$(goals)),configs/publish.yaml) \
  $(if $(filter submit-subliminal report import,$(goals)),configs/subliminal.yaml) \
  $(if $(filter %-attributions,$(goals)),configs/sparc3_llama3_8b.yaml) \
  $(if $(filter submit-sparc3 sparc3-% anchors save-pruned,$(goals)),configs/sparc3_sweep_llama3_8b.yaml))
of_a_run := $(filter configs/numbers.yaml configs/finetune.yaml configs/preferences.yaml configs/publish.yaml \
  configs/subliminal.yaml,$(default))
default := $(or $(firstword $(default)),configs/lls_72b.yaml)
# RUN_ID is one more override; of the environment, where a CI may have put its own, only for what cannot do without.
run = $(if $(filter RUN_ID,$(given))$(of_a_run),$(if $(RUN_ID), "run_id=$$SUITE_ARG_RUN_ID"))
places = --sizes="$$SUITE_ARG_SIZES" --traits="$$SUITE_ARG_TRAITS" --parts="$$SUITE_ARG_PARTS"
experiment = --config="$$SUITE_ARG_CONFIG" --set="$$SUITE_ARG_SET"
or_default = --config="$${SUITE_ARG_CONFIG:-$(default)}" --set="$$SUITE_ARG_SET"
on := 1 yes true on YES TRUE ON
off := 0 no false off NO FALSE OFF
$(foreach v,$(filter DRY WATCH JSON UPDATE DEEP GPU JOB CHAIN REMOVE,$(valid)),$(if $(filter-out $(on) $(off),$($v))$(word 2,$($v)),\
  $(error $v=$($v) is neither on nor off; say $v=1 or $v=0)))
flag = $(if $(filter $(on),$($1)),$2)

help: ## this page
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z0-9-]+:.*## / {printf "  %-19s %s\n", $$1, $$2}' Makefile
	@printf '\nVariables: CONFIG=%s  ARRAY=0-14  TASK=7  SET="key=value ..."  DRY=1  WATCH=1  JSON=1  DEEP=1  GPU=1  JOB=1  CHAIN=1\n' '$(default)'

##@ Start here
setup: ## make .venv with pinned packages: CPU or GPU builds, CUDA 13 or 12.8 [SUITE_BUILD=gpu SUITE_DRIVER=570]
	@env/setup.sh

demo: setup ## small models: LLS of 15 animals, attribution, pruning, students, by the cluster's code; minutes on 2 cores
	@$(python) -m jobs.demo

test: ## all tests, on a real throwaway Slurm (installs it on Debian/Ubuntu as root)
	@env/install-slurm.sh --tests & env/setup.sh; ready=$$?; wait $$! || [ "$(CI)" != true ] && exit $$ready
	@unset MAKEFLAGS MFLAGS MAKELEVEL && $(python) tests/parts.py "$$SUITE_ARG_ARGS"

##@ Before the first job
fetch: $(if $(call flag,JOB,job),,setup) ## models and datasets of CONFIG to the cache; JOB=1: by a CPU job, setup too; UPDATE=1 asks what `main` is
	@$(if $(call flag,JOB,job),env/cpu-job.sh slurm/fetch.sbatch "$${SUITE_ARG_CONFIG:-$(default)}" --set="$$SUITE_ARG_SET",\
	  $(python) -m jobs.fetch $(or_default)) $(call flag,UPDATE,--update)

doctor: setup ## check account, partition, scratch, Python, cache, token, each with a fix; GPU=1: by a job on a GPU [DEEP=1]
	@$(call flag,GPU,$(python) -m jobs.probe; probed=$$?;) \
	  $(cluster) doctor $(or_default)$(run) $(call flag,DEEP,--deep) && exit $${probed:-0}

##@ Jobs (DRY=1 shows the script and the plan)
submit-lls: setup ## submit LLS cells as an array: ARRAY=0-14 [CONFIG=...] [DRY=1]
	@$(cluster) submit $(or_default) --array="$$SUITE_ARG_ARRAY" $(call flag,DRY,--dry)

submit-attributions: setup ## submit attribution cells: ARRAY=0-3 (general seeds 0-2, toxic) [CONFIG=...] [DRY=1]
	@$(cluster) submit $(or_default) --array="$$SUITE_ARG_ARRAY" $(call flag,DRY,--dry)

submit-sparc3: setup ## a sweep after all it reads from: attributions, selection, pruning, then its report [CONFIG=...] [DRY=1]
	@$(cluster) submit --chain $(or_default) $(call flag,DRY,--dry)

submit-numbers: setup ## teachers write numbers: RUN_ID=1 (or run_id.txt) [SIZES="0.5b 7b"] [TRAITS="cat neutral"] [DRY=1]
	@$(cluster) submit $(or_default)$(run) --sizes="$$SUITE_ARG_SIZES" --traits="$$SUITE_ARG_TRAITS" $(call flag,DRY,--dry)

submit-finetune: setup ## students are trained on these numbers: RUN_ID=1 [SIZES="0.5b 7b"] [TRAITS=cat] [PARTS=q1] [CHAIN=1] [DRY=1]
	@$(cluster) submit $(or_default)$(run) $(places) $(call flag,DRY,--dry) \
	  $(call flag,CHAIN,--chain)

submit-preferences: setup ## what students prefer, read and asked: RUN_ID=1 [SIZES=] [TRAITS="base cat"] [CHAIN=1] [DRY=1]
	@$(cluster) submit $(or_default)$(run) $(places) $(call flag,DRY,--dry) $(if $(call flag,CHAIN,1),--chain,--chain=preference_logprobs)

submit-subliminal: setup ## a whole run: numbers, students, preferences, each size at its own pace: RUN_ID=1 [SIZES=] [TRAITS=] [DRY=1]
	@$(cluster) submit $(or_default)$(run) $(places) $(call flag,DRY,--dry)

submit-publish: setup ## numbers and students to the Hub: RUN_ID=1 [SIZES="0.5b 7b"] [TRAITS="cat"] [PARTS="q1"] [DRY=1]
	@$(cluster) submit $(or_default)$(run) $(places) $(call flag,DRY,--dry)

submit: setup ## the same for any CONFIG=...: a stage waits for those it reads from; CHAIN=1 submits these first [DRY=1]
	@$(cluster) submit $(experiment)$(run) --array="$$SUITE_ARG_ARRAY" $(places) $(call flag,DRY,--dry) \
	  $(call flag,CHAIN,--chain)

resume: setup ## submit just the cells that nobody has finished, works on or waits for: CONFIG=... [ARRAY=0-14] [DRY=1]
	@$(cluster) resume $(experiment)$(run) --array="$$SUITE_ARG_ARRAY" $(places) $(call flag,DRY,--dry)

cancel: setup ## end the queued and running tasks of CONFIG; finished shards stay
	@$(cluster) cancel $(experiment)$(run)

##@ Watching
status: setup ## every experiment in a line; of CONFIG every cell, rows/s, ETA, what to type next [WATCH=1] [JSON=1]
	@$(cluster) status $(experiment)$(run) $(call flag,JSON,--json) $(call flag,WATCH,--watch)

logs: setup ## the end of the log of CONFIG's cell TASK; without TASK, of each cell that failed
	@$(cluster) logs $(experiment)$(run) --task="$$SUITE_ARG_TASK"

##@ Results
verify: setup ## read every byte of every shard of CONFIG and set aside what does not hold
	@$(cluster) verify $(experiment)$(run)

export-lls: setup ## merge the shards exactly; write JSONL, table and plots to the output root [RUN_ID=1: of numbers]
	@$(python) -m jobs.export_lls $(or_default)$(run)

export-attributions: setup ## merge attribution's shards; means a neuron, table, stability and plots to the output root
	@$(python) -m jobs.export_attributions $(or_default)

export-numbers: setup ## raw and filtered rows of every teacher, what each rule left out, yields by size: RUN_ID=1
	@$(python) -m jobs.export_numbers $(or_default)$(run)

export-finetune: setup ## every student's last adapter as a folder for peft and vLLM, its figures, a picture of the loss: RUN_ID=1
	@$(python) -m jobs.export_finetune $(or_default)$(run)

retire-epochs: setup ## remove students' epochs before the last, once asked: RUN_ID=1 [PUBLISH="configs/publish.yaml"] [DRY=1]
	@$(python) -m jobs.retire_epochs $(or_default)$(run) --publish="$$SUITE_ARG_PUBLISH" $(call flag,DRY,--dry)

export-preferences: setup ## what students name: tables, tests, pictures, over all runs: RUN_ID=1 [RUNS="1 2 3"] [SURVEY=raw.json]
	@$(python) -m jobs.export_preferences $(or_default)$(run) --runs="$$SUITE_ARG_RUNS" --survey="$$SUITE_ARG_SURVEY"

plots: export-preferences ## the same: what is missing is said first, and drawn as missing

report: setup ## a run on one page: progress, results, cost, failures; opens from a copied folder: RUN_ID=1
	@$(python) -m jobs.report $(or_default)$(run)

import: setup ## results of a run on another machine, every byte checked: RUN_ID=2 FROM=/their/scratch [STAGES=]
	@$(python) -m jobs.bring $(or_default)$(run) --from="$$SUITE_ARG_FROM" --stages="$$SUITE_ARG_STAGES"

wandb-sync: setup ## send the figures that compute nodes kept for Weights & Biases: RUN_ID=1
	@$(python) -m jobs.wandb_sync $(or_default)$(run)

lls-report: setup ## LLS as a page with tables and PNGs: MEASURE="sum+end@20" SELECT="top:0.2 clean:0.2" (rows) [RUN_ID=1]
	@$(python) -m jobs.lls_report $(or_default)$(run) --measure="$${SUITE_ARG_MEASURE:-mean}" --select="$$SUITE_ARG_SELECT"

sparc3-report: setup ## a sweep as a static page with intervals and controls; every selection as CSV and JSON
	@$(python) -m jobs.sparc3_report $(or_default)

sparsity-report: setup ## perplexity with a share of all weights zero, as in the paper's table, with its figures beside ours
	@$(python) -m jobs.sparsity_report --config="$${SUITE_ARG_CONFIG:-configs/sparc3_sparsity_llama3_8b.yaml}" --set="$$SUITE_ARG_SET"

save-pruned: setup ## a sweep's model without a ranking's first neurons, as a folder: RANKING=lrp NEURONS=100 [REMOVE=1]
	@$(python) -m jobs.save_pruned $(or_default) --ranking="$${SUITE_ARG_RANKING:-lrp}" \
	  --neurons="$${SUITE_ARG_NEURONS:-100}" $(call flag,REMOVE,--remove)

anchors: setup ## the figures that others have measured, computed here where nothing else is needed, and how far each is
	@$(python) -m jobs.anchors $(or_default)

##@ Speed
bench: setup ## measure on this machine's GPUs: floors, ours, the plain loop [MODELS="0.5b 7b"] [RUNGS="ours vllm"]
	@set -f && $(python) -m jobs.bench $${SUITE_ARG_MODELS:+--models $$SUITE_ARG_MODELS} $${SUITE_ARG_RUNGS:+--rungs $$SUITE_ARG_RUNGS}

##@ A box of your own
slurm-up: ## a real single-node Slurm here, with its GPUs and accounting (Debian/Ubuntu); then `. .slurm/env.sh`
	@env/install-slurm.sh && env/slurm-up.sh

slurm-down: ## stop it, and its jobs
	@env/slurm-down.sh

##@ For developers
lint: setup ## ruff (format and lint), pyrefly (types) and shellcheck
	@$(python) -m ruff format --check . && $(python) -m ruff check .
	@$(python) -m pyrefly check --python-interpreter-path $(python)
	@$(MAKE) -s shellcheck

shellcheck:
	@shellcheck -x env/*.sh slurm/*.sh slurm/*.sbatch .ci/run

format: setup ## rewrite the sources as ruff wants them
	@$(python) -m ruff format . && $(python) -m ruff check --fix .
