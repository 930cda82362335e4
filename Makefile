# What there is to do. `make demo` and `make test` install all that they need.

CARGO ?= cargo
PROGRAMS := $(or $(CARGO_TARGET_DIR),target)

# A cluster is taken from the command line only, so that an exported KUBECONFIG is never used by accident.
ifeq ($(origin KUBECONFIG),command line)
DEMO_FLAGS := --kubeconfig $(KUBECONFIG)
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint unit kernels e2e generate oracle bench bench-operator fuzz audit gpu-check kernel-mutants down rust

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

CUDA := --package tunesmith-kernels --package tunesmith-kernel-checks --features tunesmith-kernels/cuda,tunesmith-kernel-checks/cuda

# Every cargo command selects the whole workspace, so that features are resolved and dependencies built once.
# The demo and the tests share one build, of the dev profile: it optimises what computes, and nothing else.
demo: rust ## From kubectl apply to a tuned adapter, on a local cluster or on KUBECONFIG=…
	$(CARGO) build --workspace --bins
	$(PROGRAMS)/debug/demo $(DEMO_FLAGS)

TEST_GROUPS := lint unit kernels e2e

test: ## Everything that must pass before a commit lands, with the seconds of each group
	@times=; for group in $(TEST_GROUPS); do \
	  start=$$(date +%s); $(MAKE) --no-print-directory $$group || { echo "make $$group failed" >&2; exit 1; }; \
	  times="$$times, $$group $$(($$(date +%s) - start)) s"; \
	done; echo "Passed: $${times#, }. What takes long and rarely breaks is in make test-all."

test-all: test audit oracle fuzz kernel-mutants bench-operator ## The rest too: licences, PyTorch's numbers, damaged files, mutants, 10,000 jobs (hours)

# The kernels are left out until device, kernel and emulator no longer import each other.
lint: rust ## Formatting, clippy, and no cycle of imports between modules
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings
	$(CARGO) run --quiet --package tunesmith-lint

unit: rust ## Unit, property and fixture tests
	$(CARGO) test --workspace

# Without nvcc the kernels run under the emulation alone, as in `unit`. Here they are compiled for each card as well; the driver's side
# runs on a driver without a GPU.
kernels: rust ## Compile the kernels for GPUs, and compare what became of them (installs nvcc, 330 MB; WRITE=1 writes the table)
	kernels/with-nvcc.sh $(CARGO) run --quiet --package tunesmith-kernels --features cuda --example resources -- $(if $(WRITE),--write)
	kernels/with-nvcc.sh $(CARGO) clippy $(CUDA) --all-targets --quiet -- -D warnings
	kernels/with-nvcc.sh $(CARGO) test $(CUDA) --test emulated --test gpu_check

e2e: rust ## The chart, object stores of each kind, and the tests on a real cluster (KEEP=1 leaves it up)
	$(CARGO) build --workspace --bins --examples
	$(CARGO) test --workspace --test chart --test operator --test stores --test cluster -- --nocapture --test-threads 4; status=$$?; \
	  $(if $(KEEP),,$(PROGRAMS)/debug/cluster down --name tunesmith-e2e;) exit $$status

generate: rust ## Write crds/yaml, the chart's CRDs and docs/api.md from the Rust types
	$(CARGO) run --quiet -p tunesmith-crds --bin crdgen

audit: rust ## Licences, sources and versions of dependencies, and those without use (installs cargo-deny and cargo-machete)
	cargo machete --version >/dev/null 2>&1 || cargo install cargo-machete --locked
	cargo deny --version >/dev/null 2>&1 || cargo install cargo-deny --locked
	cargo machete
	cargo deny check licenses bans sources
	cargo deny check advisories || echo 'Advisories: found some, or their database was out of reach: see above.'

oracle: rust ## Compare with transformers and PEFT (installs PyTorch, 6 GB)
	e2e/oracle/run.sh

bench: rust ## Speed and memory, beside PEFT where Python has it
	$(CARGO) bench --package tunesmith-engine --bench trainer

# The operator is built alone, as its image has it: by the release profile, with its own features only.
bench-operator: rust ## The operator with 10,000 jobs: memory, requests, latency, fail-over
	$(CARGO) build --release --package tunesmith-operator
	$(CARGO) build --workspace --bins
	$(PROGRAMS)/debug/bench_operator

kernel-mutants: rust ## Change each barrier, wait and bound of the kernels: a check must fail (an hour; KERNEL="norm rope" for some files)
	$(CARGO) run --quiet --package tunesmith-kernel-checks --example mutants -- $(KERNEL)

# One folder of less than 64 MB, with all that a machine with a driver and a GPU needs.
gpu-check: rust ## Check the kernels on a GPU; without one, make target/gpu-check to carry to a machine that has one
	kernels/with-nvcc.sh kernels/gpu-check.sh

FUZZ_SECONDS ?= 60
fuzz: rust ## Feed damaged files to all that reads files (installs cargo-fuzz; FUZZ_SECONDS=60 a target)
	rustup toolchain install nightly --profile minimal
	cargo fuzz --version >/dev/null 2>&1 || cargo install cargo-fuzz --locked
	set -e; for target in $$(cargo +nightly fuzz list --fuzz-dir fuzz); do \
	  cargo +nightly fuzz run --fuzz-dir fuzz $$target -- -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=2048; done

down: rust ## Remove the demo's cluster
	e2e/cluster down

rust:
	@command -v $(firstword $(CARGO)) >/dev/null || { echo 'Rust is missing: install it from https://rustup.rs, then run this again.' >&2; exit 1; }
