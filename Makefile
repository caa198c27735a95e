# Lacre's tasks. `make help` lists them; the scripts behind them are in scripts/.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help deps run dev build test lint fmt soak bench capabilities doc clean

target := $(or $(CARGO_TARGET_DIR),target)
# Passed on to `lacre dev`: make run ARGS="--listen 127.0.0.1:9000"
ARGS ?=

help: ## List the tasks
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

deps: ## Install what is missing (apt as root or with sudo; the rest into .deps)
	@scripts/deps.sh test

run: ## Serve on SoftHSM and SQLite, data in .dev
	@scripts/deps.sh run
	@cargo build --locked
	@printf '%s\n' '' \
	  'Lacre says "lacre ready" below when it serves. Then, in another terminal:' \
	  '  curl -s http://127.0.0.1:8280/readyz           is everything well?' \
	  '  cat .dev/dev.json                              addresses and credentials of the sample applications' \
	  '  $(target)/debug/lacre --help                   the command line' \
	  'Ctrl-C stops it; the next run continues with the same keys and data.' '' >&2
	@exec $(target)/debug/lacre dev --data-dir .dev $(ARGS)

dev: run ## The same as run

build: ## Build the release binary
	@scripts/deps.sh run
	cargo build --release --locked

test: ## Run everything: format, lints, licences, documentation, all tests
	@scripts/deps.sh test
	@scripts/test.sh

lint: ## Run the quick part of test: format, lints, licences, scripts
	@scripts/deps.sh test
	@scripts/test.sh lint

fmt: ## Format the code
	cargo fmt
	cargo fmt --manifest-path tests/backend/shim/Cargo.toml
	cargo fmt --manifest-path tests/backend/kryoptic/Cargo.toml

soak: ## Kill at every write to the database, fail every call of the device, rotate keys under load (an hour)
	@scripts/deps.sh test
	cargo test --locked --test crash -- --ignored --nocapture
	cargo test --locked --test device -- --ignored --nocapture
	cargo test --locked --test rotation -- --ignored --nocapture --test-threads 1
	cargo test --locked --test tokens -- --ignored --nocapture --test-threads 1

bench: ## Print the figures: device and daemon, each beside the raw device of the same run
	@scripts/deps.sh test
	cargo build --release --locked
	cargo bench --locked --bench device
	cargo bench --locked --bench daemon
	cargo bench --locked --bench signing
	cargo bench --locked --bench latency
	cargo bench --locked --bench sealer
	cargo bench --locked --bench tokens

capabilities: ## Put what the devices of the tests can do into README.md
	@scripts/deps.sh test
	LACRE_UPDATE_README=1 cargo test --locked --test backend the_readme_says_what_was_measured

doc: ## Build the library's documentation into target/doc
	cargo doc --no-deps --lib --locked

clean: ## Delete what was built or installed here; .dev, with its keys, stays
	cargo clean
	rm -rf .deps .advisory-dbs tests/idp/node_modules
