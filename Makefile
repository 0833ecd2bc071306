# make smoke | test | test-all | lint      Each creates .venv first, if there is none, and installs into it with pip.
# make lock                               Recreates launch/lock.
PYTHON ?= python3
PY := .venv/bin/python
BETARANK := .venv/bin/betarank
SOURCE ?= reasoning
SMOKE := runs/smoke/$(firstword $(subst :, ,$(SOURCE)))
CONFIG := configs/smoke.py:source=$(SOURCE)
# Evaluation: held-out problems of the task that RL trains on, at RL's temperature.
SAMPLE := --benchmark='reasoning:chain_sum?max_terms=3&max_digits=1' --config.eval.sample.held_out_fraction=0.1 \
  --config.eval.sample.problems=128 --config.eval.sample.samples=8 --config.eval.sample.max_new_tokens=28 \
  --config.eval.sample.temperature=1.0 --config.eval.sample.top_p=1.0

.PHONY: smoke test test-all lint lock clean

.venv/installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ...")'
	@echo "installing into .venv (once; one to two minutes)"
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# One thread for each of the two runs, which run at the same time: a model of this size gains nothing from a second, and
# the figures don't depend on the number of cores.
smoke: export NPROC = 1
smoke: export JAX_PLATFORMS = cpu
smoke: export JAX_COMPILATION_CACHE_DIR = $(CURDIR)/$(SMOKE)/compiled
smoke: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0.2

# Prepares data, pre-trains with beta = 0 and -0.25 at the same time, continues both with RL, evaluates, prints a table of
# each stage, and writes the report of all four runs. Text has no answers to reward, so make smoke SOURCE='text:/path/*.txt'
# ends after pre-training. ARGS are appended to the commands that prepare and train.
smoke: .venv/installed
	@rm -rf $(SMOKE)/beta=* $(SMOKE)/rl $(SMOKE)/compiled
	$(BETARANK) data prepare --config='$(CONFIG)' $(ARGS)
	@echo 'Both runs train at the same time. This one is beta=0; the output of the other is in $(SMOKE)/beta=-0.25.log.'
	@$(MAKE) --no-print-directory -j2 arm.0 arm.-0.25
ifeq ($(SOURCE),reasoning)
	@echo
	$(BETARANK) compare $(SMOKE)/beta=0 $(SMOKE)/beta=-0.25 --plot=$(SMOKE)/curves.png
	$(BETARANK) compare $(SMOKE)/rl/beta=0 $(SMOKE)/rl/beta=-0.25 --plot=$(SMOKE)/rl.png
	$(BETARANK) report $(SMOKE)
	@echo
	@echo 'In $(SMOKE) are now: data; two pre-trained models, beta=0 and'
	@echo 'beta=-0.25; the same two after RL, in rl; curves.png, rl.png and'
	@echo 'report/report.html, which is the file to open first. Worth trying next:'
	@echo '  . .venv/bin/activate'
	@echo '  betarank explore $(SMOKE)/beta=0 $(SMOKE)/beta=-0.25'
	@printf '%s\n' '  betarank generate --checkpoint=$(SMOKE)/rl/beta=0 \' \
	  "    --prompt='Question: State the final answer to the following arithmetic problem: 3 + 4 =\nSolution:'"
	@printf '%s\n' '  betarank rl --from=$(SMOKE)/beta=0 \' \
	  "    --task='reasoning:chain_sum?max_terms=4&max_digits=1'"
else
	$(BETARANK) compare $(SMOKE)/beta=0 $(SMOKE)/beta=-0.25 --plot=$(SMOKE)/curves.png
	@echo
	@echo 'In $(SMOKE) are now: data; two models, beta=0 and beta=-0.25; curves.png.'
	@echo 'RL was skipped: it needs problems with answers, as SOURCE=reasoning generates them.'
	@echo 'Worth trying next:'
	@echo '  . .venv/bin/activate'
	@echo '  betarank explore $(SMOKE)/beta=0 $(SMOKE)/beta=-0.25'
	@echo '  betarank generate --checkpoint=$(SMOKE)/beta=0'
	@echo '  betarank report $(SMOKE)'
endif

# All that is done with one beta. The terminal shows it for beta=0; for others it goes to a file.
TO = $(if $(filter 0,$*),,>> '$(SMOKE)/beta=$*.log' 2>&1 || { tail -n 20 '$(SMOKE)/beta=$*.log' >&2; exit 1; })
arm.%:
	$(BETARANK) train --config='$(CONFIG),beta=$*' --workdir=$(SMOKE)/beta=$* $(ARGS) $(TO)
ifeq ($(SOURCE),reasoning)
	$(BETARANK) rl --config=configs/rl_smoke.py:init_from=$(SMOKE)/beta=$* --workdir=$(SMOKE)/rl/beta=$* $(ARGS) $(TO)
	@for run in beta=$* rl/beta=$*; do \
	  echo "$(BETARANK) eval probe; $(BETARANK) eval sample: $(SMOKE)/$$run"; \
	  $(BETARANK) eval probe --checkpoint=$(SMOKE)/$$run && $(BETARANK) eval sample --checkpoint=$(SMOKE)/$$run $(SAMPLE) \
	  || exit 1; \
	done $(TO)
endif

test: .venv/installed
	$(PY) -m pytest -m 'not slow' -n 2 --dist loadfile

test-all: .venv/installed
	TEST_OPTIMIZED=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	.venv/bin/ruff check .

clean:
	rm -rf .venv runs build *.egg-info

# The versions and hashes that pods and images install (launch/lock), from the bounds of setup.py and the versions of
# launch/constraints.txt. Needs uv (pip install uv); then run the tests with these versions.
UV = uv pip compile --quiet --generate-hashes --upgrade --custom-compile-command='make lock'
lock:
	echo uv | $(UV) --python-version=3.10 - --output-file=launch/lock/uv.txt
	echo setuptools | $(UV) --python-version=3.12 - --output-file=launch/lock/build.txt
	for extra in tpu gpu; do $(UV) --python-version=3.12 --python-platform=x86_64-manylinux_2_31 --extra=$$extra \
	  --constraint=launch/constraints.txt setup.py --output-file=launch/lock/$$extra.txt || exit 1; done
