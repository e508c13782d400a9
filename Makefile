# Two commands do everything: `make demo` and `make test`.
.PHONY: demo test setup models build lint

demo: setup
	cargo build --release -p mansard
	.ci/demo

# The models and ptxas are optional: tests of what could not be fetched report themselves as skipped.
# So are OpenAI's Python client and playwright, but not where `CI` is set.
test: setup
	-.ci/fetch-models smollm2 gemma3 minilm
	-.ci/fetch-ptxas
	-.ci/fetch-clients
	MANSARD_SOAK_SECONDS=$${MANSARD_SOAK_SECONDS:-60} cargo test --workspace

setup:
	@.ci/setup

models: setup
	.ci/fetch-models smollm2 gemma3 minilm

build: setup
	cargo build --release --workspace

lint: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
