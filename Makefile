# Two commands do everything: `make demo` and `make test`.
.PHONY: demo test setup models build lib lint

demo: setup
	cargo build --release -p mansard
	.ci/demo

# The models and ptxas are optional: tests of what could not be fetched report themselves as skipped.
# So are OpenAI's Python client, playwright, and what builds the Python package, but not where `CI` is set.
test: setup
	-.ci/fetch-models smollm2 gemma3 minilm
	-.ci/fetch-ptxas
	-.ci/fetch-clients
	MANSARD_SOAK_SECONDS=$${MANSARD_SOAK_SECONDS:-60} cargo test --workspace

setup:
	@.ci/setup

models: setup
	.ci/fetch-models smollm2 gemma3 minilm

build: setup lib
	cargo build --release --workspace

# What `mansard bundle` and C programs need: the runner, libmansard.a, libmansard.so and mansard.h. No LLVM.
lib:
	.ci/lib target/release/lib

lint: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
