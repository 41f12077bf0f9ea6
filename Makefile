# Two commands do everything on a fresh Debian machine with Rust:
#   make demo    installs what is missing, builds, and shows the probes at work
#   make test    runs every check and every test; .ci/run calls it

.PHONY: demo test check setup campaign matrix

VMPROBE = target/release/vmprobe

demo: setup
	cargo build --release --locked --package api
	scripts/demo.sh $(VMPROBE)

test: setup check
	cargo build --locked --quiet --package api
	VMPROBE_TEST_KERNEL="$$(target/debug/vmprobe prepare kernel || true)" cargo test --workspace --locked --quiet

check: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked --quiet -- --deny warnings
	RUSTDOCFLAGS="--deny warnings" cargo doc --workspace --no-deps --locked --quiet

setup:
	scripts/setup.sh

# vmprobe's own matrix (docs/matrix.md), from where the last run was interrupted. `make test` runs a slice of it.
matrix: setup
	cargo build --release --locked --package api
	$(VMPROBE) matrix matrix/self.toml

# What takes too long for a test, about an hour and a half; docs/campaigns.md tells what it is and what it found.
campaign: setup
	cargo test --release --locked --package api --test campaign -- --ignored --nocapture --test-threads 1
	cargo build --release --locked --package campaign
	cargo test --release --locked --package api --test load --test journal --test faults --test identity -- --ignored --nocapture
	target/release/campaign isa --seed 2026 --cases 40 > campaign/reports/kvm.md
	target/release/campaign isa --seed 2026 --cases 10 --accel nested > campaign/reports/nested.md
	target/release/campaign user --vcpus 16 --rounds 4000 --accel nested
	VMPROBE_STORM_CYCLES=100000 cargo test --release --locked --package vmm --test kvm engine::
