# Benchmarks need more than tests do: a C compiler for the bare init, and the C
# virtiofsd to compare with.
PACKAGES_BENCH := gcc qemu-system-common

.PHONY: packages-bench
packages-bench:
	@scripts/packages.sh $(PACKAGES_BENCH)

bench: packages-bench
